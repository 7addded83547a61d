"""The look that all pictures share: colours, names on axes, axes themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["as_array", "axes_or_new", "axis_name", "require_matplotlib", "thinned", "tidy"]

# Okabe and Ito's colours, told apart by readers with any colour vision; black is kept for text
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#F0E442")
MARKERS = "osD^vP*X"
# lines that coincide show through each other's gaps
DASHES = ("-", (0, (7, 2)), (0, (2, 2)), (0, (7, 2, 2, 2)))
GRADIENT = "viridis"

# what an axis says; the unit in brackets
NAMES = {
    "layer": "layer",
    "relative_depth": "relative depth (layer / last layer)",
    "layer_norm_depth": "relative depth (layer / last analysed layer)",
    "transition": "from layer -> to layer",
    "d_pr": "participation ratio (dimensions)",
    "d_pr_norm": "participation ratio / width",
    "d_entropy": "entropy dimension (dimensions)",
    "effective_rank": "effective rank (dimensions)",
    "stable_rank": "stable rank (dimensions)",
    "rankme": "RankMe (dimensions)",
    "k90": "components for 90 % of the variance",
    "k95": "components for 95 % of the variance",
    "k99": "components for 99 % of the variance",
    "top1_share": "variance in the first component (share)",
    "top10_share": "variance in the first 10 components (share)",
    "alpha_req": "power-law exponent of the spectrum",
    "cos_sim_mean": "mean cosine between rows",
    "norm_mean": "mean norm of a row",
    "feature_subspace_novelty": "subspace novelty (0 to 1)",
    "linear_cka": "linear CKA",
    "layer_cosine_sim": "mean cosine, same row",
    "load": "share of assignments",
    "router_entropy_norm": "router entropy / ln(experts)",
}


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
    return NAMES.get(column, column.replace("_", " "))


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
