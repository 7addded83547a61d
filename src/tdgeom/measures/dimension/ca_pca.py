"""Curvature-adjusted PCA: the dimension whose flat ball has a neighbourhood's spectrum."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tdgeom.measures.dimension.estimate import (
    DimensionEstimate,
    NeighborhoodStage,
    auto_k,
    copies_in,
    mean_estimate,
    need_columns,
)
from tdgeom.measures.dimension.neighbourhoods import over_neighbourhoods
from tdgeom.measures.dimension.pca import spectrum_of
from tdgeom.measures.neighbors.nearest_neighbors import distinct_neighbors
from tdgeom.numerics.eigenvalues import refuse_truncated

__all__ = ["CAPCA", "ca_pca", "ca_pca_dimension"]


def ca_pca(x: Tensor, *, k: int | Literal["auto"] = "auto", memory: int | None = None) -> DimensionEstimate:
    r"""Curvature-adjusted PCA dimension of rows (\*B, N, D), averaged over rows: see ``ca_pca_dimension``.

    Per row the k+1 nearest neighbours, their covariance about their own mean over r², r = (r_k + r_{k+1})/2.
    ``k="auto"``: max(2, min(int(√N), (N-1)//2)). Copies, exact or up to rounding, are dropped first and counted. ``scale`` is
    mean r; ``standard_error`` sd/√n over rows, which share neighbours (the actual spread on spheres is up to
    a third larger).

    >>> import torch
    >>> sphere = torch.nn.functional.normalize(torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    >>> print(f"{ca_pca(sphere, k=30).estimate:.1f}")
    2.0
    """
    k = auto_k(k, x)
    table = distinct_neighbors(x, k + 1, memory=memory)
    copies = table.duplicates, table.near_duplicates
    return _ca_pca(x, table.index, table.distance, *copies, k=k, memory=memory)[0]


def _ca_pca(
    x: Tensor,
    index: Tensor,
    distances: Tensor,
    duplicates: Tensor,
    near_duplicates: Tensor | None = None,
    *,
    k: int,
    memory: int | None,
) -> tuple[DimensionEstimate, Tensor]:
    near = need_columns(distances, k + 1, "CAPCA")
    width = x.shape[-1]

    def measure(rows: Tensor, near: Tensor) -> Tensor:
        radius = near[:, -2:].mean(-1, keepdim=True)
        return ca_pca_dimension(spectrum_of(rows) / radius.square(), width)

    local = over_neighbourhoods(x, near, index, k + 1, memory, measure)
    radius = near[..., -2:].mean(-1)
    copies = copies_in(distances, duplicates, near_duplicates)
    return mean_estimate(local, radius, copies, "CAPCA", f"no row has {k + 1} distinct neighbours")


def ca_pca_dimension(eigenvalues: Tensor, width: int | None = None) -> Tensor:
    r"""The dimension whose curved ball has this spectrum: (\*B, n) eigenvalues over r², descending, to (\*B,).

    A flat d-ball of radius 1 has d covariance eigenvalues 1/(d+2). A quadratically curved one moves variance
    from these into the tail: with t = Σ_{j>d} λ_j, each of the first d should be compared after adding
    (3d+4)/(d(d+4))·t. The estimate is the d in 1..D that minimises this.

    Formula:
        argmin_d ||(1/(d+2) - λ_j - t (3d+4)/(d(d+4)))_{j<=d}|| + 2t

    Args:
        eigenvalues: (\*B, n); ``width``: D, the largest dimension considered (default n; eigenvalues beyond n
            are 0).

    Gilbert & O'Neill: "CA-PCA: Manifold dimension estimation, adapted for curvature", SIAM J. Math. Data
    Science, 2025.

    >>> import torch
    >>> ca_pca_dimension(torch.tensor([0.24, 0.23, 0.01])).item()
    2.0
    """
    refuse_truncated(eigenvalues, "ca_pca_dimension", "eigenvalues")
    values = eigenvalues.double()
    width = values.shape[-1] if width is None else width
    if width > values.shape[-1]:
        values = torch.nn.functional.pad(values, (0, width - values.shape[-1]))
    d = torch.arange(1, width + 1, dtype=torch.float64, device=values.device)
    head = values.cumsum(-1)[..., :width]
    squares = values.square().cumsum(-1)[..., :width]
    tail = (values.sum(-1, keepdim=True) - head).clamp(min=0)
    target = 1 / (d + 2) - (3 * d + 4) / (d * (d + 4)) * tail
    misfit = (d * target.square() - 2 * target * head + squares).clamp(min=0).sqrt()
    return torch.where(tail[..., 0].isnan(), torch.nan, (misfit + 2 * tail).argmin(-1).double() + 1)


class CAPCA(NeighborhoodStage):
    r"""Curvature-adjusted PCA dimension, averaged over rows: see ``ca_pca`` and ``ca_pca_dimension``.

    Args:
        k: neighbours a row; k+1 are looked at. ``"auto"``: max(2, min(int(√N), (N-1)//2)).
        pointwise, source, memory, in_keys, out_keys: as in ``NeighborhoodStage``.

    >>> import torch, tdgeom as tg
    >>> sphere = torch.nn.functional.normalize(torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    >>> print(f"{tg.CAPCA(k=30)(sample=sphere)[0]:.1f}")
    2.0
    """

    name = "ca_pca"
    auto = True

    def __init__(self, *, k: int | Literal["auto"] = "auto", **others: Any) -> None:
        super().__init__(k=k, **others)

    def neighbors_needed(self, n: int) -> int:
        """k + 1."""
        return auto_k(self.k, n) + 1

    def local(self, *table: Tensor, k: int) -> tuple[DimensionEstimate, Tensor]:
        """The estimate and the rows' own."""
        return _ca_pca(*table, k=k, memory=self.memory)
