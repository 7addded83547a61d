"""Exact k nearest neighbours among distinct rows: the kernel of every neighbour-based measure.

Three steps follow the products of ``distance_blocks``:

1. *Candidates.* Each row keeps the m = k + spare smallest keys seen and a limit below which a key is of interest. The
   minimum over groups of keys is taken first (a pass at the speed of memory); only groups whose minimum lies below
   the limit are opened. A full top-k of every block would cost more than the products.
2. *Re-rank.* Candidates that rounding cannot exclude get their distance from differences of the given rows in
   float64.
3. *Proof.* Every key that was not kept is at least ``limit`` in float32. If that minus its rounding error is not
   above the k-th exact key, the row is searched again in float64 (``search_rows_exactly``), ties included.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tdgeom.measures.neighbors.distance_blocks import (
    KeyBlocks,
    centred,
    key_error,
    key_of,
    keys_between,
)
from tdgeom.measures.neighbors.neighbor_table import Found
from tdgeom.numerics.copies import SAME
from tdgeom.numerics.differences import budget, pair_distances

__all__ = ["search_distinct", "search_rows_exactly"]

_GROUP = 32  # keys per minimum
_WIDE = 80  # neighbours, from which one selection from float64 products is faster than candidates and proof
_ROWS = 512  # whose keys are selected from together on a CPU


def search_distinct(
    x: Tensor,
    k: int,
    *,
    p: float = 2.0,
    block: int | None = None,
    memory: int | None = None,
    keep: bool = False,
    also: Callable[[Tensor, slice, slice], None] | None = None,
) -> Found:
    """The k nearest other rows of each row: float64 distances (b, n, k) ascending, indices, ties by index, and (b, n) whether
    another row is as near as the last.

    ``x`` (b, n, D) of float32 or float64 without exact copies, k < n. ``also`` is shown every block of keys, and may
    keep it if ``keep``.
    """
    b, n, _ = x.shape
    if also is None and k >= _WIDE:
        own = torch.arange(n, device=x.device)
        found = [search_rows_exactly(rows, own, k, p=p, memory=memory) for rows in x]
        distance, index, tied = (torch.stack(leaf) if b > 1 else leaf[0].unsqueeze(0) for leaf in zip(*found))
        return distance, index, tied
    m = min(k + max(5, k // 4), n - 1)
    rows, scale = centred(x)
    blocks = KeyBlocks(rows, p, block=block, memory=memory)
    best = _Best(b, blocks.total, m, x.device)

    def both(keys: Tensor, mine: slice, other: slice) -> None:
        best.take(keys, mine, other)
        if also is not None:
            also(keys, mine, other)

    blocks.each(both, keep=keep)
    return _rerank(x, rows, scale, best, k, p, memory)


class _Best:
    """The m smallest keys of every row, whose they are, and the limit below which another key is of interest."""

    def __init__(self, b: int, total: int, m: int, device: torch.device) -> None:
        self.keys = torch.full((b, total, m), torch.inf, dtype=torch.float32, device=device)
        self.where = torch.zeros((b, total, m), dtype=torch.int64, device=device)
        self.limit = torch.full((b, total), torch.inf, dtype=torch.float32, device=device)

    def take(self, keys: Tensor, mine: slice, other: slice) -> None:
        """Look through a block of keys (b, R, C) for its rows and, as it is symmetric, for its columns."""
        self._absorb(keys, mine, other.start)
        if mine != other:
            self._absorb(keys, other, mine.start, columns=True)

    def _absorb(self, keys: Tensor, part: slice, start: int, *, columns: bool = False) -> None:
        """For the rows (or columns) at ``part``; ``start`` is the place in the data of the first of the other dimension."""
        limit, m, others = self.limit[:, part], self.keys.shape[-1], keys.shape[1 if columns else 2]
        group = _GROUP
        while group > 1 and (others % group or others // group < 4 * m):
            group //= 2
        if group == 1:
            return self._absorb_all(keys.mT if columns else keys, part, start)
        # Group g holds entries g, g + others/group, ...: each minimum then runs over whole lines of memory.
        if columns:
            grouped = keys.unflatten(1, (group, others // group))
            low = grouped.amin(1).mT.contiguous()
        else:
            grouped = keys.unflatten(2, (group, others // group))
            low = grouped.amin(2)
        if bool(torch.isinf(limit).any()):
            # The m-th smallest of the groups' minima bounds the m-th smallest entry from above.
            bound = low.topk(m, largest=False).values[..., -1]
            torch.minimum(limit, torch.nextafter(bound, torch.full_like(bound, torch.inf)), out=limit)
        item, row, at = (low < limit.unsqueeze(-1)).nonzero(as_tuple=True)
        opened = grouped[item, :, at, row] if columns else grouped[item, row, :, at]
        hit, place = (opened < limit[item, row].unsqueeze(-1)).nonzero(as_tuple=True)
        if hit.numel():
            index = at[hit] + place * (others // group) + start
            self._merge(item[hit] * self.limit.shape[1] + row[hit] + part.start, index, opened[hit, place])
        return None

    def _absorb_all(self, keys: Tensor, part: slice, start: int) -> None:
        """The same for few entries: one top-k of old and new."""
        best, where, m = self.keys[:, part], self.where[:, part], self.keys.shape[-1]
        low, at = keys.topk(min(m, keys.shape[-1]), dim=-1, largest=False)
        value, pick = torch.cat((best, low), -1).topk(m, dim=-1, largest=False)
        where.copy_(torch.cat((where, at + start), -1).gather(-1, pick))
        best.copy_(value)
        self.limit[:, part] = value[..., -1]

    def _merge(self, row: Tensor, column: Tensor, value: Tensor) -> None:
        """Merge entries (sorted by row, any number a row) into the m best of their rows."""
        m = self.keys.shape[-1]
        best, where, limit = self.keys.view(-1, m), self.where.view(-1, m), self.limit.view(-1)
        touched, count = torch.unique_consecutive(row, return_counts=True)
        first = count.cumsum(0) - count
        slot = torch.repeat_interleave(torch.arange(len(touched), device=row.device), count)
        place = m + torch.arange(len(row), device=row.device) - first[slot]
        width = m + int(count.max())
        values = value.new_full((len(touched), width), torch.inf)
        columns = column.new_zeros((len(touched), width))
        values[:, :m], columns[:, :m] = best[touched], where[touched]
        values[slot, place], columns[slot, place] = value, column
        values, pick = values.topk(m, dim=-1, largest=False)
        best[touched], where[touched] = values, columns.gather(-1, pick)
        limit[touched] = torch.minimum(limit[touched], values[:, -1])


def _rerank(
    x: Tensor, rows: Tensor, scale: Tensor, found: _Best, k: int, p: float, memory: int | None
) -> Found:
    b, n, width = x.shape
    size = torch.linalg.vector_norm(rows, dim=-1).double()
    best, where, limit = found.keys[:, :n], found.where[:, :n], found.limit[:, :n].double()
    if best.shape[-1] == n - 1:  # nothing was left out
        limit = torch.full_like(limit, torch.inf)
    edge = best[..., k - 1].double().clamp(min=0)
    known = torch.isfinite(edge)
    reach = torch.where(known, (2 * edge).sqrt() if p == 2 else edge, 0.0)
    error = key_error(size, reach * (1 + 1e-3), width, p, torch.float32)
    # What lies beyond the k-th key by more than both errors can't be among the k nearest.
    possible = (best <= (edge + 3 * error).unsqueeze(-1)) & known.unsqueeze(-1) & torch.isfinite(best)
    batch, row, place = possible.nonzero(as_tuple=True)
    index = where[batch, row, place]
    flat = x.reshape(b * n, width)
    distance = torch.full(best.shape, torch.inf, dtype=torch.float64, device=x.device)
    distance[batch, row, place] = pair_distances(flat, batch * n + row, batch * n + index, p=p, memory=memory)
    # Sorted by index first, so that the stable sort by distance leaves ties in the order of their index.
    where, order = where.sort(-1)
    distance, order = distance.gather(-1, order).sort(dim=-1, stable=True)
    tied = (distance[..., k : k + 1] <= SAME * distance[..., k - 1 : k]).any(-1)
    distance, where = distance[..., :k], where.gather(-1, order)[..., :k]
    exact = key_of(distance[..., -1] / scale[:, None], p)
    reach = (2 * exact).sqrt() if p == 2 else exact
    proven = torch.minimum(limit, edge + 3 * error) - key_error(size, reach, width, p, torch.float32) > exact
    proven &= known
    distance, where = distance.contiguous(), where.contiguous()
    for item in (~proven.all(-1)).nonzero().flatten().tolist():
        left = (~proven[item]).nonzero().flatten()
        distance[item, left], where[item, left], tied[item, left] = search_rows_exactly(
            x[item], left, k, p=p, memory=memory
        )
    return distance, where, tied


def search_rows_exactly(x: Tensor, which: Tensor, k: int, *, p: float, memory: int | None) -> Found:
    """The k nearest rows of ``x`` (n, D) to each row in ``which``, in float64, and whether another is as near as the last.

    Products order the rows. Their distances stand where rounding leaves them 12 digits; elsewhere, and where two keys are
    closer than their rounding, they are computed from differences, and every tie at the edge is opened.
    """
    n, width = x.shape
    full = x.double()
    full = full - full.mean(0)
    scale = torch.linalg.vector_norm(full, dim=-1).square().mean().sqrt()
    full /= scale
    size = torch.linalg.vector_norm(full, dim=-1)
    half = size.square() / 2 if p == 2 else torch.zeros_like(size)
    distance = torch.empty((len(which), k), dtype=torch.float64, device=x.device)
    index = torch.empty((len(which), k), dtype=torch.int64, device=x.device)
    tied = torch.zeros(len(which), dtype=torch.bool, device=x.device)
    step = max(1, min(budget(memory) // (32 * n), _ROWS if x.device.type == "cpu" else len(which)))
    keys = torch.empty((1, min(step, len(which)), n), dtype=torch.float64, device=x.device)
    for start in range(0, len(which), step):
        here = slice(start, start + step)
        part = which[here]
        own = keys[:, : len(part)]
        keys_between(full[part][None], full[None], half[part][None], half[None], p, out=own)
        own = own[0]
        own[torch.arange(len(part), device=x.device), part] = torch.inf
        most = min(k + 1, n - 1)
        # in full a sort is the faster selection
        low, near = own.sort(-1) if 2 * most > n else own.topk(most, dim=-1, largest=False)
        low, near = low[:, :most], near[:, :most]
        index[here] = near[:, :k]
        torch.mul(low[:, :k], 2 * scale.square() if p == 2 else scale, out=distance[here])
        if p == 2:
            distance[here].clamp_(min=0).sqrt_()
        last = low[:, k - 1]
        error = key_error(
            size[part], (2 * last.clamp(min=0)).sqrt() if p == 2 else last, width, p, torch.float64
        )
        gap = low.diff(dim=-1)
        edge = torch.zeros_like(tied[here])
        if low.shape[1] > k:
            edge = gap[:, -1] <= torch.maximum(2 * error, 4e-12 * last)
        unsure = (low[:, 0] * 1e-12 < error) | (gap[:, : k - 1] <= 2 * error.unsqueeze(-1)).any(-1)
        some = (unsure & ~edge).nonzero().flatten()
        if len(some):
            _measure_close_ones(
                x, part[some], low[some, :k], error[some], start + some, p, memory, distance, index
            )
        open_ = edge.nonzero().flatten()
        if len(open_):
            limit = last[open_] + torch.maximum(2 * error[open_], 4e-12 * last[open_])
            possible = own[open_] <= limit.unsqueeze(-1)
            _open_edges(x, part[open_], possible, start + open_, p, memory, distance, index, tied)
    return distance, index, tied


def _measure_close_ones(
    x: Tensor,
    part: Tensor,
    low: Tensor,
    error: Tensor,
    at: Tensor,
    p: float,
    memory: int | None,
    *found: Tensor,
) -> None:
    """Measure by differences, at the rows ``at`` of the leaves ``found``, what the keys ``low`` (r, k) do not settle."""
    distance, index = found
    error = error.unsqueeze(-1)
    unsure = low * 1e-12 < error
    close = low.diff(dim=-1) <= 2 * error
    unsure[:, 1:] |= close
    unsure[:, :-1] |= close
    row, place = unsure.nonzero(as_tuple=True)
    distance[at[row], place] = pair_distances(x, part[row], index[at[row], place], p=p, memory=memory)
    where, order = index[at].sort(-1)
    value, again = distance[at].gather(-1, order).sort(dim=-1, stable=True)
    distance[at], index[at] = value, where.gather(-1, again)


def _open_edges(
    x: Tensor, part: Tensor, possible: Tensor, at: Tensor, p: float, memory: int | None, *found: Tensor
) -> None:
    """Write to the rows ``at`` of the leaves ``found`` the nearest, to each row in ``part``, of the ``possible`` (r, n) rows."""
    distance, index, tied = found
    k = distance.shape[-1]
    row, other = possible.nonzero(as_tuple=True)
    direct = pair_distances(x, part[row], other, p=p, memory=memory)
    # Entries stand by row and index: two stable sorts order them by row, distance, index.
    order = direct.argsort(stable=True)
    order = order[row[order].argsort(stable=True)]
    count = torch.bincount(row, minlength=len(part))
    first = count.cumsum(0) - count
    pick = order[first.unsqueeze(-1) + torch.arange(k, device=x.device)]
    distance[at], index[at] = direct[pick], other[pick]
    last = direct[pick[:, -1]]
    tied[at] = torch.bincount(row[direct <= SAME * last[row]], minlength=len(part)) > k
