"""A neighbour table: the rows a search takes, and the table over all rows from those over distinct ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tdgeom.measures.neighbors.distance_gradient import directions
from tdgeom.numerics.centring import real_rows, refuse_nonfinite, upcast
from tdgeom.numerics.copies import expand_table, first_copies

__all__ = ["Leaves", "Neighbors", "check_rows", "empty_leaves", "leaves_from", "minkowski", "searchable"]

# The largest value of a row lies between them; squares of differences between rows are then numbers.
_SMALLEST, _LARGEST = 1e-140, 1e150


class Neighbors(NamedTuple):
    """A neighbour table: what ``nearest_neighbors`` returns, in the order that ``NearestNeighbors`` writes."""

    distance: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which means nothing for a table
    distinct_distance: Tensor
    duplicates: Tensor


# What a search finds: over all rows distance and index (*B, N, k); among first occurrences the same two (NaN and 0 where
# there is nothing); the number of later copies (*B,).
Leaves = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def minkowski(metric: str | float) -> tuple[float, bool]:
    """The exponent p of a metric's distance, and whether it is one between directions."""
    if metric in ("euclidean", "cosine"):
        return 2.0, metric == "cosine"
    if isinstance(metric, (int, float)) and not isinstance(metric, bool) and metric >= 1:
        return float(metric), False
    raise ValueError(
        f"metric is 'euclidean', 'cosine' or a number p >= 1 (math.inf included) for Minkowski's distance, got {metric!r}."
    )


def check_rows(x: Tensor, k: int) -> Tensor:
    """(*B, N, D) in float32 or float64, of which each row can have k neighbours."""
    if x.ndim < 2 or x.shape[-1] < 1:
        raise ValueError(f"nearest neighbours expect rows of shape (..., N, D), got {tuple(x.shape)}.")
    n = x.shape[-2]
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k is a number of neighbours, at least 1, got {k!r}.")
    if k >= n:
        raise ValueError(
            f"{k} nearest neighbours need at least {k + 1} rows, got {n} (shape {tuple(x.shape)}). Give more rows or a smaller k."
        )
    rows = upcast(real_rows(x, "nearest neighbours"))
    return rows.cpu() if rows.device.type == "mps" else rows  # no float64 there


def searchable(x: Tensor, cosine: bool) -> Tensor:
    """The rows as (b, N, D), of unit length for cosine; values that no search can order are refused."""
    size = float(refuse_nonfinite(x, "nearest neighbours"))
    if size and not _SMALLEST <= size <= _LARGEST:
        raise ValueError(
            f"nearest neighbours: the rows reach {size:.0e}, whose square leaves the range of float64. Give them in a "
            f"unit between {_SMALLEST:.0e} and {_LARGEST:.0e}."
        )
    if cosine and not bool(x.any(-1).all()):
        raise ValueError(
            "metric='cosine': a row is zero and has no direction. Drop zero rows or use 'euclidean'."
        )
    rows = x.detach().reshape(-1, *x.shape[-2:])
    return directions(rows) if cosine else rows


def leaves_from(
    search: Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    cosine: bool,
    k: int,
    together: int,
) -> Leaves:
    """What ``search(rows (b, n, D) without copies, number, which data sets)`` finds, ``together`` data sets at a time."""
    flat = searchable(x, cosine)
    b, n, _ = flat.shape
    first = first_copies(flat)
    kept = first == torch.arange(n, device=x.device)
    distinct = torch.full((b, n, k), torch.nan, dtype=torch.float64, device=x.device)
    among = torch.zeros((b, n, k), dtype=torch.int64, device=x.device)
    distance, index = torch.empty_like(distinct), torch.empty_like(among)
    whole = kept.all(-1)
    for items in filter(len, (*whole.nonzero().flatten().split(together), *(~whole).nonzero())):
        rows = flat if len(items) == b else flat[items]
        own = kept[items[0]].nonzero().flatten()
        found = min(k, len(own) - 1)
        if len(own) == n:
            near, at = search(rows, k, items)
            distance[items], index[items], distinct[items], among[items] = near, at, near, at
            continue
        if found:
            near, at = search(rows[:, own], found, items)
        else:
            near, at = distinct.new_empty((1, 1, 0)), among.new_empty((1, 1, 0))
        distinct[items, own, :found], among[items, own, :found] = near[0], own[at[0]]
        distance[items], index[items] = expand_table(first[items[0]], near[0], at[0], k)
    if cosine:
        distance, distinct = distance.square() / 2, distinct.square() / 2
    lead, shape = x.shape[:-2], (*x.shape[:-1], k)
    copies = (~kept).sum(-1)
    return distance.view(shape), index.view(shape), distinct.view(shape), among.view(shape), copies.view(lead)


def empty_leaves(x: Tensor, p: float, cosine: bool, k: int, *settings: Any) -> Leaves:
    """Leaves of the right shapes, for tracing."""
    shape = (*x.shape[:-1], k)
    distance, index = x.new_empty(shape, dtype=torch.float64), x.new_empty(shape, dtype=torch.int64)
    duplicates = x.new_empty(x.shape[:-2], dtype=torch.int64)
    return distance, index, torch.empty_like(distance), torch.empty_like(index), duplicates
