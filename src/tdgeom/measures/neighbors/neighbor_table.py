"""A neighbour table: the rows a search takes, and the table over all rows from those over distinct ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tdgeom.core.devices import has_float64
from tdgeom.core.warnings import tell
from tdgeom.measures.neighbors.distance_gradient import directions
from tdgeom.numerics.centring import real_rows, refuse_nonfinite, upcast
from tdgeom.numerics.copies import expand_table, first_copies, standing
from tdgeom.numerics.near_copies import rounding_radius

__all__ = [
    "Found",
    "Leaves",
    "Neighbors",
    "check_rows",
    "empty_leaves",
    "leaves_from",
    "minkowski",
    "searchable",
]

# The largest value of a row lies between them; squares of differences between rows are then numbers.
_SMALLEST, _LARGEST = 1e-140, 1e150


class Neighbors(NamedTuple):
    """A neighbour table: what ``nearest_neighbors`` returns, in the order that ``NearestNeighbors`` writes."""

    distance: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which means nothing for a table
    distinct_distance: Tensor
    duplicates: Tensor
    near_duplicates: Tensor
    tied_beyond: Tensor


# What a search finds: over all rows distance and index (*B, N, k); among first occurrences the same two (NaN and 0 where
# there is nothing); the number of later copies (*B,), and of those that are copies up to rounding; whether another row lies at
# the last distance (*B, N).
Leaves = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Found = tuple[
    Tensor, Tensor, Tensor
]  # distances and indices (b, n, k), whether another lies at the last distance (b, n)


def minkowski(metric: str | float) -> tuple[float, bool]:
    """The exponent p of a metric's distance, and whether it is one between directions."""
    if metric in ("euclidean", "cosine"):
        return 2.0, metric == "cosine"
    if isinstance(metric, (int, float)) and not isinstance(metric, bool) and metric >= 1:
        return float(metric), False
    raise ValueError(
        f"metric is 'euclidean', 'cosine' or a number p >= 1 (math.inf included) for Minkowski's distance, got {metric!r}."
    )


def check_rows(x: Tensor, k: int) -> tuple[Tensor, float]:
    """(*B, N, D) in float32 or float64, of which each row can have k neighbours, and the share by which copies may differ."""
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
    rows = rows if has_float64(rows.device) else rows.cpu()
    return rows, rounding_radius(x.dtype)


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
    search: Callable[[Tensor, int, Tensor], Found],
    x: Tensor,
    cosine: bool,
    k: int,
    radius: float,
    over_all: bool,
    together: int,
) -> Leaves:
    """What ``search(rows (b, n, D) without copies, number, which data sets)`` finds, ``together`` data sets at a time.

    Rows closer than ``radius`` times their norm are no distinct rows. The table over all rows is that of the data as given,
    where only exact copies are at distance 0; unless it is asked for (``over_all``), the one among distinct rows stands there.
    """
    flat = searchable(x, cosine)
    b, n, _ = flat.shape
    own = torch.arange(n, device=x.device)
    first = first_copies(flat)
    exact, kept = first == own, standing(flat, first, radius) == own
    lead, shape = x.shape[:-2], (*x.shape[:-1], k)
    copies, near_copies = (~kept).sum(-1), (exact & ~kept).sum(-1)
    counts = copies.view(lead), near_copies.view(lead)
    if 0 < b <= together and not bool(
        copies.any()
    ):  # nothing to put together: a wide table is not copied about
        near, at, edge = search(flat, k, torch.arange(b, device=x.device))
        near, at = (near.square_().div_(2) if cosine else near).view(shape), at.view(shape)
        return near, at, near.clone(), at.clone(), *counts, edge.view(shape[:-1])
    distinct = torch.full((b, n, k), torch.nan, dtype=torch.float64, device=x.device)
    among = torch.zeros((b, n, k), dtype=torch.int64, device=x.device)
    tied = torch.zeros((b, n), dtype=torch.bool, device=x.device)
    distance, index = torch.empty_like(distinct), torch.empty_like(among)
    whole = kept.all(-1)
    for items in filter(len, (*whole.nonzero().flatten().split(together), *(~whole).nonzero())):
        rows = flat if len(items) == b else flat[items]
        if bool(whole[items[0]]):
            near, at, edge = search(rows, k, items)
            distance[items], index[items], distinct[items], among[items] = near, at, near, at
            tied[items] = edge
            continue
        at = kept[items[0]].nonzero().flatten()
        found = _searched(search, rows[:, at], k, items)
        fewer = found[0].shape[-1]
        _warn_unresolved(flat[items[0], at], found[0], radius, int(near_copies[items[0]]))
        distinct[items, at, :fewer], among[items, at, :fewer] = found[0], at[found[1]]
        if not over_all:
            distance[items], index[items], tied[items, at] = distinct[items], among[items], found[2]
            continue
        if not torch.equal(exact[items], kept[items]):
            found = _searched(search, rows[:, exact[items[0]]], k, items)
        distance[items], index[items], tied[items] = expand_table(first[items[0]], *found, k)
    if cosine:
        distance, distinct = distance.square() / 2, distinct.square() / 2
    tables = (leaf.view(shape) for leaf in (distance, index, distinct, among))
    return *tables, *counts, tied.view(shape[:-1])


def _warn_unresolved(rows: Tensor, near: Tensor, radius: float, copies: int) -> None:
    """Say so where neighbours go on just beyond the distance of copies: then rows were left out that are none."""
    if not copies or not near.shape[-1]:
        return
    size = torch.linalg.vector_norm(rows.double(), dim=-1)
    beyond = int((near[:, 0] <= 2 * radius * size).sum())
    if beyond > copies:
        tell(
            f"nearest neighbours: {copies} rows are left out as copies up to rounding (within {radius:.1e} of their norm), but "
            f"{beyond} of the {len(rows)} others have a neighbour within twice that, so that some of them may be no copies: "
            f"these rows lie as close as their precision can tell. Capture them in float32 (or float64).",
            UserWarning,
        )


def _searched(search: Callable[[Tensor, int, Tensor], Found], rows: Tensor, k: int, items: Tensor) -> Found:
    """The k nearest, or all there are, among the distinct rows (1, n, D) of one data set: (n, <= k), (n, <= k), (n,)."""
    n = rows.shape[1]
    if n > 1:
        near, at, tied = search(rows, min(k, n - 1), items)
        return near[0], at[0], tied[0]
    nothing = torch.empty((1, 0), dtype=torch.float64, device=rows.device)
    return nothing, nothing.long(), torch.zeros(1, dtype=torch.bool, device=rows.device)


def empty_leaves(x: Tensor, p: float, cosine: bool, k: int, *settings: Any) -> Leaves:
    """Leaves of the right shapes, for tracing."""
    shape = (*x.shape[:-1], k)
    distance, index = x.new_empty(shape, dtype=torch.float64), x.new_empty(shape, dtype=torch.int64)
    copies = x.new_empty(x.shape[:-2], dtype=torch.int64)
    tied = x.new_empty(x.shape[:-1], dtype=torch.bool)
    return (
        distance,
        index,
        torch.empty_like(distance),
        torch.empty_like(index),
        copies,
        torch.empty_like(copies),
        tied,
    )
