"""What CCA, SVCCA, PWCCA and linear regression share: each side as orthonormal directions, from rows or from moments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tdgeom.measures.similarity.enough_rows import tell_beyond_features
from tdgeom.measures.similarity.pair_sources import MomentPairStage, refuse_sketch
from tdgeom.numerics.centring import centre, finite_rows

__all__ = ["Factor", "LinearPairStage", "factor_moments", "factor_rows", "overlap", "tell_few"]


class Factor(NamedTuple):
    """Centred X = U·coefficients with orthonormal U; columns beyond the rank are zero."""

    basis: Tensor  # U (..., N, r) from rows; from moments the map (..., D, r) with U = X map
    values: Tensor  # (..., r) singular values, of the standardised features if asked
    coefficients: Tensor  # (..., r, D) in the data's own units, up to one factor a side
    rank: Tensor  # (...) float64
    n: Tensor | None  # rows, from moments only


def factor_rows(x: Tensor, measure: str, *, standardise: bool, share: float | None = None) -> Factor:
    """The thin singular value decomposition of centred rows, in float64.

    ``standardise`` divides features by their norm first (constant ones stay zero): a measure that ignores invertible
    linear maps then finds the rank even beside a feature a thousand times larger. Directions no longer than the rounding
    of the given values are then left out: features that depend on each other have many in float32 or half precision,
    as good as any other to such a measure. Where none is longer nothing tells them apart, and all of them count.
    """
    wide = finite_rows(x, measure).double()
    rows, scale = centre(wide)
    norms = torch.linalg.vector_norm(rows, dim=-2)
    norms = norms if standardise else torch.ones_like(norms)
    # NaN stays NaN (a side without variance), but LAPACK refuses it.
    undefined = torch.isnan(rows).any(-1).any(-1)
    used = torch.where(norms > 0, norms, 1)
    u, s, vt = torch.linalg.svd(torch.nan_to_num(rows) / used.unsqueeze(-2), full_matrices=False)
    keep = s > s[..., :1] * max(x.shape[-2:]) * torch.finfo(torch.float64).eps
    if standardise:
        steps = torch.linalg.vector_norm(_steps(wide, x.dtype, rows, scale), dim=-2)
        above = s > _along(vt, steps / used.detach())
        keep = keep & (above | ~above.any(-1, keepdim=True))
    keep = keep & _leading(s.square(), share)
    coefficients = (s * keep).unsqueeze(-1) * vt * norms.unsqueeze(-2)
    rank = torch.where(undefined, torch.nan, keep.sum(-1, dtype=torch.float64))
    return Factor(u * keep.unsqueeze(-2), s, coefficients, rank, None)


def _steps(x: Tensor, dtype: torch.dtype, rows: Tensor, scale: Tensor) -> Tensor:
    """What rounding may have moved each value by before it was ``x``, in units of ``scale``; ``rows`` are the centred values.

    To the nearest: 2.4 standard deviations of it at the size of the value, which singular values of pure rounding stay
    below. In wider types than half precision also eight steps at the size of what is left without the mean, for the sums
    that values come from are rounded too. Float64 values that float32 holds are taken for float32 ones that were widened.
    """
    floating = dtype if dtype.is_floating_point else torch.float64
    eps = x.new_full((1, 1), torch.finfo(floating).eps)
    if floating == torch.float64 and dtype.is_floating_point:
        widened = (x.detach().float() == x.detach()).all(-1, keepdim=True).all(-2, keepdim=True)
        eps = torch.where(widened, torch.finfo(torch.float32).eps, eps)
    stored = 0.7 * eps * x.detach().abs().log2().floor().exp2() / scale[..., None, None]
    return stored if floating.itemsize < 4 else torch.hypot(stored, 8 * eps * rows.detach().nan_to_num())


def _along(directions: Tensor, steps: Tensor) -> Tensor:
    """(..., r) how long independent errors of length ``steps`` (..., D) in the features are along directions (..., r, D)."""
    return (directions.detach().square() @ steps.square().unsqueeze(-1)).squeeze(-1).sqrt()


def factor_moments(
    count: Tensor, mean: Tensor, covariance: Tensor, *, standardise: bool, share: float | None = None
) -> Factor:
    """The same from the covariance, of rows that are taken for float32.

    Its products square the condition. What they lost shows where a covariance cannot be, below zero: directions of less
    than four times that variance, or of 1e-6 of the largest standard deviation, are left out too.
    """
    covariance = covariance.to(torch.float64)
    variance = torch.diagonal(covariance, dim1=-2, dim2=-1)
    noise = (64 * torch.finfo(torch.float64).eps * mean).square()  # what a constant feature keeps of its mean
    constant = variance <= noise
    norms = torch.where(constant, 0, variance).sqrt()
    used = norms if standardise else torch.ones_like(norms)
    inverse = torch.where(constant, 0, 1 / torch.where(used > 0, used, 1))
    scaled = covariance * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    undefined = ~(variance > noise).any(-1)
    values, vectors = torch.linalg.eigh(torch.nan_to_num(scaled))
    lost = -4 * values[..., :1].clamp(max=0)
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    n = count.to(torch.float64)
    keep = (values > values[..., :1] * 1e-12) & (values > lost) & _leading(values, share)
    if standardise:
        # as ``_steps`` of float32 rows
        stored = 0.7 * mean.to(torch.float64).abs().log2().floor().exp2()
        steps = torch.finfo(torch.float32).eps * torch.hypot(stored, 8 * variance.clamp(min=0).sqrt())
        keep = keep & (values > _along(vectors.mT, steps * inverse).square())
    keep = keep & (torch.arange(values.shape[-1], device=values.device) < (n - 1)[..., None])
    s = (values * (n - 1)[..., None]).sqrt()
    weights = torch.where(keep, 1 / torch.where(keep, s, 1), 0)
    basis = inverse.unsqueeze(-1) * vectors * weights.unsqueeze(-2)
    coefficients = (s * keep).unsqueeze(-1) * vectors.mT * used.unsqueeze(-2)
    rank = torch.where(undefined, torch.nan, keep.sum(-1, dtype=torch.float64))
    return Factor(basis, s, coefficients, rank, n)


def _leading(variances: Tensor, share: float | None) -> Tensor:
    """True for the fewest leading components that hold ``share`` of the variance, to 1e-9."""
    if share is None:
        return torch.ones_like(variances, dtype=torch.bool)
    cumulative = variances.cumsum(-1) / variances.sum(-1, keepdim=True)
    return torch.nn.functional.pad(cumulative[..., :-1] < share - 1e-9, (1, 0), value=True)


def tell_few(stage: str, measures: str, a: Factor, b: Factor, *rest: Tensor | None) -> None:
    """One warning where rows are no more than the features of a side; ``rest``: as ``compare`` has it."""
    rows: int | Tensor = a.basis.shape[-2] if a.n is None else a.n
    if len(rest) > 2 and rest[2] is not None:  # of weighted rows the effective number
        rows = rest[2]
    tell_beyond_features(stage, measures, rows, max(a.coefficients.shape[-1], b.coefficients.shape[-1]))


def moved_by_rounding(a: Factor, b: Factor, *, standardise: bool) -> Tensor:
    """(...) by how many times the products' relative error a mean over the directions of both sides may move.

    An eigenvalue along v is off by that error times Σ_j v_j² C_jj, and what is divided by it by the quotient of both.
    """
    found = []
    for side in (a, b):
        used = side.coefficients.square().sum(-1) > 0
        square = torch.where(used, side.values, 1.0).square().unsqueeze(-1)
        variance = side.coefficients.square().sum(-2, keepdim=True)
        if standardise:  # the features' own variances are 1
            along = side.n[..., None] - 1 if side.n is not None else torch.ones_like(side.values)
        else:
            along = (side.coefficients.square() / square * variance).sum(-1)
        share = torch.where(used, along / square.squeeze(-1), 0.0)
        found.append(share.sum(-1) / side.rank)
    return found[0] + found[1]


def overlap(a: Factor, b: Factor, cross_covariance: Tensor | None = None, *further: Tensor) -> Tensor:
    """U_aᵀU_b (..., r, s), whose singular values are the canonical correlations."""
    if a.n is None or cross_covariance is None:
        return a.basis.mT @ b.basis
    return a.basis.mT @ (cross_covariance.to(torch.float64) * (a.n - 1)[..., None, None]) @ b.basis


class LinearPairStage(MomentPairStage):
    """A pair stage whose sides are factors, from rows or from moments.

    Class attributes:
        standardise, share: see ``factor_rows``.
    """

    standardise: bool = True
    share: float | None = None

    def judge(self, names: str, a: Factor, b: Factor, *rest: Tensor) -> None:
        """A warning where float32 products behind the moments do not resolve the directions; ``rest``: as ``compare`` has it."""
        if len(rest) > 1:
            moved = moved_by_rounding(a, b, standardise=self.standardise)
            self.tell_unresolved(names, moved, rest[1])

    def prepare(self, *inputs: Tensor) -> Factor:
        """One decomposition a site."""
        if self.source == "moments":
            refuse_sketch(self.__name__, *inputs)
            return factor_moments(*inputs[:3], standardise=self.standardise, share=self.share)
        return factor_rows(inputs[0], self.__name__, standardise=self.standardise, share=self.share)
