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
    budget,
    centred,
    key_error,
    key_of,
    keys_between,
    pair_distances,
)

__all__ = ["search_distinct", "search_rows_exactly"]

_GROUP = 32  # keys per minimum


def search_distinct(
    x: Tensor,
    k: int,
    *,
    p: float = 2.0,
    block: int | None = None,
    memory: int | None = None,
    keep: bool = False,
    also: Callable[[Tensor, slice, slice], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest other rows of each row: float64 distances (b, n, k) ascending and indices, ties by index.

    ``x`` (b, n, D) of float32 or float64 without exact copies, k < n. ``also`` is shown every block of keys, and may
    keep it if ``keep``.
    """
    b, n, _ = x.shape
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
) -> tuple[Tensor, Tensor]:
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
    distance, where = distance[..., :k], where.gather(-1, order)[..., :k]
    exact = key_of(distance[..., -1] / scale[:, None], p)
    reach = (2 * exact).sqrt() if p == 2 else exact
    proven = torch.minimum(limit, edge + 3 * error) - key_error(size, reach, width, p, torch.float32) > exact
    proven &= known
    distance, where = distance.contiguous(), where.contiguous()
    for item in (~proven.all(-1)).nonzero().flatten().tolist():
        left = (~proven[item]).nonzero().flatten()
        distance[item, left], where[item, left] = search_rows_exactly(x[item], left, k, p=p, memory=memory)
    return distance, where


def search_rows_exactly(
    x: Tensor, which: Tensor, k: int, *, p: float, memory: int | None
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of ``x`` (n, D) to each row in ``which``, in float64, every tie at the edge opened."""
    n, width = x.shape
    full = x.double()
    full = full - full.mean(0)
    scale = torch.linalg.vector_norm(full, dim=-1).square().mean().sqrt()
    full /= scale
    size = torch.linalg.vector_norm(full, dim=-1)
    distances, indices = [], []
    step = max(1, budget(memory) // (32 * n))
    for part in which.split(step):
        keys = torch.empty((1, len(part), n), dtype=torch.float64, device=x.device)
        half = size.square() / 2 if p == 2 else torch.zeros_like(size)
        keys_between(full[part][None], full[None], half[part][None], half[None], p, out=keys)
        keys = keys[0]
        keys[torch.arange(len(part), device=x.device), part] = torch.inf
        near = keys.topk(k, dim=-1, largest=False).indices
        direct = pair_distances(x, part.repeat_interleave(k), near.flatten(), p=p, memory=memory)
        reach = direct.view(-1, k).amax(-1) / scale  # at least the k-th distance
        edge = key_of(reach, p) + 2 * key_error(size[part], reach, width, p, torch.float64)
        row, index = (keys <= edge.unsqueeze(-1)).nonzero(as_tuple=True)
        direct = pair_distances(x, part[row], index, p=p, memory=memory)
        # Entries stand by row and index: two stable sorts order them by row, distance, index.
        order = direct.argsort(stable=True)
        order = order[row[order].argsort(stable=True)]
        count = torch.bincount(row, minlength=len(part))
        first = count.cumsum(0) - count
        pick = order[first.unsqueeze(-1) + torch.arange(k, device=x.device)]
        distances.append(direct[pick])
        indices.append(index[pick])
    return torch.cat(distances), torch.cat(indices)
