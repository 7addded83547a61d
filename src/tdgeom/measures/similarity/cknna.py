"""Centred kernel alignment restricted to nearest neighbours (CKNNA)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tdgeom.core.keys import Keys
from tdgeom.core.pair_stage import PairStage
from tdgeom.measures.similarity.hsic import alignment, hsic1
from tdgeom.measures.similarity.pair_sources import MATCHED_ROWS
from tdgeom.numerics.centring import check_matched, finite_rows, warn_undefined

__all__ = ["CKNNA", "cknna"]

_BLOCK = 2048
_REASON = (
    "one side's HSIC with itself over its own neighbours is not above 0, or there are fewer than 4 rows."
)


class _Neighbours(NamedTuple):
    """The k largest inner products of each row, self excluded."""

    near: Tensor  # (..., N, k) which rows
    value: Tensor  # (..., N, k) float64
    own: Tensor  # (...) unbiased HSIC of the masked kernel with itself


def _neighbours(x: Tensor, k: int, measure: str) -> _Neighbours:
    rows = finite_rows(x, measure).double()
    n = rows.shape[-2]
    if not 2 <= k < n:
        raise ValueError(f"{measure}: k counts neighbours, expected 2 <= k < N = {n}, got {k}.")
    rows = rows / rows.abs().amax(
        (-2, -1), keepdim=True
    )  # an isotropic scale cancels, and squares stay in range
    tops = []
    for start in range(0, n, _BLOCK):
        block = rows[..., start : start + _BLOCK, :] @ rows.mT
        here = torch.arange(start, start + block.shape[-2], device=x.device).unsqueeze(-1)
        tops.append(block.scatter(-1, here.expand(*block.shape[:-1], 1), -torch.inf).topk(k, dim=-1))
    near, value = (torch.cat([top[part] for top in tops], -2) for part in (1, 0))
    side = _Neighbours(near, value, value.new_zeros(()))
    return side._replace(own=_hsic(side, side))


def _hsic(a: _Neighbours, b: _Neighbours) -> Tensor:
    """n(n-3) HSIC₁ of K and L on the pairs (i, j) where j is a neighbour of i on both sides; never N x N.

    The mask is not symmetric, so the transposes of the formula are kept: ``Σ K∘Lᵀ`` and ``Σ KL``.
    """
    n, k = a.near.shape[-2:]
    lead = torch.broadcast_shapes(a.near.shape[:-2], b.near.shape[:-2])
    row = torch.arange(n, device=a.near.device).unsqueeze(-1) * n
    (wanted, k_values), (given, l_values) = (
        [part.expand(*lead, n, k).flatten(-2) for part in (side.near + row, side.value)] for side in (a, b)
    )
    mutual, l_values = _looked_up(wanted, given, l_values)
    k_values, l_values = torch.where(mutual, k_values, 0), torch.where(mutual, l_values, 0)
    i, j = wanted // n, wanted % n
    found, turned = _looked_up(j * n + i, wanted, l_values)  # L_ji
    trace = torch.where(found, k_values * turned, 0).sum(-1)
    columns = k_values.new_zeros(*lead, n).scatter_add(-1, j, k_values)
    middle = (columns * l_values.unflatten(-1, (n, k)).sum(-1)).sum(-1)
    return hsic1(trace, middle, k_values.sum(-1), l_values.sum(-1), n)


def _looked_up(wanted: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each wanted number (..., M) is among different keys (..., M), and the value at that key (else any)."""
    keys, order = keys.sort(-1)
    place = torch.searchsorted(keys.contiguous(), wanted.contiguous()).clamp(max=keys.shape[-1] - 1)
    return keys.gather(-1, place) == wanted, values.gather(-1, order.gather(-1, place))


def _compare(a: _Neighbours, b: _Neighbours) -> Tensor:
    value = alignment(_hsic(a, b), a.own, b.own)
    value = value if a.near.shape[-2] >= 4 else torch.full_like(value, torch.nan)
    return warn_undefined(value, "cknna", _REASON)


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

    def prepare(self, sample: Tensor) -> _Neighbours:
        """Neighbours and the site's own HSIC, once a site."""
        return _neighbours(sample, self.k, "CKNNA")

    def compare(self, a: _Neighbours, b: _Neighbours) -> Tensor:
        """Pairs that are neighbours on both sides: O(N k)."""
        return _compare(a, b)
