"""Exact k nearest neighbours among distinct rows: the kernel of every neighbour-based measure.

Four steps, in this order:

1. *Products.* Rows are centred, scaled to unit size and multiplied in float32, block by block: E =
(|x|²+|y|²)/2 - x·y, half
   the squared distance. E of blocks (i, j) serves the rows of i and, transposed, the rows of j: half the
   matrix is enough.
2. *Candidates.* Each row keeps the m = k + spare smallest entries seen and a limit below which an entry is of
interest.
   The minimum over groups of entries is taken first (a pass at the speed of memory); only groups whose
   minimum lies below the limit are opened. A full top-k of every block would cost more than the products.
3. *Re-rank.* Candidates that rounding cannot exclude get their distance from differences of the given rows in
float64.
4. *Proof.* Every entry that was not kept is at least ``limit`` in float32. If limit minus the rounding error
of such an entry is
   not above the k-th exact distance, the row is searched again in float64 (``search_rows_exactly``), ties
   included.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = [
    "MEMORY",
    "block_rows",
    "centred",
    "full_precision",
    "half_squares",
    "key_error",
    "key_of",
    "keys_of_blocks",
    "pair_distances",
    "search_distinct",
    "search_rows_exactly",
]

MEMORY = 256 * 2**20  # bytes of a search's working blocks when the caller names none
_CPU_BLOCK = 1536  # a block of products then stays in the last-level cache while it is looked through
_GROUP = 32  # entries per minimum
_UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast and no reduced-precision float32 products inside: the rounding bounds rely on it."""
    before = torch.get_float32_matmul_precision()
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            if before != "highest":
                torch.set_float32_matmul_precision("highest")
            yield
        finally:
            if before != "highest":
                torch.set_float32_matmul_precision(before)


def product_error(width: int, dtype: torch.dtype) -> float:
    """Relative rounding error of a product of ``width`` terms, as a share of |x||y|.

    The proven bound is width·u; the errors of the terms being independent, 4·sqrt(width)·u holds with
    overwhelming probability (Higham & Mary 2019). 16 u more for norms, sums and the rounding of the centred
    rows themselves.
    """
    return _UNIT[dtype] * (min(width, 4.0 * math.sqrt(width)) + 16.0)


def block_rows(n: int, batch: int, *, block: int | None, memory: int | None, device: torch.device) -> int:
    """Rows a block: the caller's, or as many as the budget allows (and the cache likes, on a CPU)."""
    if block is None:
        block = max(64, math.isqrt((MEMORY if memory is None else memory) // (8 * batch)))
        if device.type == "cpu":
            block = min(block, _CPU_BLOCK)
    parts = math.ceil(n / max(1, block))
    size = math.ceil(n / parts)
    return size if size <= 256 else math.ceil(size / 64) * 64


def search_distinct(
    x: Tensor, k: int, *, p: float = 2.0, block: int | None = None, memory: int | None = None
) -> tuple[Tensor, Tensor]:
    """The k nearest other rows of each row: float64 distances (b, n, k) ascending and indices, ties by index.

    ``x`` (b, n, D) of float32 or float64 without exact copies, k < n.
    """
    with full_precision(x.device):
        spare = max(8, k // 4)
        m = min(k + spare, x.shape[1] - 1)
        rows, scale = centred(x)
        best, where, limit = _candidates(rows, m, p=p, block=block, memory=memory)
        return _rerank(x, rows, scale, best, where, limit, k, p=p, memory=memory)


def centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows about (nearly) their mean, at most about 1 in size, in float32, and the factor (b,) undoing that.

    Any centre near the mean serves. For float32 rows a float32 centre makes the subtraction (nearly) exact,
    and a power of two as the factor loses no digit.
    """
    rows = x - x.mean(1, keepdim=True)
    low, high = torch.aminmax(rows.flatten(1), dim=1)
    scale = torch.maximum(high, -low).double()
    scale = torch.exp2(torch.where(scale > 0, scale, 1.0).log2().round())
    return rows.div_(scale[:, None, None].to(rows.dtype)).float(), scale


def _candidates(
    rows: Tensor, m: int, *, p: float, block: int | None, memory: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The m smallest keys of every row, where they are, and the limit that every other key is not below."""
    b, n, _ = rows.shape
    size = block_rows(n, b, block=block, memory=memory, device=rows.device)
    parts = math.ceil(n / size)
    total = parts * size
    half = torch.full(
        (b, total), torch.inf, device=rows.device
    )  # a padding row is infinitely far from every other
    half[:, :n] = half_squares(rows, p)
    if total > n:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, total - n))
    best = torch.full((b, total, m), torch.inf, device=rows.device)
    where = torch.zeros((b, total, m), dtype=torch.int64, device=rows.device)
    limit = torch.full((b, total), torch.inf, device=rows.device)
    keys = torch.empty((b, size, size), device=rows.device)
    for i in range(parts):
        mine = slice(i * size, (i + 1) * size)
        for j in range(i, parts):
            other = slice(j * size, (j + 1) * size)
            keys_of_blocks(rows[:, mine], rows[:, other], half[:, mine], half[:, other], p, out=keys)
            if i == j:
                keys.diagonal(dim1=1, dim2=2).fill_(torch.inf)
            else:
                _absorb(keys, best[:, other], where[:, other], limit[:, other], mine.start, columns=True)
            _absorb(keys, best[:, mine], where[:, mine], limit[:, mine], other.start)
    return best[:, :n], where[:, :n], limit[:, :n]


def half_squares(rows: Tensor, p: float) -> Tensor:
    """|x|²/2 (b, n) for Euclid, in which keys are half squared distances; nothing where keys are distances."""
    if p != 2:
        return rows.new_zeros(rows.shape[:-1])
    return torch.linalg.vector_norm(rows, dim=-1).square_().div_(2)


def keys_of_blocks(a: Tensor, b: Tensor, half_a: Tensor, half_b: Tensor, p: float, *, out: Tensor) -> None:
    torch.add(half_a.unsqueeze(-1), half_b.unsqueeze(-2), out=out)
    if p == 2:
        out.baddbmm_(a, b.mT, alpha=-1)
    else:
        out.add_(torch.cdist(a, b, p=p))


def _absorb(
    keys: Tensor, best: Tensor, where: Tensor, limit: Tensor, start: int, *, columns: bool = False
) -> None:
    """Take a block of keys (b, R, C) into the state of its rows (or of its columns), in place.

    ``start`` is the place in the data of the first of the other dimension.
    """
    m, others = best.shape[-1], keys.shape[1 if columns else 2]
    group = _GROUP
    while group > 1 and (others % group or others // group < 4 * m):
        group //= 2
    if group == 1:
        return _absorb_all(keys.mT if columns else keys, best, where, limit, start)
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
        _merge((item * limit.shape[1] + row)[hit], index, opened[hit, place], best, where, limit)
    return None


def _absorb_all(keys: Tensor, best: Tensor, where: Tensor, limit: Tensor, start: int) -> None:
    """The same for few entries: one top-k of old and new."""
    m = best.shape[-1]
    low, at = keys.topk(min(m, keys.shape[-1]), dim=-1, largest=False)
    value, pick = torch.cat((best, low), -1).topk(m, dim=-1, largest=False)
    where.copy_(torch.cat((where, at + start), -1).gather(-1, pick))
    best.copy_(value)
    limit.copy_(value[..., -1])


def _merge(row: Tensor, column: Tensor, value: Tensor, best: Tensor, where: Tensor, limit: Tensor) -> None:
    """Merge entries (sorted by row, any number a row) into the m best of their rows, in place."""
    r, m = best.shape[1:]
    touched, count = torch.unique_consecutive(row, return_counts=True)
    first = count.cumsum(0) - count
    slot = torch.repeat_interleave(torch.arange(len(touched), device=row.device), count)
    place = m + torch.arange(len(row), device=row.device) - first[slot]
    at = (touched // r, touched % r)
    width = m + int(count.max())
    values = value.new_full((len(touched), width), torch.inf)
    columns = column.new_zeros((len(touched), width))
    values[:, :m], columns[:, :m] = best[at], where[at]
    values[slot, place], columns[slot, place] = value, column
    values, pick = values.topk(m, dim=-1, largest=False)
    best[at], where[at] = values, columns.gather(-1, pick)
    limit[at] = torch.minimum(limit[at], values[:, -1])


def pair_distances(x: Tensor, i: Tensor, j: Tensor, *, p: float = 2.0, memory: int | None = None) -> Tensor:
    """|x_i - x_j| from float64 differences, for index lists into ``x`` (rows, D); symmetric to the bit."""
    out = torch.empty(len(i), dtype=torch.float64, device=x.device)
    budget = 2**22 if x.device.type == "cpu" else (MEMORY if memory is None else memory)
    step = max(1, budget // (16 * x.shape[-1]))
    for s in range(0, len(i), step):
        difference = x[i[s : s + step]].double().sub_(x[j[s : s + step]])
        torch.linalg.vector_norm(difference, ord=p, dim=-1, out=out[s : s + step])
    return out


def key_of(distance: Tensor, p: float) -> Tensor:
    return distance.square() / 2 if p == 2 else distance


def key_error(size: Tensor, reach: Tensor, width: int, p: float, dtype: torch.dtype) -> Tensor:
    """Rounding error of a key between a row of norm ``size`` and any row within ``reach`` of it.

    Such a row's norm is at most size + reach (a row beyond can't be a neighbour), and E's error at most
    gamma (|x|+|y|)²/2. Minkowski distances come from differences: their error is relative.
    """
    gamma = product_error(width, dtype)
    if p == 2:
        return gamma * (2 * size + reach).square() / 2
    root = math.sqrt(width)
    return 2 * gamma * reach + 2 * _UNIT[dtype] * root * (2 * size + root * reach)


def _rerank(
    x: Tensor,
    rows: Tensor,
    scale: Tensor,
    best: Tensor,
    where: Tensor,
    limit: Tensor,
    k: int,
    *,
    p: float,
    memory: int | None,
) -> tuple[Tensor, Tensor]:
    b, n, width = x.shape
    size = torch.linalg.vector_norm(rows, dim=-1).double()
    limit = limit.double()
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
    if bool(proven.all()):
        return distance.contiguous(), where.contiguous()
    distance, where = distance.contiguous(), where.contiguous()
    for item in range(b):
        left = (~proven[item]).nonzero().squeeze(-1)
        if len(left):
            distance[item, left], where[item, left] = search_rows_exactly(
                x[item], left, k, p=p, memory=memory
            )
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
    step = max(1, (MEMORY if memory is None else memory) // (32 * n))
    for part in which.split(step):
        keys = torch.empty((1, len(part), n), dtype=torch.float64, device=x.device)
        half = size.square() / 2 if p == 2 else torch.zeros_like(size)
        keys_of_blocks(full[part][None], full[None], half[part][None], half[None], p, out=keys)
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
