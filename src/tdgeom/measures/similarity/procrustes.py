"""Distances between shapes: what a rotation cannot bring together."""

from __future__ import annotations

import torch
from torch import Tensor

from tdgeom.measures.similarity.pair_sources import MomentPairStage, refuse_sketch
from tdgeom.numerics.centring import centre, check_matched, finite_rows, warn_undefined

__all__ = ["Procrustes", "angular_shape", "procrustes"]

_REASON = "one side has no variance over the rows."


def _shape(x: Tensor, measure: str) -> Tensor:
    """Centred rows of unit Frobenius norm, at most N columns wide (a rotation, which changes no shape)."""
    rows = centre(finite_rows(x, measure).double()).rows
    rows = rows / torch.linalg.vector_norm(rows, dim=(-2, -1), keepdim=True)
    if rows.shape[-2] < rows.shape[-1]:
        rows = torch.linalg.qr(rows.mT, mode="r")[1].mT
    return rows


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """min over rotations of ||A - BQ||²: the residual itself, for 2 - 2||AᵀB||_* loses small distances."""
    undefined = torch.isnan(a).any(-1).any(-1) | torch.isnan(b).any(-1).any(-1)
    product = torch.nan_to_num(b.detach().mT @ a.detach())
    u, _, vt = torch.linalg.svd(product, full_matrices=False)
    turned = b @ u
    value = (a - turned @ vt).square().sum((-2, -1))
    if b.shape[-1] > a.shape[-1]:  # what of the wider side no rotation brings to the narrower one
        value = value + (b - turned @ u.mT).square().sum((-2, -1))
    return torch.where(undefined, torch.nan, value)


def _angle(distance: Tensor) -> Tensor:
    return 2 * torch.asin(distance.clamp(0, 4).sqrt() / 2)


def procrustes(x: Tensor, y: Tensor) -> Tensor:
    """Squared Procrustes distance of centred rows at unit Frobenius norm.

    Formula:
        procrustes = min_Q ||X - YQ||²_F = 2 - 2||XᵀY||_*; Q orthogonal (the narrower side padded with zeros)

    ``||·||_*`` is the sum of singular values.

    Args:
        x: (..., N, D) rows. y: (..., N, E) the same rows on the other side.

    Returns:
        (...) float64 in [0, 2], 0 for equal shapes. A squared distance: its root is a metric.

    Invariances: orthogonal maps, isotropic scale and offsets of either side; not invertible linear maps. Bias:
    downwards with few rows (independent data are never at 2: any two clouds share some shape). NaN with one warning
    without variance.

    Schönemann 1966; Williams et al. 2021, arXiv 2110.14739; Ding et al. 2021, arXiv 2108.01661.

        >>> x = torch.eye(4, dtype=torch.float64)
        >>> round(float(procrustes(x, 3 * x.flip(-1) + 1)), 9)
        0.0
    """
    check_matched(x, y, "procrustes")
    value = _distance(_shape(x, "procrustes"), _shape(y, "procrustes"))
    return warn_undefined(value, "procrustes", _REASON)


def angular_shape(x: Tensor, y: Tensor) -> Tensor:
    """Angular shape distance of centred rows at unit Frobenius norm, in [0, π/2].

    Formula:
        angular_shape = arccos ||XᵀY||_*

    Args, invariances and bias as ``procrustes``, of which it is a function: ``2 arcsin(sqrt(procrustes)/2)``, in
    which form it keeps small angles. A metric.

    Williams et al. 2021, arXiv 2110.14739.

        >>> x = torch.eye(4, dtype=torch.float64)
        >>> round(float(angular_shape(x, x.flip(-1))), 9)
        0.0
    """
    check_matched(x, y, "angular_shape")
    value = _angle(_distance(_shape(x, "angular_shape"), _shape(y, "angular_shape")))
    return warn_undefined(value, "angular_shape", _REASON)


class Procrustes(MomentPairStage):
    """``procrustes`` and ``angular_shape`` between two sites.

    Args:
        source: ``"sample"`` reads matched rows; ``"moments"`` count, mean, covariance of both sides and the cross
            covariance, over all rows of the run. From moments a distance is right to rounding (1e-7 where the
            blocks were multiplied in float32), so an angle of less than about 1e-3 has few digits.
        in_keys, out_keys: see ``Stage``.

        >>> x = torch.randn(50, 3)
        >>> [round(float(value), 6) for value in Procrustes()(sample_a=x, sample_b=x.flip(-1))]
        [0.0, 0.0]
    """

    measures = ("procrustes", "angular_shape")

    def prepare(self, *inputs: Tensor) -> Tensor:
        """Unit norm; (N, min(N, D)) rows or the total variance."""
        if self.source == "sample":
            return _shape(inputs[0], "Procrustes")
        refuse_sketch("Procrustes", *inputs)
        return torch.diagonal(inputs[2].to(torch.float64), dim1=-2, dim2=-1).sum(-1)

    def reordered(self, side: Tensor, order: Tensor) -> Tensor:
        """A side prepared from a sample, its rows in another order: (N,) int64."""
        return side[..., order, :]

    def compare(self, a: Tensor, b: Tensor, *rest: Tensor) -> dict[str, Tensor]:
        """One product and its singular value decomposition."""
        if self.source == "sample":
            distance = _distance(a, b)
        else:
            distance = 2 - 2 * torch.linalg.svdvals(rest[0].to(torch.float64)).sum(-1) / (a * b).sqrt()
            distance = distance.clamp(min=0)
        warn_undefined(distance, "procrustes and angular_shape", _REASON)
        return {"procrustes": distance, "angular_shape": _angle(distance)}
