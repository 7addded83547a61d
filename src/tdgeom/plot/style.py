"""The look that all pictures share: colours, names on axes, axes themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tdgeom.measures.columns import column_of

__all__ = ["as_array", "axes_or_new", "axis_name", "require_matplotlib", "thinned", "tidy"]


def require_matplotlib() -> Any:
    """``matplotlib``, or an error that names the extra."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ModuleNotFoundError('plots need matplotlib: pip install "tdgeom[report]".') from None
    return matplotlib


def axes_or_new(ax: Any, size: tuple[float, float]) -> Any:
    """The axes given, or those of a new figure of this size in inches."""
    if ax is not None:
        return ax
    require_matplotlib()
    from matplotlib import pyplot

    return pyplot.subplots(figsize=size, layout="constrained")[1]


def axis_name(column: str) -> str:
    """What an axis says of a column."""
    return column_of(column).axis


def tidy(ax: Any) -> None:
    """A light grid behind the data, no frame above and to the right."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)


def as_array(values: Any) -> np.ndarray:
    """A tensor or whatever NumPy takes, as an array."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def thinned(names: Sequence[str], most: int = 32) -> tuple[list[int], list[str]]:
    """Every so many of the names, at most ``most``, with their places: labels that do not run together."""
    step = -(-len(names) // most)
    places = list(range(0, len(names), step))
    return places, [names[place] for place in places]
