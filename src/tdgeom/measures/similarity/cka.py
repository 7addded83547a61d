"""Linear centred kernel alignment, biased and debiased, from rows or from moments."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.core.stage import PairStage
from tdgeom.measures.similarity.projected_cka import block_squares, group_traces, ratio_over_groups
from tdgeom.numerics.centring import as_rows, centre, check_matched, warn_undefined
from tdgeom.numerics.products import gram

__all__ = ["RV", "LinearCKA", "linear_cka", "linear_cka_debiased", "rv_coefficient"]

_REASON = "one side has no variance over the rows (or values that are not finite)."
_REASON_DEBIASED = (
    "it needs 4 rows or more, and on each side an unbiased HSIC with itself above 0 (a side without "
    "variance, or too few rows for it, has none)."
)


_LARGEST = 8  # features a side whose products are always float64


class _Side(NamedTuple):
    """What one side contributes: centred rows, or where N < D their Gram matrix without its diagonal."""

    rows: Tensor
    gram: Tensor | None
    norm2: Tensor  # (..., N) squared row norms, float64
    sums: Tensor  # (..., N) sum over j != i of K_ij, float64
    off: Tensor  # sum over i != j of K_ij², float64
    largest: Tensor  # (..., m) the features of most variance


def _prepare(x: Tensor, measure: str) -> _Side:
    x = as_rows(x, measure)
    few = x.shape[-2] < x.shape[-1]
    rows = centre(x.double() if few else x).rows  # the fewer the rows, the more a massive one weighs
    norm2 = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64).square()
    if few:
        # The diagonal is the largest part of K when N < D: left out here, never subtracted later.
        product = rows @ rows.mT
        off = product - torch.diag_embed(torch.diagonal(product, dim1=-2, dim2=-1))
        largest = _most_varied(rows.detach().square().sum(-2))
        return _Side(rows, off, norm2, off.sum(-1, dtype=torch.float64), _square_sum(off), largest)
    # -norm2 but for what rounding left of the rows' mean, which beside a massive row is not small
    rest = rows.sum(-2, dtype=torch.float64).to(rows.dtype)
    sums = (rows @ rest.unsqueeze(-1)).squeeze(-1) - norm2
    product = gram(rows)
    largest = _most_varied(product.detach().diagonal(dim1=-2, dim2=-1))
    side = _Side(rows, None, norm2, sums, norm2, largest)
    return side._replace(off=_product_sum(product, side, side) - norm2.square().sum(-1))


def _most_varied(variance: Tensor) -> Tensor:
    return variance.topk(min(_LARGEST, variance.shape[-1])).indices


def _square_sum(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=torch.float64).square()


def _product_sum(product: Tensor, a: _Side, b: _Side) -> Tensor:
    """||XᵀY||²_F in float64. Where a few features hold nearly all variance (a massive row will do), what its diagonal
    leaves of it is far smaller than float32's rounding: the products among each side's largest features are float64."""
    total = _square_sum(product)
    if product.dtype == torch.float64:
        return total
    lead, width = product.shape[:-2], product.shape[-1]  # of both sides together, where they are broadcast
    i, j = a.largest.unsqueeze(-1), b.largest.unsqueeze(-2)
    rounded = product.gather(-2, i.expand(*lead, i.shape[-2], width))
    rounded = rounded.gather(-1, j.expand(*lead, i.shape[-2], j.shape[-1]))
    return total - _square_sum(rounded) + _square_sum(_columns(a).mT @ _columns(b))


def _columns(side: _Side) -> Tensor:
    index = side.largest.unsqueeze(-2).expand(*side.rows.shape[:-1], side.largest.shape[-1])
    return side.rows.gather(-1, index).double()


def _off_product(a: _Side, b: _Side) -> Tensor:
    """Sum over i != j of K_ij L_ij."""
    if a.gram is not None and b.gram is not None:
        return (a.gram * b.gram).sum((-2, -1), dtype=torch.float64)
    dtype = torch.promote_types(a.rows.dtype, b.rows.dtype)
    return _product_sum(a.rows.to(dtype).mT @ b.rows.to(dtype), a, b) - (a.norm2 * b.norm2).sum(-1)


def _biased(cross: Tensor, self_a: Tensor, self_b: Tensor) -> Tensor:
    return cross / (self_a.sqrt() * self_b.sqrt())


def _hsic1_of(off: Tensor, a: _Side, b: _Side, n: int) -> Tensor:
    return _hsic1(off, (a.sums * b.sums).sum(-1), a.sums.sum(-1), b.sums.sum(-1), n)


def _hsic1(off: Tensor, sums_product: Tensor, sum_a: Tensor, sum_b: Tensor, n: Tensor | float) -> Tensor:
    """n(n-3) HSIC₁ of Song et al. from Σ_i≠j K_ij L_ij, Σ_i k_i l_i and the sums of k and l, the row sums without diagonal.

    For centred rows ``k_i = -|x_i|²``: only traces and diagonals are left.
    """
    return off + sum_a * sum_b / ((n - 1) * (n - 2)) - 2 / (n - 2) * sums_product


def _debiased(cross: Tensor, self_a: Tensor, self_b: Tensor) -> Tensor:
    value = cross / (self_a.sqrt() * self_b.sqrt())  # the root of a negative HSIC is NaN: undefined
    return torch.where((self_a > 0) & (self_b > 0), value, torch.nan)


def _compare_biased(a: _Side, b: _Side) -> Tensor:
    full = [off + (p.norm2 * q.norm2).sum(-1) for off, p, q in ((a.off, a, a), (b.off, b, b))]
    return _biased(_off_product(a, b) + (a.norm2 * b.norm2).sum(-1), *full)


def _compare_debiased(a: _Side, b: _Side) -> Tensor:
    n = a.norm2.shape[-1]
    if n < 4:
        return torch.full_like(a.off + b.off, torch.nan)
    pairs = ((_off_product(a, b), a, b), (a.off, a, a), (b.off, b, b))
    return _debiased(*(_hsic1_of(off, p, q, n) for off, p, q in pairs))


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA, biased: ``||XᵀY||²_F / (||XᵀX||_F ||YᵀY||_F)`` of centred rows. Alias: RV coefficient.

    Args:
        x: (..., N, D) rows. y: (..., N, E) the same rows on the other side. Half precision is upcast to
            float32, in which the products are taken (but for those of the largest features, and all where N < D); sums are
            float64.

    Returns:
        (...) float64 in [0, 1]; 1 for identical rows.

    Invariances: orthogonal maps and isotropic scale of either side, and offsets; not invertible linear
    maps. Bias: upwards when rows are few, about ``E/(N+E)`` for independent data (0.75 at N = 256, D = E =
    768): use ``linear_cka_debiased``. NaN with one warning where a side has no variance.

    Kornblith et al. 2019, arXiv 1905.00414; Robert & Escoufier 1976 (RV).

        >>> x = torch.eye(4, dtype=torch.float64)
        >>> round(float(linear_cka(x, 3 * x[:, [2, 0, 1, 3]] + 5)), 12)
        1.0
    """
    check_matched(x, y, "linear_cka")
    value = _compare_biased(_prepare(x, "linear_cka"), _prepare(y, "linear_cka"))
    return warn_undefined(value, "linear_cka", _REASON)


rv_coefficient = linear_cka
"""The RV coefficient is the same number as linear CKA: an alias."""


def linear_cka_debiased(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA from the unbiased HSIC₁ of Song et al. in the numerator and both denominators.

    With K = XXᵀ, L = YYᵀ and their diagonals set to zero (K̃, L̃),
    ``HSIC₁ = [tr K̃L̃ + 1ᵀK̃1 1ᵀL̃1/((n-1)(n-2)) - 2/(n-2) 1ᵀK̃L̃1] / (n(n-3))`` and the value is
    ``HSIC₁(K, L)/sqrt(HSIC₁(K, K) HSIC₁(L, L))``. For centred rows ``K1 = 0``, so this needs ``||XᵀY||²_F``
    and ``Σ|x|²|y|²`` only, and no N x N matrix.

    Args:
        x: (..., N, D) rows. y: (..., N, E) the same rows on the other side.

    Returns:
        (...) float64, at most about 1; around 0, and then also below, for independent rows at any N: never
        clamped.

    Invariances: orthogonal maps and isotropic scale of either side, and offsets; not invertible linear
    maps. Bias: HSIC₁ has none, its ratio only at second order. NaN with one warning below 4 rows or where a
    side has no variance.

    Song et al. 2012, JMLR 13; Nguyen et al. 2021, arXiv 2010.15327; Murphy et al. 2024, arXiv 2405.01012.

        >>> x = torch.randn(256, 768, generator=torch.Generator().manual_seed(0))
        >>> y = torch.randn(256, 768, generator=torch.Generator().manual_seed(1))
        >>> round(float(linear_cka(x, y)), 1), abs(float(linear_cka_debiased(x, y))) < 0.02
        (0.8, True)
    """
    check_matched(x, y, "linear_cka_debiased")
    value = _compare_debiased(_prepare(x, "linear_cka_debiased"), _prepare(y, "linear_cka_debiased"))
    return warn_undefined(value, "linear_cka_debiased", _REASON_DEBIASED)


class _Moments(NamedTuple):
    """One side from moments: n, trace of XᵀX, ||XᵀX||²_F and Σ|x|⁴ (of a sketch, by groups)."""

    count: Tensor
    trace: Tensor
    square: Tensor
    norm4: Tensor


class LinearCKA(PairStage):
    """Linear CKA between two sites: ``linear_cka`` and ``linear_cka_debiased`` as a stage.

    Args:
        estimator: ``"biased"`` writes ``linear_cka``, ``"debiased"`` ``linear_cka_debiased``, ``"both"`` both.
        source: ``"sample"`` reads matched rows, (N, D) and (N, E). ``"moments"`` reads the leaves of
            ``StreamingCrossMoments``, so that the value is exact over all rows of the run; per side
            ``count``, ``covariance``, ``norm4``, then the pair's ``cross_covariance`` and
            ``norm2_product``. ``"sketch"`` reads the same leaves of ``StreamingCrossMoments(..., sketch=)``
            and writes, behind each value, ``<name>_standard_error``: that of the random projection (all
            rows are used, so there is no other).
        in_keys, out_keys: see ``Stage``.

        >>> x = torch.randn(50, 8)
        >>> round(float(LinearCKA()(sample_a=x, sample_b=2 * x + 1)), 6)
        1.0
    """

    _ESTIMATORS: ClassVar[dict[str, list[str]]] = {
        "biased": ["linear_cka"],
        "debiased": ["linear_cka_debiased"],
        "both": ["linear_cka", "linear_cka_debiased"],
    }

    def __init__(
        self,
        *,
        estimator: Literal["biased", "debiased", "both"] = "biased",
        source: Literal["sample", "moments", "sketch"] = "sample",
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        if estimator not in self._ESTIMATORS:
            raise ValueError(f"LinearCKA: estimator is one of {list(self._ESTIMATORS)}, got {estimator!r}.")
        self.measures = self._ESTIMATORS[estimator]
        if source not in ("sample", "moments", "sketch"):
            raise ValueError(f"LinearCKA: source is 'sample', 'moments' or 'sketch', got {source!r}.")
        reads = _moment_leaves(source)
        if source == "sample":
            reads = {("sample", "a"): "N D", ("sample", "b"): "N E"}
        self.source = source
        suffixes = ("", "_standard_error") if source == "sketch" else ("",)
        writes = [("between", name + suffix) for name in self.measures for suffix in suffixes]
        super().__init__(in_keys=in_keys, out_keys=out_keys, reads=reads, writes=writes)

    def prepare(self, *inputs: Tensor) -> Any:
        """Centre, scale and the site's own product: once per site."""
        if self.source == "sample":
            return _prepare(inputs[0], "LinearCKA")
        count, covariance, norm4 = inputs
        count = count.to(torch.float64)
        scatter = covariance.to(torch.float64) * (count - 1)[..., None, None]
        if self.source == "sketch":
            groups = norm4.shape[-1]
            return _Moments(count, group_traces(scatter, groups), block_squares(scatter, groups), norm4)
        _refuse_sketch(norm4)
        trace = torch.diagonal(scatter, dim1=-2, dim2=-1).sum(-1)
        return _Moments(count, trace, _square_sum(scatter), norm4)

    def compare(self, a: Any, b: Any, *rest: Tensor) -> dict[str, Tensor]:
        """One product, and sums of float64 scalars."""
        if self.source == "sample":
            found = {name: (_SAMPLE[name](a, b),) for name in self.measures}
        elif self.source == "moments":
            cross = _square_sum(rest[0].to(torch.float64)) * (a.count - 1).square()
            found = {name: (_MOMENTS[name](a, b, cross, rest[1]),) for name in self.measures}
        else:
            found = {name: _sketched(a, b, *rest, debiased=name != "linear_cka") for name in self.measures}
        values = {}
        for name, (value, *error) in found.items():
            reason = _REASON if name == "linear_cka" else _REASON_DEBIASED
            values[name] = warn_undefined(value, name, reason)
            values.update({f"{name}_standard_error": e for e in error})
        return values


def _moment_leaves(source: str) -> dict[Key, str]:
    table = "G G" if source == "sketch" else ""
    sides = {
        ("cross_moments", side, leaf): shape
        for side, letter in (("a", "D"), ("b", "E"))
        for leaf, shape in (("count", ""), ("covariance", f"{letter} {letter}"), ("norm4", table))
    }
    pair = {("cross_moments", "cross_covariance"): "D E", ("cross_moments", "norm2_product"): table}
    return {**sides, **pair}


def _refuse_sketch(norm4: Tensor) -> None:
    # Exact moments of a batch of data sets would have a batch of counts too, which then broadcasts; a sketch has not.
    if norm4.ndim >= 2 and norm4.shape[-1] == norm4.shape[-2]:
        raise ValueError(
            f"LinearCKA reads norm4 of shape {tuple(norm4.shape)}, a table over groups of projections: these are the "
            f"leaves of a sketch. Take source='sketch'."
        )


def _biased_from_moments(a: _Moments, b: _Moments, cross: Tensor, norm2_product: Tensor) -> Tensor:
    return _biased(cross, a.square, b.square)


def _debiased_from_moments(a: _Moments, b: _Moments, cross: Tensor, norm2_product: Tensor) -> Tensor:
    pairs = ((cross, norm2_product, a, b), (a.square, a.norm4, a, a), (b.square, b.norm4, b, b))
    value = _debiased(*(_hsic1(square - s, s, p.trace, q.trace, a.count) for square, s, p, q in pairs))
    return torch.where(a.count >= 4, value, torch.nan)


_SAMPLE = {"linear_cka": _compare_biased, "linear_cka_debiased": _compare_debiased}
_MOMENTS = {"linear_cka": _biased_from_moments, "linear_cka_debiased": _debiased_from_moments}


def _sketched(
    a: _Moments, b: _Moments, cross_covariance: Tensor, norm2_product: Tensor, *, debiased: bool
) -> tuple[Tensor, ...]:
    groups = norm2_product.shape[-1]
    cross = (
        block_squares(cross_covariance.to(torch.float64), groups) * (a.count - 1).square()[..., None, None]
    )
    pairs = ((cross, norm2_product, a, b), (a.square, a.norm4, a, a), (b.square, b.norm4, b, b))
    if not debiased:
        return ratio_over_groups(*(square for square, *_ in pairs))
    n = a.count[..., None, None]
    tables = (
        _hsic1(square - s, s, p.trace.unsqueeze(-1), q.trace.unsqueeze(-2), n) for square, s, p, q in pairs
    )
    return tuple(torch.where(a.count >= 4, x, torch.nan) for x in ratio_over_groups(*tables))


RV = LinearCKA
"""The RV coefficient is the same number as linear CKA: an alias."""
