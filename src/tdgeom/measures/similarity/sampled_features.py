"""Alignment and dimension of a population of features of which only some were recorded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tdgeom.measures.similarity.hsic import alignment, hsic1
from tdgeom.numerics.centring import centre, check_matched, finite_rows, warn_undefined
from tdgeom.numerics.products import in_own_precision

__all__ = ["linear_cka_sampled", "participation_ratio_sampled"]

_REASON = "it needs 4 rows and 2 features on each side, and features that share variance with others."


class _Sums(NamedTuple):
    """(...): Σ_ab C_ab², Σ_ab Σ_i u_ia² u_ib², (tr C)² over all pairs of features, less those of a feature with itself."""

    square: Tensor
    norm4: Tensor
    trace2: Tensor


def _pairs_of_features(rows: Tensor) -> _Sums:
    """Over pairs a != b."""
    squares = rows.square()
    norm2, own = squares.sum(-1), squares.sum(-2)
    product = rows.mT @ rows if rows.shape[-1] <= rows.shape[-2] else rows @ rows.mT
    return _Sums(
        product.square().sum((-2, -1)) - own.square().sum(-1),
        norm2.square().sum(-1) - squares.square().sum((-2, -1)),
        own.sum(-1).square() - own.square().sum(-1),
    )


@in_own_precision
def linear_cka_sampled(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA of the populations that rows *and features* are random samples of.

    Debiased CKA is unbiased over rows, but of the features at hand: with Q of many features recorded, every feature's product
    with itself weighs 1/Q too much in both denominators, and the value is too low. Here these are left out:

        HSIC(x, y)/(Q Q') / sqrt(H(x) H(y)),   H(x) = Σ_{a≠b} HSIC₁(x_a, x_b)/(Q(Q-1)),

    numerator and each H unbiased over rows and features (the estimator of Chun et al.).

    Args:
        x: (..., N, D) rows, D features drawn at random from many. y: (..., N, E) the same rows on the other side.

    Returns:
        (...) float64; its ratio is biased at second order only, and it may exceed 1 or fall below 0 on few rows or features.
        Where all features of a model are at hand they are the population: take ``linear_cka_debiased``. NaN with one warning
        where a side has no variance that features share.

    Invariances: isotropic scale and offsets of either side, permutations of features; **not** rotations, which mix features.

    Chun, Canatar, Chung and Lee 2025, arXiv 2502.15104.

        >>> g = torch.Generator().manual_seed(0)
        >>> z = torch.randn(500, 10, generator=g)
        >>> x, y = z @ torch.randn(10, 64, generator=g), z @ torch.randn(10, 64, generator=g)  # one population, other features
        >>> round(float(linear_cka_sampled(x, y)), 1)
        1.0
    """
    check_matched(x, y, "linear_cka_sampled")
    a, b = (centre(finite_rows(side, "linear_cka_sampled").double()).rows for side in (x, y))
    n = a.shape[-2]
    norm2 = [side.square().sum(-1) for side in (a, b)]
    shared = (norm2[0] * norm2[1]).sum(-1)
    cross = (a.mT @ b).square().sum((-2, -1)) - shared
    between = hsic1(cross, shared, norm2[0].sum(-1), norm2[1].sum(-1), n) / (a.shape[-1] * b.shape[-1])
    own = [_own(side) for side in (a, b)]
    value = torch.full_like(between, torch.nan) if n < 4 else alignment(between, own[0], own[1])
    return warn_undefined(value, "linear_cka_sampled", _REASON)


def _own(rows: Tensor) -> Tensor:
    """Mean over pairs of different features of n(n-3) HSIC₁ between them."""
    n, width = rows.shape[-2:]
    if width < 2 or n < 4:
        return rows.new_full(rows.shape[:-2], torch.nan)
    sums = _pairs_of_features(rows)
    one = torch.ones_like(sums.trace2)
    return hsic1(sums.square - sums.norm4, sums.norm4, sums.trace2, one, n) / (width * (width - 1))


@in_own_precision
def participation_ratio_sampled(x: Tensor) -> Tensor:
    """Participation ratio (tr Σ)²/tr Σ² of a population of features and rows, both of which were sampled.

    With Q of many features recorded the plain ratio is at most Q, and too small by each feature's product with itself.
    Numerator and denominator are averages over pairs of *different* features, each unbiased over rows too (as in
    ``participation_ratio``):

        Σ_{a≠b} Σ_aa Σ_bb / Σ_{a≠b} Σ_ab².

    Args:
        x: (..., N, D) rows, D features drawn at random from many.

    Returns:
        (...) float64. NaN with one warning for fewer than 4 rows or 2 features, or too few rows to tell the dimension from
        infinity. Where all features of a model are at hand, ``participation_ratio`` is right.

    Chun, Canatar, Chung and Lee 2025, arXiv 2509.26560 (rows and columns).

        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(2000, 50, generator=g) @ torch.randn(50, 64, generator=g)  # 64 of many features, of dimension 50
        >>> plain = torch.linalg.eigvalsh(x.T.cov())
        >>> round(float(plain.sum() ** 2 / (plain**2).sum())), 40 < float(participation_ratio_sampled(x)) < 60
        (28, True)
    """
    rows = centre(finite_rows(x, "participation_ratio_sampled").double()).rows
    n = rows.shape[-2]
    if n < 4 or rows.shape[-1] < 2:
        value = rows.new_full(rows.shape[:-2], torch.nan)
    else:
        sums, both = _pairs_of_features(rows), (n - 1) * (n - 2)
        quartic = n * sums.norm4 / (n - 2)
        above = sums.trace2 - quartic + (2 * sums.square - sums.trace2) / both
        below = sums.square - quartic + sums.trace2 / both
        value = torch.where(below > 1e-12 * sums.square.abs(), above / below, torch.nan)
    return warn_undefined(value, "participation_ratio_sampled", _REASON)
