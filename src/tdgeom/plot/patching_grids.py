"""Pictures of activation patching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tensordict import TensorDictBase

from tdgeom.plot.matrices import matrix
from tdgeom.plot.style import as_array, thinned

__all__ = ["patching_grid"]


def patching_grid(
    result: TensorDictBase,
    kind: str | None = None,
    ax: Any = None,
    *,
    value: str = "recovered",
    metric: str | None = None,
    columns: Sequence[str] | None = None,
) -> Any:
    """What each place carries: layers down, positions (or heads) across; near 1, that place alone gives the other answer.

    Args:
        result: what ``activation_patching`` or ``attribution_patching`` returned.
        kind: which grid; needed where there are several.
        ax: matplotlib axes; made if None.
        value: "recovered" (0 to 1 on the colour scale, further where a value is) or "grid", the metric itself.
        metric: which metric (or answer); needed where there are several.
        columns: what the columns are called, such as the tokens.

    Returns:
        The axes.

    Raises:
        KeyError: no grid of this kind or metric, or several and none named. ValueError: not as many names as columns.

        >>> import torch
        >>> from tensordict import TensorDict
        >>> cells = {"layers": torch.tensor([3]), "columns": torch.tensor([0, 1]), "recovered": torch.tensor([[0.0, 1.0]])}
        >>> result = TensorDict({(root, "residual_input"): cell for root, cell in cells.items()})
        >>> patching_grid(result, columns=["a", "b"]).images[0].get_array().tolist()
        [[0.0, 1.0]]
    """
    grids = result.get(value, None)
    kinds = [] if grids is None else [str(name) for name in grids.keys()]
    if kind not in kinds and not (kind is None and len(kinds) == 1):
        raise KeyError(f"plot.patching_grid draws one grid: kind= is one of {kinds}, got {kind!r}.")
    kind = kinds[0] if kind is None else kind
    held = result.get((value, kind))
    metrics = [str(name) for name in held.keys()] if isinstance(held, TensorDictBase) else []
    if metric not in metrics and not (metric is None and len(metrics) < 2):
        raise KeyError(f"plot.patching_grid draws one metric: metric= is one of {metrics}, got {metric!r}.")
    metric = metrics[0] if metric is None and metrics else metric
    grid = as_array(held if metric is None else held.get(metric)).astype(np.float64)
    names = (
        [str(one) for one in as_array(result.get(("columns", kind)))] if columns is None else list(columns)
    )
    if len(names) != grid.shape[1]:
        raise ValueError(
            f"plot.patching_grid has {grid.shape[1]} columns, got {len(names)} names in columns=."
        )
    shares = value == "recovered"
    low, high = (min(0.0, np.nanmin(grid)), max(1.0, np.nanmax(grid))) if shares else (None, None)
    ax = matrix(grid, None, ax, vmin=low, vmax=high)
    layers = [str(layer) for layer in as_array(result.get(("layers", kind)))]
    ax.set_yticks(*thinned(layers), parse_math=False)
    ax.set_xticks(*thinned(names), rotation=90 if max(map(len, names)) > 3 else 0, parse_math=False)
    ax.set(ylabel="layer", xlabel="" if columns is not None else "position, head or neuron", aspect="auto")
    ax.set_title(
        f"{kind}: {'share of the effect restored' if shares else 'metric'}{'' if metric is None else f', {metric}'}",
        fontsize="medium",
        parse_math=False,
    )
    ax.images[0].colorbar.set_label(value)
    return ax
