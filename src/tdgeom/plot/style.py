"""The look that all pictures share: colours, names on axes, axes themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tdgeom.measures.columns import column_of
from tdgeom.plot.palette import depth_colours

__all__ = [
    "as_array",
    "axes_or_new",
    "axis_name",
    "few_ticks",
    "plain_legend",
    "layer_legend",
    "require_matplotlib",
    "thinned",
    "tidy",
]


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


def few_ticks(ax: Any) -> None:
    """Plain numbers on a logarithmic axis that spans little more than one power of ten: its own labels run together."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = ax.get_xlim()
    if high < 30 * low:
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter("{x:g}")


def plain_legend(ax: Any, **how: Any) -> None:
    """A legend whose names are names: a dollar in one begins no formula."""
    for text in ax.legend(frameon=False, fontsize="small", **how).get_texts():
        text.set_parse_math(False)


def layer_legend(ax: Any, names: Sequence[str], wanted: bool | None = None) -> None:
    """What lines from dark to light are: a legend, or of more than twelve a colour bar."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    if wanted if wanted is not None else names and len(names) <= 12:
        plain_legend(ax, ncols=1 if len(names) <= 6 else 2)
    elif wanted is None and names:
        scale = ScalarMappable(Normalize(-0.5, len(names) - 0.5), ListedColormap(depth_colours(len(names))))
        bar = ax.figure.colorbar(scale, ax=ax)
        places = np.unique(np.linspace(0, len(names) - 1, 7).round().astype(int))
        bar.set_ticks(places, labels=[names[place] for place in places])
