"""Linear centred kernel alignment, biased and debiased, from rows or from moments."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from tdgeom.similarity._inputs import as_rows, centre, check_matched, warn_undefined
from tdgeom.stage import Key, PairStage

__all__ = ["RV", "LinearCKA", "linear_cka", "linear_cka_debiased", "rv_coefficient"]

_REASON = "one side has no variance over the rows (or values that are not finite)."
_REASON_DEBIASED = (
    "it needs 4 rows or more, and on each side an unbiased HSIC with itself above 0 (a side without "
    "variance, or too few rows for it, has none)."
)


class _Side(NamedTuple):
    """What one side contributes: centred rows, or where N < D their Gram matrix without its diagonal."""

    rows: Tensor
    gram: Tensor | None
    norm2: Tensor  # (..., N) squared row norms, float64
    off: Tensor  # sum over i != j of K_ij², float64


def _prepare(x: Tensor, measure: str) -> _Side:
    rows = centre(as_rows(x, measure)).rows
    norm2 = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64).square()
    if rows.shape[-2] < rows.shape[-1]:
        # The diagonal is the largest part of K when N < D: left out here, never subtracted later.
        product = rows @ rows.mT
        gram = product - torch.diag_embed(torch.diagonal(product, dim1=-2, dim2=-1))
        return _Side(rows, gram, norm2, _square_sum(gram))
    return _Side(rows, None, norm2, _square_sum(rows.mT @ rows) - norm2.square().sum(-1))


def _square_sum(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=torch.float64).square()


def _off_product(a: _Side, b: _Side) -> Tensor:
    """Sum over i != j of K_ij L_ij."""
    if a.gram is not None and b.gram is not None:
        return (a.gram * b.gram).sum((-2, -1), dtype=torch.float64)
    dtype = torch.promote_types(a.rows.dtype, b.rows.dtype)
    return _square_sum(a.rows.to(dtype).mT @ b.rows.to(dtype)) - (a.norm2 * b.norm2).sum(-1)


def _biased(cross: Tensor, self_a: Tensor, self_b: Tensor) -> Tensor:
    return cross / (self_a.sqrt() * self_b.sqrt())


def _hsic1_of(off: Tensor, a: _Side, b: _Side, n: int) -> Tensor:
    return _hsic1(off, (a.norm2 * b.norm2).sum(-1), a.norm2.sum(-1), b.norm2.sum(-1), n)


def _hsic1(off: Tensor, norm2_product: Tensor, trace_a: Tensor, trace_b: Tensor, n: Tensor | float) -> Tensor:
    """n(n-3) HSIC₁ of Song et al. for centred rows, where K1 = 0 leaves only traces and diagonals."""
    return off + trace_a * trace_b / ((n - 1) * (n - 2)) - 2 / (n - 2) * norm2_product


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
            float32, in which the products are taken; sums are float64.

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
    """One side of ``source="moments"``: n, trace of XᵀX, ||XᵀX||²_F and Σ|x|⁴."""

    count: Tensor
    trace: Tensor
    square: Tensor
    norm4: Tensor


class LinearCKA(PairStage):
    """Linear CKA between two sites: ``linear_cka`` and ``linear_cka_debiased`` as a stage.

    Args:
        estimator: ``"biased"`` writes ``linear_cka``, ``"debiased"`` writes ``linear_cka_debiased``,
        ``"both"`` both. source: ``"sample"`` reads matched rows, (N, D) and (N, E). ``"moments"`` reads the
        leaves of
            ``StreamingCrossMoments``, so that the value is exact over all rows of the run; per side
            ``count``, ``covariance``, ``norm4``, then the pair's ``cross_covariance`` and
            ``norm2_product``.
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
        source: Literal["sample", "moments"] = "sample",
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        if estimator not in self._ESTIMATORS:
            raise ValueError(f"LinearCKA: estimator is one of {list(self._ESTIMATORS)}, got {estimator!r}.")
        self.measures = self._ESTIMATORS[estimator]
        if source == "sample":
            reads = {("sample", "a"): "N D", ("sample", "b"): "N E"}
        elif source == "moments":
            reads = {
                **{
                    ("cross_moments", side, leaf): shape
                    for side, letter in (("a", "D"), ("b", "E"))
                    for leaf, shape in (("count", ""), ("covariance", f"{letter} {letter}"), ("norm4", ""))
                },
                ("cross_moments", "cross_covariance"): "D E",
                ("cross_moments", "norm2_product"): "",
            }
        else:
            raise ValueError(f"LinearCKA: source is 'sample' or 'moments', got {source!r}.")
        self.source = source
        writes = [("between", name) for name in self.measures]
        super().__init__(in_keys=in_keys, out_keys=out_keys, reads=reads, writes=writes)

    def prepare(self, *inputs: Tensor) -> Any:
        """Centre, scale and the site's own product: once per site."""
        if self.source == "sample":
            return _prepare(inputs[0], "LinearCKA")
        count, covariance, norm4 = inputs
        count = count.to(torch.float64)
        scatter = covariance.to(torch.float64) * (count - 1)[..., None, None]
        trace = torch.diagonal(scatter, dim1=-2, dim2=-1).sum(-1)
        return _Moments(count, trace, _square_sum(scatter), norm4)

    def compare(self, a: Any, b: Any, *rest: Tensor) -> dict[str, Tensor]:
        """One product, and sums of float64 scalars."""
        if self.source == "sample":
            values = {
                "linear_cka": lambda: _compare_biased(a, b),
                "linear_cka_debiased": lambda: _compare_debiased(a, b),
            }
        else:
            cross, norm2_product = rest
            cross = _square_sum(cross.to(torch.float64)) * (a.count - 1).square()
            values = {
                "linear_cka": lambda: _biased(cross, a.square, b.square),
                "linear_cka_debiased": lambda: _debiased_from_moments(a, b, cross, norm2_product),
            }
        reasons = {"linear_cka": _REASON, "linear_cka_debiased": _REASON_DEBIASED}
        return {name: warn_undefined(values[name](), name, reasons[name]) for name in self.measures}


def _debiased_from_moments(a: _Moments, b: _Moments, cross: Tensor, norm2_product: Tensor) -> Tensor:
    pairs = ((cross, norm2_product, a, b), (a.square, a.norm4, a, a), (b.square, b.norm4, b, b))
    value = _debiased(*(_hsic1(square - s, s, p.trace, q.trace, a.count) for square, s, p, q in pairs))
    return torch.where(a.count >= 4, value, torch.nan)


RV = LinearCKA
"""The RV coefficient is the same number as linear CKA: an alias."""
