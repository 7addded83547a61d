"""What CCA, SVCCA, PWCCA and linear regression share: each side as orthonormal directions, from rows or from moments."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from tdgeom.keys import Key
from tdgeom.similarity._inputs import as_rows, centre
from tdgeom.stage import PairStage

__all__ = ["Factor", "LinearPairStage", "factor_moments", "factor_rows", "overlap"]

MOMENT_LEAVES = (("count", ""), ("mean", "{}"), ("covariance", "{} {}"))


class Factor(NamedTuple):
    """Centred X = U·coefficients with orthonormal U; columns beyond the rank are zero."""

    basis: Tensor  # U (..., N, r) from rows; from moments the map (..., D, r) with U = X map
    values: Tensor  # (..., r) singular values, of the standardised features if asked
    coefficients: Tensor  # (..., r, D) in the data's own units, up to one factor a side
    rank: Tensor  # (...) float64
    count: Tensor | None  # n, from moments only


def factor_rows(x: Tensor, measure: str, *, standardise: bool, share: float | None = None) -> Factor:
    """The thin singular value decomposition of centred rows, in float64.

    ``standardise`` divides features by their norm first (constant ones stay zero): a measure that ignores invertible
    linear maps then finds the rank even beside a feature a thousand times larger.
    """
    rows = centre(as_rows(x, measure).double()).rows
    norms = (
        torch.linalg.vector_norm(rows, dim=-2)
        if standardise
        else rows.new_ones(rows.shape[:-2] + rows.shape[-1:])
    )
    # NaN stays NaN (a side without variance), but LAPACK refuses it.
    undefined = torch.isnan(rows).any(-1).any(-1)
    scaled = torch.nan_to_num(rows) / torch.where(norms > 0, norms, 1).unsqueeze(-2)
    u, s, vt = torch.linalg.svd(scaled, full_matrices=False)
    keep = s > s[..., :1] * max(x.shape[-2:]) * torch.finfo(torch.float64).eps
    keep = keep & _leading(s.square(), share)
    coefficients = (s * keep).unsqueeze(-1) * vt * norms.unsqueeze(-2)
    rank = torch.where(undefined, torch.nan, keep.sum(-1, dtype=torch.float64))
    return Factor(u * keep.unsqueeze(-2), s, coefficients, rank, None)


def factor_moments(
    count: Tensor, mean: Tensor, covariance: Tensor, *, standardise: bool, share: float | None = None
) -> Factor:
    """The same from the covariance, whose products square the condition: directions below 1e-6 of the largest
    (standard deviation, after standardising) are taken for rounding of its float32 blocks and left out.
    """
    covariance = covariance.to(torch.float64)
    variance = torch.diagonal(covariance, dim1=-2, dim2=-1)
    noise = (
        64 * torch.finfo(torch.float64).eps * mean
    ).square()  # a constant feature keeps this much of its mean
    constant = variance <= noise
    norms = torch.where(constant, 0, variance).sqrt()
    used = norms if standardise else torch.ones_like(norms)
    inverse = torch.where(constant, 0, 1 / torch.where(used > 0, used, 1))
    scaled = covariance * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    undefined = ~(variance > noise).any(-1)
    values, vectors = torch.linalg.eigh(torch.nan_to_num(scaled))
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    n = count.to(torch.float64)
    keep = (values > values[..., :1] * 1e-12) & _leading(values, share)
    keep = keep & (torch.arange(values.shape[-1], device=values.device) < (n - 1)[..., None])
    s = (values * (n - 1)[..., None]).sqrt()
    weights = torch.where(keep, 1 / torch.where(keep, s, 1), 0)
    basis = inverse.unsqueeze(-1) * vectors * weights.unsqueeze(-2)
    coefficients = (s * keep).unsqueeze(-1) * vectors.mT * used.unsqueeze(-2)
    rank = torch.where(undefined, torch.nan, keep.sum(-1, dtype=torch.float64))
    return Factor(basis, s, coefficients, rank, n)


def _leading(variances: Tensor, share: float | None) -> Tensor:
    """True for the fewest leading components that hold ``share`` of the variance."""
    if share is None:
        return torch.ones_like(variances, dtype=torch.bool)
    cumulative = variances.cumsum(-1) / variances.sum(-1, keepdim=True)
    return torch.cat(
        [torch.ones_like(cumulative[..., :1], dtype=torch.bool), cumulative[..., :-1] < share], -1
    )


def overlap(a: Factor, b: Factor, cross_covariance: Tensor | None = None) -> Tensor:
    """U_aᵀU_b (..., r, s), whose singular values are the canonical correlations."""
    if cross_covariance is None:
        return a.basis.mT @ b.basis
    return a.basis.mT @ (cross_covariance.to(torch.float64) * (a.count - 1)[..., None, None]) @ b.basis


class LinearPairStage(PairStage):
    """A pair stage on rows, or with ``source="moments"`` on count, mean, covariance and the cross covariance."""

    measures: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        *,
        source: Literal["sample", "moments"] = "sample",
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        if source == "sample":
            reads: dict[Key, str] = {("sample", "a"): "N D", ("sample", "b"): "N E"}
        elif source == "moments":
            reads = {
                ("cross_moments", side, leaf): shape.format(letter, letter)
                for side, letter in (("a", "D"), ("b", "E"))
                for leaf, shape in MOMENT_LEAVES
            }
            reads["cross_moments", "cross_covariance"] = "D E"
        else:
            raise ValueError(f"{type(self).__name__}: source is 'sample' or 'moments', got {source!r}.")
        self.source = source
        writes = [("between", name) for name in self.measures]
        super().__init__(in_keys=in_keys, out_keys=out_keys, reads=reads, writes=writes)

    def factor(self, inputs: tuple[Tensor, ...], *, standardise: bool, share: float | None = None) -> Factor:
        """One side, from whichever source."""
        if self.source == "sample":
            return factor_rows(inputs[0], type(self).__name__, standardise=standardise, share=share)
        return factor_moments(*inputs, standardise=standardise, share=share)
