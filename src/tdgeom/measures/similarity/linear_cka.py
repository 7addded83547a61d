"""Linear centred kernel alignment, biased and debiased, from rows or from moments."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tdgeom.core.keys import Keys
from tdgeom.measures.similarity.enough_rows import tell_few_for_bias
from tdgeom.measures.similarity.hsic import alignment, hsic1
from tdgeom.measures.similarity.pair_sources import MomentPairStage, Source, refuse_sketch
from tdgeom.measures.similarity.projected_cka import block_squares, group_traces, ratio_over_groups
from tdgeom.numerics.centring import centre, check_matched, finite_rows, holds, warn_undefined
from tdgeom.numerics.forgetting import refuse_weighted
from tdgeom.numerics.hashing import fingerprint
from tdgeom.numerics.products import gram, in_own_precision

__all__ = ["RV", "LinearCKA", "linear_cka", "linear_cka_debiased", "rv_coefficient"]

_REASON = "one side has no variance over the rows."
_REASON_DEBIASED = (
    "it needs 4 rows or more, and on each side an unbiased HSIC with itself above 0 (a side without "
    "variance, or too few rows for it, has none)."
)


class _Side(NamedTuple):
    """What one side contributes: centred rows, or where N < D their Gram matrix without its diagonal. All in float64."""

    rows: Tensor
    gram: Tensor | None
    norm2: Tensor  # (..., N) squared row norms
    sums: Tensor  # (..., N) sum over j != i of K_ij
    off: Tensor  # sum over i != j of K_ij²


def _prepare(x: Tensor, measure: str, covariance: Tensor | None = None) -> _Side:
    """A side; of the covariance of these very rows only its square sum is taken."""
    # A massive row's fourth power would round all others away in float32.
    rows, scale = centre(finite_rows(x, measure).double())
    norm2 = torch.linalg.vector_norm(rows, dim=-1).square()
    if rows.shape[-2] < rows.shape[-1]:
        # The diagonal is the largest part of K when N < D: left out here, never subtracted later.
        product = rows @ rows.mT
        off = product - torch.diag_embed(torch.diagonal(product, dim1=-2, dim2=-1))
        return _Side(rows, off, norm2, off.sum(-1), _square_sum(off))
    # -norm2 but for what rounding left of the rows' mean
    sums = (rows @ rows.sum(-2).unsqueeze(-1)).squeeze(-1) - norm2
    if covariance is None:
        square = _square_sum(gram(rows))
    else:
        square = _square_sum(covariance.double() * ((rows.shape[-2] - 1) / scale.square())[..., None, None])
    return _Side(rows, None, norm2, sums, square - norm2.square().sum(-1))


def _square_sum(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=(-2, -1)).square()


def _off_product(a: _Side, b: _Side) -> Tensor:
    """Sum over i != j of K_ij L_ij."""
    if a.gram is not None and b.gram is not None:
        return (a.gram * b.gram).sum((-2, -1))
    return _square_sum(a.rows.mT @ b.rows) - (a.norm2 * b.norm2).sum(-1)


def _aligned(a: _Side, b: _Side, off: Tensor, name: str) -> Tensor:
    """Either estimate, from ``off = _off_product(a, b)``."""
    n = a.norm2.shape[-1]
    pairs = ((off, a, b), (a.off, a, a), (b.off, b, b))
    if name == "linear_cka":
        return alignment(*(o + (p.norm2 * q.norm2).sum(-1) for o, p, q in pairs))
    if n < 4:
        return torch.full_like(off, torch.nan)
    sums = ((o, (p.sums * q.sums).sum(-1), p.sums.sum(-1), q.sums.sum(-1)) for o, p, q in pairs)
    return alignment(*(hsic1(*one, n) for one in sums))


@in_own_precision
def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA, biased: the covariance between two sites over the covariances within them. Alias: RV coefficient.

    Formula:
        linear_cka = ||XᵀY||²_F / (||XᵀX||_F ||YᵀY||_F); rows centred

    Args:
        x: (..., N, D) rows. y: (..., N, E) the same rows on the other side. Centred and multiplied in float64.

    Returns:
        (...) float64 in [0, 1]; 1 for identical rows.

    Invariances: orthogonal maps and isotropic scale of either side, and offsets; not invertible linear
    maps. Bias: upwards when rows are few, by about ``E/(N+E)`` for independent sides of white features (0.75 at N = 256,
    D = E = 768; less where few directions hold the variance: 0.07 at N = 400 with eigenvalues 1/i; a warning where rows are fewer
    than four for each feature): use ``linear_cka_debiased``, and ``linear_cka_null`` for what chance gives these rows. NaN with
    one warning where a side has no variance.

    Kornblith et al. 2019, arXiv 1905.00414; Robert & Escoufier 1976 (RV).

        >>> x = torch.eye(4, dtype=torch.float64)
        >>> round(float(linear_cka(x, 3 * x[:, [2, 0, 1, 3]] + 5)), 12)
        1.0
    """
    check_matched(x, y, "linear_cka")
    a, b = (_prepare(side, "linear_cka") for side in (x, y))
    tell_few_for_bias("linear_cka", "linear_cka", x.shape[-2], max(x.shape[-1], y.shape[-1]))
    return warn_undefined(_aligned(a, b, _off_product(a, b), "linear_cka"), "linear_cka", _REASON)


rv_coefficient = linear_cka
"""The RV coefficient is the same number as linear CKA: an alias."""


@in_own_precision
def linear_cka_debiased(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA from the unbiased HSIC₁ of Song et al. in the numerator and both denominators.

    Formula:
        linear_cka_debiased = HSIC₁(K, L) / √(HSIC₁(K, K) HSIC₁(L, L)); ``K = XXᵀ``, ``L = YYᵀ``
        HSIC₁(K, L) = (tr K̃L̃ + (1ᵀK̃1)(1ᵀL̃1)/((n-1)(n-2)) - 2/(n-2) 1ᵀK̃L̃1) / (n(n-3)); K̃, L̃: diagonals set to zero

    For centred rows ``K1 = 0``, so this needs ``||XᵀY||²_F``
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
    a, b = (_prepare(side, "linear_cka_debiased") for side in (x, y))
    value = _aligned(a, b, _off_product(a, b), "linear_cka_debiased")
    return warn_undefined(value, "linear_cka_debiased", _REASON_DEBIASED)


class _Moments(NamedTuple):
    """One side from moments, in G groups of projections (exact moments are one group)."""

    n: Tensor  # (...)
    trace: Tensor  # (..., G) of XᵀX
    square: Tensor  # (..., G, G) ||XᵀX||²_F
    norm4: Tensor  # (..., G, G) Σ|x|⁴


class LinearCKA(MomentPairStage):
    """Linear CKA between two sites: ``linear_cka`` and ``linear_cka_debiased`` as a stage.

    Args:
        estimator: ``"biased"`` writes ``linear_cka``, and warns where rows are fewer than four for each feature; ``"debiased"``
            writes ``linear_cka_debiased``, ``"both"`` both.
        source: ``"sample"`` reads matched rows, (N, D) and (N, E), and where present what ``SampleSpectrum`` wrote of these
            very rows. ``"moments"`` reads the leaves of
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

    sources = ("sample", "moments", "sketch")
    sample_leaves = {"sample_covariance": "C C", "sample_fingerprint": ""}
    optional = frozenset({"relative_error", "effective_sample_size"})

    def __init__(
        self,
        *,
        estimator: Literal["biased", "debiased", "both"] = "biased",
        source: Source = "sample",
        in_keys: Keys = None,
        out_keys: Keys = None,
    ) -> None:
        if estimator not in ("biased", "debiased", "both"):
            raise ValueError(f"LinearCKA: estimator is 'biased', 'debiased' or 'both', got {estimator!r}.")
        left_out = {"biased": "linear_cka_debiased", "debiased": "linear_cka"}.get(estimator)
        self.estimates = [name for name in ("linear_cka", "linear_cka_debiased") if name != left_out]
        suffixes = ("", "_standard_error") if source == "sketch" else ("",)
        self.measures = [name + suffix for name in self.estimates for suffix in suffixes]
        table = "G G" if source == "sketch" else ""
        self.side_leaves = {"count": "", "covariance": "D D", "norm4": table}
        self.pair_leaves = {"cross_covariance": "D E", "norm2_product": table}
        super().__init__(source=source, in_keys=in_keys, out_keys=out_keys)

    def prepare(self, *inputs: Any) -> Any:
        """Centre, scale and the site's own product: once per site."""
        if self.source == "sample":
            return _prepare(inputs[0], "LinearCKA", _of_these_rows(*inputs))
        n, covariance, norm4 = (value.to(torch.float64) for value in inputs)
        if self.source == "moments":
            refuse_sketch("LinearCKA", n, None, covariance, norm4)
            if "linear_cka_debiased" in self.estimates:
                refuse_weighted("LinearCKA", norm4, covariance, "linear_cka_debiased")
            norm4 = norm4[..., None, None]
        scatter, groups = covariance * (n - 1)[..., None, None], norm4.shape[-1]
        return _Moments(n, group_traces(scatter, groups), block_squares(scatter, groups), norm4)

    def reordered(self, side: Any, order: Tensor) -> Any:
        """A side prepared from a sample, its rows in another order: (N,) int64."""
        product = None if side.gram is None else side.gram[..., order, :][..., order]
        return _Side(
            side.rows[..., order, :], product, side.norm2[..., order], side.sums[..., order], side.off
        )

    def compare(self, a: Any, b: Any, *rest: Tensor) -> list[Tensor]:
        """One product, and sums of float64 scalars."""
        weighted = rest[3] if self.source == "moments" and len(rest) > 3 else None
        if self.estimates == ["linear_cka"] and self.source != "sketch":
            rows, widths = (
                (a.n if weighted is None else weighted, (rest[0].shape[-1], rest[0].shape[-2]))
                if self.source == "moments"
                else (a.norm2.shape[-1], (a.rows.shape[-1], b.rows.shape[-1]))
            )
            tell_few_for_bias("LinearCKA", "linear_cka", rows, max(widths))
        if self.source == "sample":
            off = _off_product(a, b)
            found = [[_aligned(a, b, off, name)] for name in self.estimates]
        else:
            cross_covariance, norm2_product = (value.to(torch.float64) for value in rest[:2])
            if self.source == "moments":
                norm2_product = norm2_product[..., None, None]
            groups, scale = norm2_product.shape[-1], (a.n - 1).square()[..., None, None]
            cross = block_squares(cross_covariance, groups) * scale
            tables = (_tables(a, b, cross, norm2_product, name) for name in self.estimates)
            exact = self.source == "moments"
            if exact and "linear_cka_debiased" in self.estimates and len(rest) > 2:
                self.tell_unresolved("linear_cka_debiased", _moved(a, b, cross, norm2_product), rest[2])
            found = [
                [alignment(*(table[..., 0, 0] for table in one))] if exact else [*ratio_over_groups(*one)]
                for one in tables
            ]
        for name, (value, *_) in zip(self.estimates, found):
            warn_undefined(value, name, _REASON if name == "linear_cka" else _REASON_DEBIASED)
        return [value for values in found for value in values]


def _of_these_rows(
    sample: Tensor, covariance: Tensor | None = None, of: Tensor | None = None
) -> Tensor | None:
    """The covariance, where its fingerprint is the sample's."""
    if covariance is None or of is None or of.shape != sample.shape[:-2]:
        return None
    return covariance if holds((of == fingerprint(sample)).all()) else None


def _moved(a: _Moments, b: _Moments, cross: Tensor, norm2_product: Tensor) -> Tensor:
    """(...) by how many times the products' relative error the debiased estimate may move: sums of squares less their bias."""
    between, own_a, own_b = _tables(a, b, cross, norm2_product, "linear_cka_debiased")
    root = (own_a * own_b).sqrt()
    value = between / root
    moved = 2 * (cross * (a.square * b.square).sqrt()).sqrt() / root + value.abs() * (
        a.square / own_a + b.square / own_b
    )
    return moved[..., 0, 0]


def _tables(
    a: _Moments, b: _Moments, cross: Tensor, norm2_product: Tensor, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(..., G, G) products of the two sides, and of each with itself."""
    if name == "linear_cka":
        return cross, a.square, b.square
    n = a.n[..., None, None]
    pairs = ((cross, norm2_product, a, b), (a.square, a.norm4, a, a), (b.square, b.norm4, b, b))
    between, own_a, own_b = (
        torch.where(n >= 4, hsic1(square - s, s, p.trace.unsqueeze(-1), q.trace.unsqueeze(-2), n), torch.nan)
        for square, s, p, q in pairs
    )
    return between, own_a, own_b


RV = LinearCKA
"""The RV coefficient is the same number as linear CKA: an alias."""
