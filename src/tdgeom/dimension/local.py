"""Local estimators: the growth of a neighbourhood, and the spectrum of a neighbourhood's covariance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tdgeom.dimension._estimate import (
    DimensionEstimate,
    LocalStage,
    NeighborhoodStage,
    auto_k,
    mean_estimate,
    need_columns,
)
from tdgeom.dimension.pca import pca_dimension, spectrum_of
from tdgeom.keys import Key
from tdgeom.neighbors._blocks import budget
from tdgeom.neighbors.knn import distinct_neighbors

__all__ = [
    "CAPCA",
    "LocalKNN",
    "LocalPCA",
    "ca_pca",
    "ca_pca_dimension",
    "local_knn",
    "local_knn_from_distances",
    "local_pca",
]


def local_knn(
    x: Tensor, *, k: int | Literal["auto"] = "auto", memory: int | None = None
) -> DimensionEstimate:
    r"""Dimension of rows (\*B, N, D) from the growth of neighbourhoods: see ``local_knn_from_distances``.

    ``k="auto"``: max(2, min(int(√N), (N-1)//2)). Exact copies are dropped first and counted.

    >>> import torch
    >>> sheet = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))
    >>> print(f"{local_knn(sheet, k=30).estimate:.1f}")
    2.0
    """
    k = auto_k(k, x.shape[-2:][0])  # a single dimension is refused by the search, in words
    table = distinct_neighbors(x, 2 * k, memory=memory)
    return local_knn_from_distances(table.distance, table.duplicates, k=k)[0]


def local_knn_from_distances(
    distances: Tensor, duplicates: Tensor | None = None, *, k: int
) -> tuple[DimensionEstimate, Tensor]:
    r"""Local k-NN dimension: per row ln 2/ln(r_2k/r_k), averaged over rows.

    Args:
        distances: (\*B, N, >=2k) ascending; a row of NaN (a later copy) is left out. k >= 1.
        duplicates: (\*B,) number of copies, passed on; None: the number of NaN rows.

    Returns:
        The ``DimensionEstimate`` ((\*B,) leaves; ``scale`` = (mean r_k + mean r_2k)/2) and the rows' own
        estimates (\*B, N). ``standard_error`` is sd/√n over rows, which share neighbours (the actual spread
        on spheres is up to a third larger). A row with r_2k = r_k has no estimate and is left out; NaN with a
        warning where no row is left.

    Farahmand, Szepesvári, Audibert: "Manifold-adaptive dimension estimation", ICML 2007. tdhook's
    ``LocalKnnDimensionEstimator`` gives the rows' own estimates.

    >>> import torch
    >>> local_knn_from_distances(torch.tensor([[1.0, 2.0], [1.0, 4.0]]), k=1)[1].tolist()
    [1.0, 0.5]
    """
    near = need_columns(distances, 2 * k, "LocalKNN")
    inner, outer = near[..., k - 1], near[..., 2 * k - 1]
    apart = (outer > inner) & (inner > 0)
    ratio = torch.where(apart, outer, 2.0) / torch.where(apart, inner, 1.0)
    local = torch.where(apart, math.log(2) / ratio.log(), torch.nan)
    if duplicates is None:
        duplicates = near.shape[-2] - torch.isfinite(near[..., 0]).sum(-1)
    reason = f"no row has {2 * k} distinct neighbours, the last farther than number {k}"
    return mean_estimate(local, (inner + outer) / 2, duplicates, "LocalKNN", reason)


def _neighbourhoods(
    x: Tensor, distances: Tensor, index: Tensor, k: int, memory: int | None, measure: Callable[..., Tensor]
) -> Tensor:
    """``measure(rows of the k neighbours (n, k, D) minus the row, distances (n, k))`` for every row with k neighbours.

    The result is laid out over all rows (*B, N), NaN elsewhere; ``memory`` bytes of neighbourhoods at a time.
    """
    n, width = x.shape[-2:]
    flat = x.reshape(-1, width)
    offset = (torch.arange(len(flat) // n, device=x.device) * n)[:, None, None]
    index = (index[..., :k].reshape(-1, n, k) + offset).reshape(-1, k)
    near = distances[..., :k].reshape(-1, k).double()
    which = torch.isfinite(near[:, -1]).nonzero().squeeze(-1)
    small = min(k, width)
    step = max(1, budget(memory) // (8 * (3 * k * width + 4 * small * small)))
    found = [
        measure(flat[index[rows]].double() - flat[rows].double().unsqueeze(1), near[rows])
        for rows in which.split(step)
    ]
    local = near.new_full((len(flat),), torch.nan)
    if found:
        local[which] = torch.cat(found)
    return local.view(distances.shape[:-1])


def local_pca(
    x: Tensor,
    *,
    k: int = 100,
    rule: str = "fukunaga_olsen",
    alpha: float = 0.05,
    share: float = 0.95,
    memory: int | None = None,
) -> DimensionEstimate:
    r"""Linear dimension of every row's k nearest neighbours (\*B, N, D), averaged: rules as in ``pca_dimension``.

    A neighbourhood is the k neighbours without the row itself, about their own mean (scikit-dimension's
    ``lPCA().fit_pw``; tdhook adds the row). Exact copies are dropped first and counted. ``scale`` is mean
    r_k; ``standard_error`` sd/√n over rows, which share neighbours (the actual spread on spheres is up to a
    third larger).

    >>> import torch
    >>> angle = 6.28 * torch.rand(500, 1, generator=torch.Generator().manual_seed(0))
    >>> circle = torch.cat((angle.cos(), angle.sin()), -1)
    >>> print(f"{local_pca(circle, k=20).estimate:.1f}")
    1.0
    """
    table = distinct_neighbors(x, k, memory=memory)
    args = (x, table.distance, table.index, table.duplicates)
    return _local_pca(*args, k=k, rule=rule, alpha=alpha, share=share, memory=memory)[0]


def _local_pca(
    x: Tensor,
    distances: Tensor,
    index: Tensor,
    duplicates: Tensor,
    *,
    k: int,
    memory: int | None,
    **settings: object,
) -> tuple[DimensionEstimate, Tensor]:
    near = need_columns(distances, k, "LocalPCA")
    local = _neighbourhoods(
        x,
        near,
        index,
        k,
        memory,
        lambda rows, _: pca_dimension(spectrum_of(rows), **settings),  # type: ignore[arg-type]
    )
    return mean_estimate(local, near[..., -1], duplicates, "LocalPCA", f"no row has {k} distinct neighbours")


def ca_pca(x: Tensor, *, k: int | Literal["auto"] = "auto", memory: int | None = None) -> DimensionEstimate:
    r"""Curvature-adjusted PCA dimension of rows (\*B, N, D), averaged over rows: see ``ca_pca_dimension``.

    Per row the k+1 nearest neighbours, their covariance about their own mean over r², r = (r_k + r_{k+1})/2.
    ``k="auto"``: max(2, min(int(√N), (N-1)//2)). Exact copies are dropped first and counted. ``scale`` is
    mean r; ``standard_error`` sd/√n over rows, which share neighbours (the actual spread on spheres is up to
    a third larger).

    >>> import torch
    >>> sphere = torch.nn.functional.normalize(torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    >>> print(f"{ca_pca(sphere, k=30).estimate:.1f}")
    2.0
    """
    k = auto_k(k, x.shape[-2:][0])  # a single dimension is refused by the search, in words
    table = distinct_neighbors(x, k + 1, memory=memory)
    return _ca_pca(x, table.distance, table.index, table.duplicates, k=k, memory=memory)[0]


def _ca_pca(
    x: Tensor, distances: Tensor, index: Tensor, duplicates: Tensor, *, k: int, memory: int | None
) -> tuple[DimensionEstimate, Tensor]:
    near = need_columns(distances, k + 1, "CAPCA")
    width = x.shape[-1]

    def measure(rows: Tensor, near: Tensor) -> Tensor:
        radius = near[:, -2:].mean(-1, keepdim=True)
        return ca_pca_dimension(spectrum_of(rows) / radius.square(), width)

    local = _neighbourhoods(x, near, index, k + 1, memory, measure)
    radius = near[..., -2:].mean(-1)
    return mean_estimate(local, radius, duplicates, "CAPCA", f"no row has {k + 1} distinct neighbours")


def ca_pca_dimension(eigenvalues: Tensor, width: int | None = None) -> Tensor:
    r"""The dimension whose curved ball has this spectrum: (\*B, n) eigenvalues over r², descending, to (\*B,).

    A flat d-ball of radius 1 has d covariance eigenvalues 1/(d+2). A quadratically curved one moves variance
    from these into the tail: with t = Σ_{j>d} λ_j, each of the first d should be compared after adding
    (3d+4)/(d(d+4))·t. The estimate is the d in 1..D that minimises

        ‖(1/(d+2) - λ_j - (3d+4)/(d(d+4))·t)_{j<=d}‖ + 2t.

    Args:
        eigenvalues: (\*B, n); ``width``: D, the largest dimension considered (default n; eigenvalues beyond n
            are 0).

    Gilbert & O'Neill: "CA-PCA: Manifold dimension estimation, adapted for curvature", SIAM J. Math. Data
    Science, 2025.

    >>> import torch
    >>> ca_pca_dimension(torch.tensor([0.24, 0.23, 0.01])).item()
    2.0
    """
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
    return (misfit + 2 * tail).argmin(-1).double() + 1


class LocalKNN(LocalStage):
    r"""Local k-NN dimension ln 2/ln(r_2k/r_k), averaged over rows: see ``local_knn_from_distances``.

    Args:
        k: neighbours; 2k of them are looked at. ``"auto"``: max(2, min(int(√N), (N-1)//2)).
        pointwise: also write the rows' own estimates, (N,), as ``pointwise`` (NaN on later copies).
        source: ``"sample"`` (searches itself, in ``memory`` bytes) or ``"neighbors"`` (reads
            ``NearestNeighbors``'s ``distinct_distance`` and ``duplicates``).
        in_keys, out_keys: default roots ``"sample"`` or ``"neighbors"``, and ``("dimension", "local_knn")``.

    Writes ``estimate``, ``standard_error``, ``scale``, ``rows``, ``duplicates``, each ().

    >>> import torch, tdgeom as tg
    >>> sheet = torch.rand(500, 2, generator=torch.Generator().manual_seed(0))
    >>> estimate, *_, local = tg.LocalKNN(k=20, pointwise=True)(sample=sheet)
    >>> print(f"{estimate:.1f}", local.shape)
    1.9 torch.Size([500])
    """

    name = "local_knn"

    def __init__(
        self,
        *,
        k: int | Literal["auto"] = "auto",
        pointwise: bool = False,
        source: Literal["sample", "neighbors"] = "sample",
        memory: int | None = None,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        super().__init__(
            k=k,
            least=1,
            auto=True,
            pointwise=pointwise,
            source=source,
            memory=memory,
            in_keys=in_keys,
            out_keys=out_keys,
        )

    def neighbors_needed(self, n: int) -> int:
        """2k."""
        return 2 * auto_k(self.k, n)

    def local(self, distances: Tensor, duplicates: Tensor) -> tuple[DimensionEstimate, Tensor]:
        """The estimate and the rows' own."""
        return local_knn_from_distances(distances, duplicates, k=auto_k(self.k, distances.shape[-2]))


class LocalPCA(NeighborhoodStage):
    r"""Linear dimension of the k neighbours of every row, averaged: see ``local_pca``, rules in ``pca_dimension``.

    Args:
        k: neighbours a row, at least 2.
        rule, alpha, share: as in ``pca_dimension``.
        pointwise: also write the rows' own estimates, (N,), as ``pointwise`` (NaN on later copies).
        source: ``"sample"`` (searches itself, in ``memory`` bytes) or ``"neighbors"`` (reads the sample and
            ``NearestNeighbors``'s ``index``, ``distinct_distance``, ``duplicates``; with copies in the sample
            it searches again, for their table cannot serve distinct rows).
        in_keys, out_keys: default roots ``"sample"`` (and ``"neighbors"``), and ``("dimension",
            "local_pca")``.

    Writes ``estimate``, ``standard_error``, ``scale``, ``rows``, ``duplicates``, each ().

    >>> import torch, tdgeom as tg
    >>> sheet = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) @ torch.eye(2, 5)
    >>> float(tg.LocalPCA(k=20)(sample=sheet)[0])
    2.0
    """

    name = "local_pca"

    def __init__(
        self,
        *,
        k: int = 100,
        rule: str = "fukunaga_olsen",
        alpha: float = 0.05,
        share: float = 0.95,
        pointwise: bool = False,
        source: Literal["sample", "neighbors"] = "sample",
        memory: int | None = None,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        super().__init__(
            k=k,
            least=2,
            pointwise=pointwise,
            source=source,
            memory=memory,
            in_keys=in_keys,
            out_keys=out_keys,
        )
        self.rule, self.alpha, self.share = rule, alpha, share
        pca_dimension(torch.ones(1), rule=rule, alpha=alpha, share=share)  # refuses wrong settings now

    def local(
        self, x: Tensor, distances: Tensor, index: Tensor, duplicates: Tensor
    ) -> tuple[DimensionEstimate, Tensor]:
        """The estimate and the rows' own."""
        settings = {"rule": self.rule, "alpha": self.alpha, "share": self.share}
        return _local_pca(x, distances, index, duplicates, k=self.k, memory=self.memory, **settings)


class CAPCA(NeighborhoodStage):
    r"""Curvature-adjusted PCA dimension, averaged over rows: see ``ca_pca`` and ``ca_pca_dimension``.

    Args:
        k: neighbours a row; k+1 are looked at. ``"auto"``: max(2, min(int(√N), (N-1)//2)).
        pointwise: also write the rows' own estimates, (N,), as ``pointwise`` (NaN on later copies).
        source: ``"sample"`` (searches itself, in ``memory`` bytes) or ``"neighbors"`` (reads the sample and
            ``NearestNeighbors``'s ``index``, ``distinct_distance``, ``duplicates``; with copies in the sample
            it searches again, for their table cannot serve distinct rows).
        in_keys, out_keys: default roots ``"sample"`` (and ``"neighbors"``), and ``("dimension", "ca_pca")``.

    Writes ``estimate``, ``standard_error``, ``scale``, ``rows``, ``duplicates``, each ().

    >>> import torch, tdgeom as tg
    >>> sphere = torch.nn.functional.normalize(torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    >>> print(f"{tg.CAPCA(k=30)(sample=sphere)[0]:.1f}")
    2.0
    """

    name = "ca_pca"

    def __init__(
        self,
        *,
        k: int | Literal["auto"] = "auto",
        pointwise: bool = False,
        source: Literal["sample", "neighbors"] = "sample",
        memory: int | None = None,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        super().__init__(
            k=k,
            least=2,
            auto=True,
            pointwise=pointwise,
            source=source,
            memory=memory,
            in_keys=in_keys,
            out_keys=out_keys,
        )

    def neighbors_needed(self, n: int) -> int:
        """k + 1."""
        return auto_k(self.k, n) + 1

    def local(
        self, x: Tensor, distances: Tensor, index: Tensor, duplicates: Tensor
    ) -> tuple[DimensionEstimate, Tensor]:
        """The estimate and the rows' own."""
        return _ca_pca(x, distances, index, duplicates, k=auto_k(self.k, x.shape[-2]), memory=self.memory)
