"""Centred kernel alignment restricted to nearest neighbours (CKNNA)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tdgeom.core.keys import Keys
from tdgeom.core.pair_stage import PairStage
from tdgeom.measures.similarity.hsic import alignment, hsic1
from tdgeom.measures.similarity.pair_sources import MATCHED_ROWS
from tdgeom.numerics.centring import as_rows, check_matched, warn_undefined

__all__ = ["CKNNA", "cknna"]

_BLOCK = 2048
_REASON = (
    "one side's HSIC with itself over its own neighbours is not above 0, or there are fewer than 4 rows."
)


class _Neighbours(NamedTuple):
    """The k largest inner products of each row, self excluded."""

    near: Tensor  # (N, k) which rows
    value: Tensor  # (N, k) float64
    own: Tensor  # unbiased HSIC of the masked kernel with itself


class _Side(NamedTuple):
    """Every data set of one side, and how they are laid out."""

    items: list[_Neighbours]
    lead: tuple[int, ...]


def _neighbours(x: Tensor, k: int, measure: str) -> _Side:
    x = as_rows(x, measure)
    n = x.shape[-2]
    if not 2 <= k < n:
        raise ValueError(f"{measure}: k counts neighbours, expected 2 <= k < N = {n}, got {k}.")
    found = []
    for rows in x.reshape(-1, n, x.shape[-1]).double():
        rows = rows / rows.abs().max()  # an isotropic scale cancels in the ratio, and squares stay in range
        index, value = [], []
        for start in range(0, n, _BLOCK):
            block = rows[start : start + _BLOCK] @ rows.mT
            here = torch.arange(start, start + len(block), device=x.device)
            top = block.scatter(1, here[:, None], -torch.inf).topk(k, dim=1)
            index.append(top.indices)
            value.append(top.values)
        side = _Neighbours(torch.cat(index), torch.cat(value), rows.new_zeros(()))
        found.append(side._replace(own=_hsic(side, side)))
    return _Side(found, tuple(x.shape[:-2]))


def _hsic(a: _Neighbours, b: _Neighbours) -> Tensor:
    """n(n-3) HSIC₁ of K and L on the pairs (i, j) where j is a neighbour of i on both sides; never N x N.

    The mask is not symmetric, so the transposes of the formula are kept: ``Σ K∘Lᵀ`` and ``Σ KL``.
    """
    n = a.near.shape[0]
    if n < 4:
        return a.value.new_full((), torch.nan)
    keys, order = (b.near + torch.arange(n, device=b.near.device)[:, None] * n).flatten().sort()
    wanted = (a.near + torch.arange(n, device=a.near.device)[:, None] * n).flatten()
    place = torch.searchsorted(keys, wanted).clamp(max=keys.numel() - 1)
    mutual = keys[place] == wanted
    pair = wanted[mutual]
    k_values, l_values = a.value.flatten()[mutual], b.value.flatten()[order][place[mutual]]
    i, j = pair // n, pair % n
    # Σ K_ij L_ji: find each pair's transpose among the pairs
    pairs, order = pair.sort()
    turned = j * n + i
    place = torch.searchsorted(pairs, turned).clamp(max=max(pairs.numel() - 1, 0))
    if pairs.numel():
        both = pairs[place] == turned
        trace = (k_values[both] * l_values[order][place[both]]).sum()
    else:
        trace = k_values.sum()
    columns = k_values.new_zeros(n).index_add(0, j, k_values)
    rows = l_values.new_zeros(n).index_add(0, i, l_values)
    return hsic1(trace, columns @ rows, k_values.sum(), l_values.sum(), n)


def _compare(a: _Side, b: _Side) -> Tensor:
    lead = torch.broadcast_shapes(a.lead, b.lead)
    places = [
        torch.arange(len(side.items), device="cpu").reshape(side.lead).expand(lead).flatten()
        for side in (a, b)
    ]
    values = []
    for p, q in zip(*([side.items[i] for i in place] for side, place in zip((a, b), places))):
        values.append(alignment(_hsic(p, q), p.own, q.own))
    return warn_undefined(torch.stack(values).reshape(lead), "cknna", _REASON)


def cknna(x: Tensor, y: Tensor, k: int = 10) -> Tensor:
    """CKNNA of Huh et al.: linear CKA (unbiased HSIC) over pairs that are neighbours on both sides.

    With ``α_ij = 1`` where j is among the k rows of largest inner product with i in x and in y (self excluded),
    ``HSIC₁(α∘K, α∘L)/sqrt(HSIC₁(α_K∘K, α_K∘K) HSIC₁(α_L∘L, α_L∘L))``, K = XXᵀ, L = YYᵀ, and each denominator over
    that side's own neighbours. Uncentred; Huh et al. give it rows of unit L2 norm (and then inner products order like
    distances): normalise first to compare with their numbers. No absolute 1e-6 in the denominator.

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

    def prepare(self, sample: Tensor) -> _Side:
        """Neighbours and the site's own HSIC, once a site."""
        return _neighbours(sample, self.k, "CKNNA")

    def compare(self, a: _Side, b: _Side) -> Tensor:
        """Pairs that are neighbours on both sides: O(N k)."""
        return _compare(a, b)
