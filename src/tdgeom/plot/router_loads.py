"""Pictures of how routers spread rows over experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from tdgeom.plot.matrices import matrix
from tdgeom.plot.pair_grids import short_names
from tdgeom.plot.style import as_array

__all__ = ["router"]


def router(results: Any, ax: Any = None) -> Any:
    """The load of every expert: routers down, experts across; bright columns are overused.

    Args:
        results: ``AnalysisResults`` of a mixture of experts, or its table ``router``.
        ax: matplotlib axes; made if None.

    Returns:
        The axes.

    Raises:
        KeyError: no loads.

        >>> table = pd.DataFrame({"site": ["router_logits.0"], "load": [np.array([0.25, 0.75])]})
        >>> router(table).images[0].get_array().tolist()
        [[0.25, 0.75]]
    """
    table = results if isinstance(results, pd.DataFrame) else getattr(results, "router", pd.DataFrame())
    if "load" not in table:
        raise KeyError(
            f"plot.router finds no column 'load'; the table has {list(table.columns)}: the model has no router."
        )
    loads = np.stack([as_array(load) for load in table["load"]])
    ax = matrix(loads, "load", ax, vmin=0.0)
    ax.set_yticks(range(len(loads)), labels=short_names(list(table["site"])), parse_math=False)
    ax.set(xlabel="expert", ylabel="layer", aspect="auto")
    return ax
