"""Centred kernel alignment restricted to nearest neighbours (CKNNA)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tdgeom.core.keys import Keys
from tdgeom.core.pair_stage import PairStage
from tdgeom.measures.neighbors.row_classes import (
    RowClasses,
    cells_of,
    grouped,
    meetings,
    repeats,
    single_rows,
)
from tdgeom.measures.neighbors.tie_weights import warn_of_ties
from tdgeom.measures.similarity.hsic import alignment, hsic1
from tdgeom.measures.similarity.pair_sources import MATCHED_ROWS
from tdgeom.numerics.centring import check_matched, finite_rows, occurs, warn_undefined

__all__ = ["CKNNA", "cknna"]

_BLOCK = 2048
_REASON = (
    "one side's HSIC with itself over its own neighbours is not above 0, or there are fewer than 4 rows."
)


class _Neighbours(NamedTuple):
    """The k largest inner products of each row, self excluded, and all that are as large as the k-th."""

    near: Tensor  # (..., N, K) which rows
    value: Tensor  # (..., N, K) float64
    weight: Tensor | None  # (..., N, K) of a neighbour, None if all are 1
    own: Tensor  # (...) unbiased HSIC of the masked kernel with itself
    ceiling: (
        Tensor  # (...) the measure of the side with itself, of which each draws its own places among ties
    )
    classes: list[_Classes] | None = (
        None  # of every data set, where rows repeat: ``near`` are then their numbers
    )


class _Classes(NamedTuple):
    """The same of one data set, among classes of rows that are copies of each other."""

    table: RowClasses
    value: Tensor  # (m, K) inner products with the classes of ``table.index``


def _neighbours(x: Tensor, k: int, measure: str) -> _Neighbours:
    rows = finite_rows(x, measure).double()
    n = rows.shape[-2]
    if not 2 <= k < n:
        raise ValueError(f"{measure}: k counts neighbours, expected 2 <= k < N = {n}, got {k}.")
    rows = rows / rows.abs().amax(
        (-2, -1), keepdim=True
    )  # an isotropic scale cancels, and squares stay in range
    size = torch.linalg.vector_norm(rows.detach(), dim=-1, keepdim=True)
    rounding = 1e-12 * size * size.amax(-2, keepdim=True)
    if repeats(rows):
        return _repeating(rows, k)
    width = (
        n - 1 if torch.compiler.is_compiling() else min(k + 1, n - 1)
    )  # a graph can't widen as it learns of ties
    while True:
        near, value = _largest(rows, width)
        weight = _weights(value.detach(), k, rounding)
        if width == n - 1 or not occurs(weight[..., -1] > 0):
            break
        width = min(16 * width, n - 1)
    plain = not (occurs(weight[..., :k] != 1) or torch.compiler.is_compiling())
    if plain:
        near, value = near[..., :k], value[..., :k]
    nothing = value.new_zeros(())
    side = _Neighbours(near, value, None if plain else weight, nothing, nothing)
    own = _hsic(side, side._replace(weight=None))  # a row's weight for itself is its mask once, not squared
    return side._replace(own=own, ceiling=torch.ones_like(own) if plain else _hsic(side, side) / own)


def _repeating(rows: Tensor, k: int) -> _Neighbours:
    """The same where rows repeat."""
    flat = rows.reshape(-1, *rows.shape[-2:])
    found = [_classes(one, k) for one in flat]
    own = torch.stack([_hsic_of_classes(one, one, once=True) for one in found])
    with_itself = torch.stack([_hsic_of_classes(one, one) for one in found])
    numbers = torch.stack([one.table.group for one in found]).view(*rows.shape[:-1], 1)
    own, ceiling = (value.view(rows.shape[:-2]) for value in (own, with_itself / own))
    return _Neighbours(numbers, numbers.double(), None, own, ceiling, found)


def _classes(rows: Tensor, k: int) -> _Classes:
    group, size, kept = grouped(rows)
    distinct = rows[kept]
    norm = torch.linalg.vector_norm(distinct, dim=-1, keepdim=True)
    rounding = 1e-12 * norm * norm.amax(-2, keepdim=True)

    def found(which: Tensor, width: int) -> tuple[Tensor, ...]:
        """Of some classes: the classes of the largest products, these, their weights, and whether others share in them."""
        product = distinct[which] @ distinct.mT
        own = which.unsqueeze(-1)
        product.scatter_(-1, own, torch.where(size[own] > 1, product.gather(-1, own), -torch.inf))
        value, near = product.sort(-1, descending=True) if width == len(size) else product.topk(width)
        count = torch.where(value > -torch.inf, size[near] - (near == own).long(), 0)
        value = torch.where(count > 0, value, 0.0)
        place = (count.cumsum(-1) < k).sum(-1, keepdim=True).clamp(max=width - 1)
        last = value.gather(-1, place)
        above, equal = value > last + rounding[which], (value - last).abs() <= rounding[which]
        left = k - (count * above).sum(-1, keepdim=True)
        share = left.double() / (count * equal).sum(-1, keepdim=True)
        weight = torch.where(count > 0, above.double() + torch.where(equal, share, 0.0), 0.0)
        return near, value, weight

    every, width = torch.arange(len(size), device=rows.device), min(k + 1, len(size))
    parts = [found(part, width) for part in every.split(_BLOCK)]
    near, value, weight = (torch.cat(part) for part in zip(*parts))
    open_ = (weight[:, -1] > 0).nonzero().flatten() if width < len(size) else every[:0]
    if len(open_):
        # all that is tied with them; the others name themselves in what they have more of columns
        more = len(size) - width
        near = torch.cat((near, every.unsqueeze(-1).expand(-1, more)), -1)
        value, weight = (torch.nn.functional.pad(part, (0, more)) for part in (value, weight))
        for part in open_.split(_BLOCK):
            near[part], value[part], weight[part] = found(part, len(size))
    return _Classes(RowClasses(group, size, near, weight), value)


def _largest(rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Which other rows have the largest inner products with each row, and these, descending."""
    tops = []
    for start in range(0, rows.shape[-2], _BLOCK):
        block = rows[..., start : start + _BLOCK, :] @ rows.mT
        here = torch.arange(start, start + block.shape[-2], device=rows.device).unsqueeze(-1)
        tops.append(block.scatter(-1, here.expand(*block.shape[:-1], 1), -torch.inf).topk(width, dim=-1))
    near, value = (torch.cat([top[part] for top in tops], -2) for part in (1, 0))
    return near, value


def _weights(value: Tensor, k: int, rounding: Tensor) -> Tensor:
    """1 above the k-th value, r/a for each of the a equal to it with r places left, 0 below."""
    last = value[..., k - 1 : k]
    above, equal = value > last + rounding, (value - last).abs() <= rounding
    share = (k - above.sum(-1, keepdim=True).double()) / equal.sum(-1, keepdim=True).double()
    return above.double() + torch.where(equal, share, 0.0)


def _hsic(a: _Neighbours, b: _Neighbours) -> Tensor:
    """n(n-3) HSIC₁ of α∘K and α∘L, α_ij the product of the weights that j has for i on both sides; N x N only if ties are.

    The mask is not symmetric, so the transposes of the formula are kept: ``Σ K∘Lᵀ`` and ``Σ KL``.
    """
    n = a.near.shape[-2]
    if a.classes or b.classes:
        lead = torch.broadcast_shapes(a.near.shape[:-2], b.near.shape[:-2])
        pairs = zip(*(_spread_classes(side, lead) for side in (a, b)))
        return torch.stack([_hsic_of_classes(*pair) for pair in pairs]).view(lead)
    if max(a.near.shape[-1], b.near.shape[-1]) > n // 16:
        return _dense_hsic(a, b)
    lead = torch.broadcast_shapes(a.near.shape[:-2], b.near.shape[:-2])
    row = torch.arange(n, device=a.near.device).unsqueeze(-1) * n

    def listed(part: Tensor) -> Tensor:
        return part.expand(*lead, n, part.shape[-1]).flatten(-2)

    wanted, k_values = listed(a.near + row), listed(a.value)
    mutual, place = _looked_up(wanted, listed(b.near + row))
    mask = mutual.double() if a.weight is None else torch.where(mutual, listed(a.weight), 0.0)
    mask = mask if b.weight is None else mask * listed(b.weight).gather(-1, place)
    k_values = torch.where(mutual, mask * k_values, 0)
    l_values = torch.where(mutual, mask * listed(b.value).gather(-1, place), 0)
    i, j = wanted // n, wanted % n
    found, place = _looked_up(j * n + i, wanted)
    trace = torch.where(found, k_values * l_values.gather(-1, place), 0).sum(-1)  # K_ij L_ji
    columns = k_values.new_zeros(*lead, n).scatter_add(-1, j, k_values)
    middle = (columns * l_values.unflatten(-1, (n, -1)).sum(-1)).sum(-1)
    return hsic1(trace, middle, k_values.sum(-1), l_values.sum(-1), n)


def _spread_classes(side: _Neighbours, lead: torch.Size) -> list[_Classes]:
    own, table = side.near.shape[:-2], side.near.shape[-2:]
    each = side.classes
    if each is None:
        near, value = side.near.reshape(-1, *table), side.value.reshape(-1, *table)
        weight = torch.ones_like(value) if side.weight is None else side.weight.reshape(-1, *table)
        each = [_Classes(single_rows(i, w), v) for i, v, w in zip(near, value, weight)]
    return [each[i] for i in torch.arange(len(each)).view(own).expand(lead).flatten().tolist()]


def _hsic_of_classes(a: _Classes, b: _Classes, *, once: bool = False) -> Tensor:
    """``_hsic`` of one data set; ``once``: the mask is a's own weights."""
    cells = cells_of(a.table, b.table)
    m, count = len(cells.count), cells.count
    p, q, i, j = (torch.cat(part) for part in zip(*meetings(a.table, b.table, cells)))
    mask = a.table.weight[cells.a[p], i]
    mask = mask if once else mask * b.table.weight[cells.b[p], j]
    k_values, l_values = mask * a.value[cells.a[p], i], mask * b.value[cells.b[p], j]
    itself = (p == q).long()
    pairs = count[p] * (count[q] - itself)  # of rows in p and q, a row and itself left out
    found, place = _looked_up(q * m + p, p * m + q)
    trace = torch.where(found, pairs * k_values * l_values[place], 0).sum()
    columns, rows = k_values.new_zeros(m), k_values.new_zeros(m)
    columns.index_add_(0, q, (count[p] - itself) * k_values)
    rows.index_add_(0, p, (count[q] - itself) * l_values)
    middle = (count * columns * rows).sum()
    return hsic1(trace, middle, (pairs * k_values).sum(), (pairs * l_values).sum(), len(cells.inverse))


def _dense_hsic(a: _Neighbours, b: _Neighbours) -> Tensor:
    """The same from N x N matrices, where neighbourhoods are not much smaller."""
    n = a.near.shape[-2]

    def matrix(side: _Neighbours, part: Tensor | None) -> Tensor:
        part = torch.ones_like(side.value) if part is None else part
        return part.new_zeros(*part.shape[:-1], n).scatter(-1, side.near, part)

    mask = matrix(a, a.weight) * matrix(b, b.weight)
    k_values, l_values = mask * matrix(a, a.value), mask * matrix(b, b.value)
    trace, middle = (k_values * l_values.mT).sum((-2, -1)), (k_values.sum(-2) * l_values.sum(-1)).sum(-1)
    return hsic1(trace, middle, k_values.sum((-2, -1)), l_values.sum((-2, -1)), n)


def _looked_up(wanted: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each wanted number (..., M) is among different keys (..., L), and where (else anywhere)."""
    keys, order = keys.sort(-1)
    place = torch.searchsorted(keys.contiguous(), wanted.contiguous()).clamp(max=keys.shape[-1] - 1)
    return keys.gather(-1, place) == wanted, order.gather(-1, place)


def _compare(a: _Neighbours, b: _Neighbours) -> Tensor:
    value = alignment(_hsic(a, b), a.own, b.own)
    warn_of_ties(torch.minimum(a.ceiling, b.ceiling).detach(), "cknna")
    value = value if a.near.shape[-2] >= 4 else torch.full_like(value, torch.nan)
    return warn_undefined(value, "cknna", _REASON)


def cknna(x: Tensor, y: Tensor, k: int = 10) -> Tensor:
    """CKNNA of Huh et al.: linear CKA (unbiased HSIC) over pairs that are neighbours on both sides.

    Formula:
        cknna = HSIC₁(α∘K, α∘L) / √(HSIC₁(w∘K, w∘K) HSIC₁(w'∘L, w'∘L)); ``K = XXᵀ``, ``L = YYᵀ``
        α_ij = w_ij w'_ij; w_ij = 1 where j is among the k rows of largest inner product with i in x, w'_ij the same in y

    Self is excluded; a rows as large as the k-th share the r places left, r/a each; each denominator goes over that side's own
    neighbours. With ties a side compared with itself is below 1, its ceiling; one warning says so
    below 0.98. Uncentred; Huh et al. give it rows of unit L2 norm (and then inner products order like distances): normalise
    first to compare with their numbers. No absolute 1e-6 in the denominator.

    Args:
        x: (..., N, D) rows. y: (..., N, E) the same rows on the other side. k: neighbours a row, 2 <= k < N.

    Returns:
        (...) float64, at most about 1; around 0 for independent rows. Not exactly symmetric: one row's neighbour need
        not be the other's, and the middle term of HSIC₁ tells rows from columns. Memory N·k.

    Invariances: orthogonal maps and isotropic scale of either side; not offsets, not invertible linear maps. Bias: HSIC₁
    has none on a fixed mask, and the mask of independent sides is nearly empty. NaN with one warning where a side's
    own HSIC is not above 0.

    Huh, Cheung, Wang & Isola 2024, arXiv 2405.07987.

        >>> x = torch.randn(30, 5, dtype=torch.float64)
        >>> round(float(cknna(x, 2 * x)), 9)
        1.0
    """
    check_matched(x, y, "cknna")
    return _compare(_neighbours(x, k, "cknna"), _neighbours(y, k, "cknna"))


class CKNNA(PairStage):
    """``cknna`` between two sites, k neighbours a row.

    >>> x = torch.randn(30, 5)
    >>> round(float(CKNNA()(sample_a=x, sample_b=-x)), 6)
    1.0
    """

    reads = MATCHED_ROWS
    writes = [("between", "cknna")]

    def __init__(self, *, k: int = 10, in_keys: Keys = None, out_keys: Keys = None) -> None:
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.k = k

    def prepare(self, sample: Tensor) -> _Neighbours:
        """Neighbours and the site's own HSIC, once a site."""
        return _neighbours(sample, self.k, "CKNNA")

    def reordered(self, side: _Neighbours, order: Tensor) -> _Neighbours | None:
        """A prepared side, its rows in another order (N,) int64; None where it must be prepared anew."""
        if side.classes is not None:
            return None
        near = torch.argsort(order)[side.near[..., order, :].long()].to(side.near.dtype)
        weight = None if side.weight is None else side.weight[..., order, :]
        return side._replace(near=near, value=side.value[..., order, :], weight=weight)

    def compare(self, a: _Neighbours, b: _Neighbours) -> Tensor:
        """Pairs that are neighbours on both sides: O(N k)."""
        return _compare(a, b)
