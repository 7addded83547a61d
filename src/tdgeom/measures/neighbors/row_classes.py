"""Rows that repeat as classes with a number of members: ties of a thousand zero rows cost what one row does.

All members of a class are as near to any row, so they share one weight, and a table among classes is as wide as the neighbours
asked for, however often rows repeat. What two sides share is counted among cells, the members that two classes have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tdgeom.measures.neighbors.neighbor_table import check_rows, minkowski, searchable
from tdgeom.measures.neighbors.search import search_distinct
from tdgeom.numerics.centring import holds
from tdgeom.numerics.copies import SAME, first_copies

__all__ = [
    "Cells", "RowClasses", "cells_of", "class_weights", "grouped", "meetings", "nearest_classes", "repeats", "single_rows",
    "sought_classes", "weight_in_common",
]  # fmt: skip

_ENTRIES = 2**22  # looked at together


@dataclass(frozen=True)
class RowClasses:
    """The classes of N rows, and the neighbouring classes of each with the weight of every member (not the row itself)."""

    group: Tensor  # (N,) the class of each row
    size: Tensor  # (m,) members
    index: Tensor  # (m, K) classes, a class itself among them
    weight: Tensor  # (m, K) float64


@dataclass(frozen=True)
class Cells:
    """The members that a class of one side has in common with one of the other: C of them."""

    inverse: Tensor  # (N,) the cell of each row
    count: Tensor  # (C,) members
    a: Tensor  # (C,) the class on one side
    b: Tensor  # (C,) and on the other


def repeats(x: Tensor) -> bool:
    """Whether some rows of (*B, N, D) are exact copies of others, as far as that can be looked at."""
    if torch.compiler.is_compiling() or x.requires_grad:
        return False
    return holds((first_copies(x) != torch.arange(x.shape[-2], device=x.device)).any())


def nearest_classes(x: Tensor, k: int, metric: str | float, memory: int | None) -> list[RowClasses]:
    """The classes of every data set of rows (*B, N, D), with their k nearest rows by distance."""
    p, cosine = minkowski(metric)
    found = []
    for rows in searchable(check_rows(x, k)[0], cosine):
        group, size, kept = grouped(rows)

        def search(width: int, distinct: Tensor = rows[kept]) -> tuple[Tensor, Tensor, Tensor]:
            near, at, tied = search_distinct(distinct.unsqueeze(0), width, p=p, memory=memory)
            return near[0], at[0], tied[0]

        found.append(sought_classes(search, group, size, k)[0])
    return found


def grouped(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The class (N,) of each row (N, D), their sizes (m,), and the first row (m,) of each."""
    kept, group = first_copies(rows).unique(return_inverse=True)
    return group, torch.bincount(group), kept


def sought_classes(
    search: Callable[[int], tuple[Tensor, Tensor, Tensor]], group: Tensor, size: Tensor, k: int
) -> tuple[RowClasses, Tensor]:
    """Classes with their weights, and the distances (m, K) of these, as wide as ties among distinct rows take.

    ``search(K)``: distances, classes (m, K) and whether another is as near as the last (m,), of the K nearest distinct rows.
    """
    m = len(size)
    own = torch.arange(m, device=size.device).unsqueeze(-1)
    distance, index, width = torch.zeros(m, 1, dtype=torch.float64, device=size.device), own, min(k, m - 1)
    while True:
        tied = torch.zeros(m, dtype=torch.bool, device=size.device)
        if width:
            near, at, tied = search(width)
            distance, index = torch.cat((distance[:, :1], near), -1), torch.cat((own, at), -1)
        count = size[index] - (index == own).long()
        weight, last = class_weights(distance, count, k)
        if width == m - 1 or not bool((last & tied).any()):
            return RowClasses(group, size, index, weight), distance
        width = min(16 * width, m - 1)


def class_weights(distance: Tensor, count: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor]:
    """As ``tie_weights``, where each entry stands for ``count`` rows (r, K): weights, and whether the last entry shares (r,)."""
    asked = torch.as_tensor(k, device=count.device).expand(len(count)).unsqueeze(-1)
    place = (count.cumsum(-1) < asked).sum(-1, keepdim=True).clamp(max=count.shape[-1] - 1)
    last = distance.gather(-1, place)
    inside = distance * SAME < last
    tied = ~inside & (distance <= last * SAME)
    left = asked - (count * inside).sum(-1, keepdim=True)
    share = left.double() / (count * tied).sum(-1, keepdim=True)
    weight = inside.double() + torch.where(tied, share, 0.0)
    return torch.where(count > 0, weight, 0.0), tied[:, -1]


def single_rows(index: Tensor, weight: Tensor | None) -> RowClasses:
    """A neighbour table (N, K) of rows that are each a class of their own."""
    own = torch.arange(len(index), device=index.device)
    weight = torch.ones_like(index) if weight is None else weight
    return RowClasses(own, torch.ones_like(own), index, weight.double())


def cells_of(a: RowClasses, b: RowClasses) -> Cells:
    """The cells of two sides' classes, in the order of both."""
    code, inverse, count = torch.unique(
        a.group * len(b.size) + b.group, return_inverse=True, return_counts=True
    )
    return Cells(inverse, count, code // len(b.size), code % len(b.size))


def meetings(a: RowClasses, b: RowClasses, cells: Cells) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Cells p and q, q among the neighbours of p on both sides, and where in the tables of p's classes; in blocks.

    Cells with few neighbours come first: one that is tied with all others makes no other wait.
    """
    total, other = len(cells.count), len(b.size)
    code = cells.a * other + cells.b
    wide_a, wide_b = (_width(side)[which] for side, which in ((a, cells.a), (b, cells.b)))
    order = (wide_a * wide_b).argsort()
    start = 0
    while start < total:
        # as many as their widest leaves room for
        here = order[start : start + _ENTRIES]
        pairs = (wide_a[here].cummax(0).values * wide_b[here].cummax(0).values).clamp(max=total)
        room = torch.arange(1, len(here) + 1, device=code.device) * pairs <= _ENTRIES
        here = here[: max(1, int(room.sum()))]
        start += len(here)
        mine, theirs = cells.a[here], cells.b[here]
        near_a = a.index[mine, : int(wide_a[here].max())]
        near_b = b.index[theirs, : int(wide_b[here].max())]
        if near_a.shape[1] * near_b.shape[1] <= total:
            wanted = (near_a * other).unsqueeze(-1) + near_b.unsqueeze(-2)
            q = torch.searchsorted(code, wanted).clamp(max=total - 1)
            weight_a, weight_b = a.weight[mine, : near_a.shape[1]], b.weight[theirs, : near_b.shape[1]]
            counts = (weight_a > 0).unsqueeze(-1) & (weight_b > 0).unsqueeze(-2)
            p, i, j = ((code[q] == wanted) & counts).nonzero(as_tuple=True)
            yield here[p], q[p, i, j], i, j
            continue
        place_a, place_b = (
            _places(side, near, of).index_select(1, which)
            for side, near, of, which in ((a, near_a, mine, cells.a), (b, near_b, theirs, cells.b))
        )
        p, q = ((place_a >= 0) & (place_b >= 0)).nonzero(as_tuple=True)
        yield here[p], q, place_a[p, q].long(), place_b[p, q].long()


def _width(side: RowClasses) -> Tensor:
    """(m,): up to where each class's table holds weight."""
    place = torch.arange(1, side.index.shape[1] + 1, device=side.index.device)
    return torch.where(side.weight > 0, place, 0).amax(-1)


def _places(side: RowClasses, near: Tensor, of: Tensor) -> Tensor:
    """(r, m): where in its table each class stands for the classes ``of`` (r,), -1 where nowhere."""
    place = torch.arange(near.shape[1], dtype=torch.int32, device=near.device).expand(near.shape)
    place = torch.where(side.weight[of, : near.shape[1]] > 0, place, -1)
    # a class that fills up a table names itself again, without weight
    return place.new_full((len(near), len(side.size)), -1).scatter_reduce(1, near, place, "amax")


def weight_in_common(a: RowClasses, b: RowClasses) -> tuple[Tensor, Tensor]:
    """Σ_j w_ij·w'_ij of every row, and the smaller of its Σ w² and Σ w'², (N,) each."""
    cells = cells_of(a, b)
    common = torch.zeros(len(cells.count), dtype=torch.float64, device=cells.count.device)
    for p, q, i, j in meetings(a, b, cells):
        both = a.weight[cells.a[p], i] * b.weight[cells.b[p], j]
        common.index_add_(0, p, both * (cells.count[q] - (p == q).long()))
    most = torch.minimum(*(_with_itself(side)[side.group] for side in (a, b)))
    return common[cells.inverse], most


def _with_itself(side: RowClasses) -> Tensor:
    own = torch.arange(len(side.size), device=side.size.device).unsqueeze(-1)
    return (side.weight.square() * (side.size[side.index] - (side.index == own).long())).sum(-1)
