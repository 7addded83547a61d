"""Pictures of intrinsic dimension against the distance at which it looks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from tdgeom.measures.columns import ESTIMATORS, column_of
from tdgeom.plot.palette import depth_colours
from tdgeom.plot.style import axes_or_new, few_ticks, layer_legend, tidy
from tdgeom.run.profiles import intrinsic_dimension_profile

__all__ = ["scale_profile"]


def scale_profile(
    result: Any, ax: Any = None, *, estimator: str | None = None, legend: bool | None = None
) -> Any:
    """Intrinsic dimension at every scale, a line a layer from dark (first) to light (last); a level stretch is a dimension.

    Args:
        result: what ``run`` returned, ``AnalysisResults``, or the table of ``intrinsic_dimension_profile``.
        ax: matplotlib axes; made if None.
        estimator: which one; default the first with several scales (Gride, the decimation).
        legend: a legend; default up to 12 lines, a colour bar beyond.

    Returns:
        The axes.

    Raises:
        KeyError: no estimator with several scales.

        >>> import torch, tdgeom as tg
        >>> from tensordict import TensorDict
        >>> rows = TensorDict({("sample", "residual_input.0"): torch.rand(200, 3)})
        >>> ax = scale_profile(tg.ForEach(tg.Gride(range_max=8), ["residual_input.0"])(rows))
        >>> ax.get_xlabel()
        'distance to the neighbours used'
    """
    table = result if isinstance(result, pd.DataFrame) else intrinsic_dimension_profile(result)
    steps = table.groupby("estimator", sort=False)["step"].max()
    several = [str(name) for name in steps.index[steps > 0]]
    if (estimator or next(iter(several), None)) not in several:
        raise KeyError(
            f"plot.scale_profile finds no estimator {estimator or 'with several scales'}; with several scales there are "
            f"{several}, with one {[str(name) for name in steps.index[steps == 0]]}."
        )
    estimator = estimator or several[0]
    table = table[table["estimator"] == estimator]
    if "weights" in table:
        table = table[table["weights"] == "trained"]
    ax = axes_or_new(ax, (6.0, 4.2))
    groups = list(table.groupby("site", sort=False))
    for (site, rows), colour in zip(groups, depth_colours(len(groups))):
        bars = rows["standard_error"].to_numpy(dtype=np.float64)
        ax.errorbar(
            rows["scale"].to_numpy(dtype=np.float64), rows["estimate"].to_numpy(dtype=np.float64),
            yerr=None if np.isnan(bars).all() else bars, color=colour, marker="o", markersize=3, linewidth=1.4, capsize=2,
            label=str(site),
        )  # fmt: skip
    ax.set(xscale="log", xlabel="distance to the neighbours used", ylabel=column_of("estimate").axis)
    ax.set_title(ESTIMATORS.get(estimator, estimator), fontsize="medium")
    few_ticks(ax)
    tidy(ax)
    layer_legend(ax, [str(site) for site, _ in groups], legend)
    return ax
