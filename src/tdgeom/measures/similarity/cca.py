"""Canonical correlations between two sites and their means: CCA, SVCCA, PWCCA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdgeom.measures.similarity.orthonormal_sides import (
    Factor,
    LinearPairStage,
    factor_rows,
    overlap,
    tell_few,
)
from tdgeom.numerics.centring import check_matched, warn_undefined

__all__ = ["CCA", "PWCCA", "SVCCA", "cca_mean", "cca_r2", "pwcca_ab", "pwcca_ba", "svcca"]

_REASON = "one side has no variance over the rows."
_TIE = 1e-9  # correlations no further apart are equal, but for rounding


def _factors(x: Tensor, y: Tensor, measure: str, share: float | None = None) -> tuple[Factor, Factor]:
    check_matched(x, y, measure)
    a, b = (factor_rows(side, measure, standardise=share is None, share=share) for side in (x, y))
    if share is None:
        tell_few(measure, measure, a, b)
    return a, b


def _correlations(m: Tensor) -> Tensor:
    return torch.linalg.svdvals(m).clamp(max=1)


def _mean(values: Tensor, a: Factor, b: Factor) -> Tensor:
    return values.sum(-1) / torch.minimum(a.rank, b.rank)


def cca_mean(x: Tensor, y: Tensor) -> Tensor:
    """Mean canonical correlation, over as many as the smaller of the two ranks.

    Formula:
        cca_mean = Σ ρ_i / min(rank X, rank Y); ρ the singular values of ``U_xᵀU_y``, U orthonormal bases of the centred columns

    Args:
        x: (..., N, D) rows. y: (..., N, E) the same rows on the other side.

    Returns:
        (...) float64 in [0, 1]; 1 where one side is a linear function of the other.

    Invariances: every invertible linear map and offset of either side. Bias: strongly upwards unless N is many times
    D; at N <= D + 1 it is 1 for any data (a warning says so), so compare at equal N and D only. NaN with one warning without
    variance.
    Directions no longer than the rounding of the given values (constant features, or ones that depend on each other) do
    not count, whatever offset the features have. Float32 rows widened to float64 are known by their values; half precision
    is given as it was computed, for its rounding cannot be told once it is widened.

    Hotelling 1936; Raghu et al. 2017, arXiv 1706.05806.

        >>> x = torch.randn(50, 3, dtype=torch.float64)
        >>> round(float(cca_mean(x, x @ torch.randn(3, 3, dtype=torch.float64))), 9)
        1.0
    """
    a, b = _factors(x, y, "cca_mean")
    return warn_undefined(_mean(_correlations(overlap(a, b)), a, b), "cca_mean", _REASON)


def cca_r2(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared canonical correlation (R²_CCA of Kornblith et al.).

    Formula:
        cca_r2 = Σ ρ_i² / min(rank X, rank Y); ρ as in ``cca_mean``

    Args and invariances as ``cca_mean``; in [0, 1]. Bias: for independent data about ``max(D, E)/(N-1)``.

    Kornblith et al. 2019, arXiv 1905.00414.

        >>> x = torch.eye(4, dtype=torch.float64)
        >>> round(float(cca_r2(x[:, :1], x[:, 1:2])), 9) == round(1 / 9, 9)
        True
    """
    a, b = _factors(x, y, "cca_r2")
    return warn_undefined(_mean(overlap(a, b).square().sum((-2, -1)).unsqueeze(-1), a, b), "cca_r2", _REASON)


def svcca(x: Tensor, y: Tensor, variance: float = 0.99) -> Tensor:
    """Mean canonical correlation after keeping, on each side, the fewest principal components that hold ``variance``.

    Formula:
        svcca = Σ ρ_i / min(k_x, k_y); ρ between the ``k_x`` and ``k_y`` components kept

    Args:
        x: (..., N, D) rows. y: (..., N, E) the same rows on the other side. variance: share kept, in (0, 1].

    Returns:
        (...) float64 in [0, 1], the mean over the smaller number of components.

    Invariances: orthogonal maps, isotropic scale and offsets; not invertible linear maps. Bias: as ``cca_mean`` with
    the components kept in place of D. NaN with one warning without variance.

    Raghu et al. 2017, arXiv 1706.05806.

        >>> x = torch.randn(50, 3, dtype=torch.float64)
        >>> round(float(svcca(x, 2 * x.flip(-1))), 9)
        1.0
    """
    a, b = _factors(x, y, "svcca", _share(variance))
    return warn_undefined(_mean(_correlations(overlap(a, b)), a, b), "svcca", _REASON)


def _share(variance: float) -> float:
    if not 0 < variance <= 1:
        raise ValueError(f"svcca keeps a share of the variance in (0, 1], got {variance}.")
    return variance


def pwcca_ab(x: Tensor, y: Tensor) -> Tensor:
    """Projection-weighted CCA: canonical correlations weighted by how much of x each of them carries.

    Formula:
        pwcca_ab = Σ α_i ρ_i / Σ α_i
        α_i = Σ_j |⟨h_i, x_j⟩|; h_i x's canonical variables (unit length over the rows), x_j its centred features

    Args:
        x: (..., N, D) rows. y: (..., N, E) the same rows on the other side.

    Returns:
        (...) float64 in [0, 1]. Directed: ``pwcca_ba`` takes the weights from y.

    Invariances: of x isotropic scale and offsets (the sum of magnitudes over features is not kept by rotations), of y
    every invertible linear map. Bias: as ``cca_mean``. Equal correlations leave their h_i undetermined: they are then the
    principal axes of x in what these span (equal to 1e-9, which moments of float32 rows do not tell). NaN with one warning
    without variance.

    Morcos, Raghu & Bengio 2018, arXiv 1806.05759.

        >>> x = torch.randn(50, 3, dtype=torch.float64)
        >>> round(float(pwcca_ab(x, x @ torch.randn(3, 3, dtype=torch.float64))), 9)
        1.0
    """
    a, b = _factors(x, y, "pwcca_ab")
    return warn_undefined(_weighted(overlap(a, b), a, b), "pwcca_ab", _REASON)


def pwcca_ba(x: Tensor, y: Tensor) -> Tensor:
    """``pwcca_ab`` with the sides exchanged: weighted by y.

    >>> x, y = torch.randn(50, 3), torch.randn(50, 2)
    >>> bool((pwcca_ba(x, y) - pwcca_ab(y, x)).abs() < 1e-12)
    True
    """
    a, b = _factors(x, y, "pwcca_ba")
    return warn_undefined(_weighted(overlap(b, a), b, a), "pwcca_ba", _REASON)


def _weighted(m: Tensor, a: Factor, b: Factor) -> Tensor:
    left, correlations, _ = torch.linalg.svd(m, full_matrices=False)
    counted = torch.arange(correlations.shape[-1], device=m.device) < torch.minimum(a.rank, b.rank)[..., None]
    weights = _untied(left.mT @ a.coefficients, correlations).abs().sum(-1) * counted
    return (weights * correlations.clamp(max=1)).sum(-1) / weights.sum(-1)


def _untied(loadings: Tensor, correlations: Tensor) -> Tensor:
    """Canonical variables' loadings (..., r, D), those of equal correlation (..., r) turned to their principal axes."""
    group = torch.nn.functional.pad((correlations.diff(dim=-1) < -_TIE).cumsum(-1), (1, 0))
    tied = group.unsqueeze(-1) == group.unsqueeze(-2)
    products = torch.where(tied, loadings @ loadings.mT, 0)
    # Blocks of one group each, shifted apart: the eigenvectors of the whole are those of the blocks, in their order.
    size = torch.diagonal(products, dim1=-2, dim2=-1).sum(-1)[..., None]
    shift = 2 * size * group
    return torch.linalg.eigh(torch.nan_to_num(products + torch.diag_embed(shift)))[1].mT @ loadings


class CCA(LinearPairStage):
    """``cca_mean`` and ``cca_r2`` between two sites.

    Args:
        source: ``"sample"`` reads matched rows; ``"moments"`` reads count, mean and covariance of both sides and
            the pair's cross covariance, over all rows of the run. There rounding is judged as of float32 rows: of half
            precision rows whose features depend on each other take a sample.
        in_keys, out_keys: see ``Stage``.

        >>> x = torch.randn(50, 3)
        >>> [round(float(value), 6) for value in CCA()(sample_a=x, sample_b=x.flip(-1))]
        [1.0, 1.0]
    """

    measures = ("cca_mean", "cca_r2")

    def compare(self, a: Factor, b: Factor, *rest: Tensor) -> dict[str, Tensor]:
        """One product and its singular values."""
        tell_few("CCA", "cca_mean and cca_r2", a, b, *rest)
        self.judge("cca_mean and cca_r2", a, b, *rest)
        correlations = _correlations(overlap(a, b, *rest))
        values = {"cca_mean": _mean(correlations, a, b), "cca_r2": _mean(correlations.square(), a, b)}
        warn_undefined(values["cca_mean"], "cca_mean and cca_r2", _REASON)
        return values


class SVCCA(LinearPairStage):
    """``svcca`` between two sites; ``variance``: the share kept; ``source``, ``in_keys``, ``out_keys``: as ``CCA``.

    >>> x = torch.randn(50, 3)
    >>> round(float(SVCCA()(sample_a=x, sample_b=-x)), 6)
    1.0
    """

    measures = ("svcca",)
    standardise = False

    def __init__(self, *, variance: float = 0.99, **others: Any) -> None:
        super().__init__(**others)
        self.variance = self.share = _share(variance)

    def compare(self, a: Factor, b: Factor, *rest: Tensor) -> Tensor:
        """One product and its singular values."""
        self.judge("svcca", a, b, *rest)
        return warn_undefined(_mean(_correlations(overlap(a, b, *rest)), a, b), "svcca", _REASON)


class PWCCA(LinearPairStage):
    """``pwcca_ab`` and ``pwcca_ba`` between two sites, from rows or moments (``source``, as ``CCA``).

    The weights need no rows: ``<h_i, x_j>`` follows from the covariances.

        >>> x = torch.randn(50, 3)
        >>> [round(float(value), 6) for value in PWCCA()(sample_a=x, sample_b=x.flip(-1))]
        [1.0, 1.0]
    """

    measures = ("pwcca_ab", "pwcca_ba")

    def compare(self, a: Factor, b: Factor, *rest: Tensor) -> dict[str, Tensor]:
        """One product and its singular vectors on both sides."""
        tell_few("PWCCA", "pwcca_ab and pwcca_ba", a, b, *rest)
        self.judge("pwcca_ab and pwcca_ba", a, b, *rest)
        m = overlap(a, b, *rest)
        values = {"pwcca_ab": _weighted(m, a, b), "pwcca_ba": _weighted(m.mT, b, a)}
        warn_undefined(values["pwcca_ab"], "pwcca_ab and pwcca_ba", _REASON)
        return values
