"""Local estimators: the growth of a neighbourhood, and the spectrum of a neighbourhood's covariance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from tdgeom.measures.dimension.estimate import (
    DimensionEstimate,
    LocalStage,
    NeighborhoodStage,
    auto_k,
    copies_in,
    mean_estimate,
    need_columns,
)
from tdgeom.measures.dimension.neighbourhoods import over_neighbourhoods
from tdgeom.measures.dimension.pca import LOCAL_PCA_RULES, counting_rule, spectrum_of
from tdgeom.measures.neighbors.nearest_neighbors import distinct_neighbors

__all__ = ["LocalKNN", "LocalPCA", "local_knn", "local_knn_from_distances", "local_pca"]


def local_knn(
    x: Tensor, *, k: int | Literal["auto"] = "auto", memory: int | None = None
) -> DimensionEstimate:
    r"""Dimension of rows (\*B, N, D) from the growth of neighbourhoods: see ``local_knn_from_distances``.

    ``k="auto"``: max(2, min(int(√N), (N-1)//2)). Copies, exact or up to rounding, are dropped first and counted.

    >>> import torch
    >>> sheet = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))
    >>> print(f"{local_knn(sheet, k=30).estimate:.1f}")
    2.0
    """
    k = auto_k(k, x)
    table = distinct_neighbors(x, 2 * k, memory=memory)
    return local_knn_from_distances(table.distance, table.duplicates, table.near_duplicates, k=k)[0]


def local_knn_from_distances(
    distances: Tensor,
    duplicates: Tensor | None = None,
    near_duplicates: Tensor | None = None,
    *,
    k: int,
) -> tuple[DimensionEstimate, Tensor]:
    r"""Local k-NN dimension, averaged over rows.

    Formula:
        local_knn = mean_i ln 2 / ln(r_2k/r_k)

    Args:
        distances: (\*B, N, >=2k) ascending; a row of NaN (a later copy) is left out. k >= 1.
        duplicates, near_duplicates: (\*B,) numbers of copies, passed on; None: the number of NaN rows, and -1.

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
    reason = f"no row has {2 * k} distinct neighbours, the last farther than number {k}"
    copies = copies_in(distances, duplicates, near_duplicates)
    return mean_estimate(local, (inner + outer) / 2, copies, "LocalKNN", reason)


def local_pca(
    x: Tensor,
    *,
    k: int | Literal["auto"] = 100,
    rule: str = "fukunaga_olsen",
    alpha: float = 0.05,
    share: float = 0.95,
    memory: int | None = None,
) -> DimensionEstimate:
    r"""Linear dimension of every row's k nearest neighbours (\*B, N, D), averaged: rules as in ``pca_dimension``.

    A neighbourhood is the k neighbours without the row itself, about their own mean (scikit-dimension's
    ``lPCA().fit_pw``; tdhook adds the row); rules count over its min(k-1, D) eigenvalues. ``k="auto"``: max(2, min(int(√N),
    (N-1)//2)). Copies, exact or up to rounding, are dropped first and counted. ``scale`` is mean r_k; ``standard_error`` sd/√n
    over rows, which share neighbours (the actual spread on spheres is up to a third larger).

    >>> import torch
    >>> angle = 6.28 * torch.rand(500, 1, generator=torch.Generator().manual_seed(0))
    >>> circle = torch.cat((angle.cos(), angle.sin()), -1)
    >>> print(f"{local_pca(circle, k=20).estimate:.1f}")
    1.0
    """
    k = auto_k(k, x)
    table = distinct_neighbors(x, k, memory=memory)
    count = counting_rule(rule, alpha, share, LOCAL_PCA_RULES)
    copies = table.duplicates, table.near_duplicates
    return _local_pca(x, table.index, table.distance, *copies, k=k, memory=memory, count=count)[0]


def _local_pca(
    x: Tensor,
    index: Tensor,
    distances: Tensor,
    duplicates: Tensor,
    near_duplicates: Tensor | None = None,
    *,
    k: int,
    memory: int | None,
    count: Callable[..., Tensor],
) -> tuple[DimensionEstimate, Tensor]:
    near = need_columns(distances, k, "LocalPCA")

    def measure(rows: Tensor, _: Tensor) -> Tensor:
        number = torch.full((len(rows),), min(k - 1, x.shape[-1]), device=rows.device)
        return count(spectrum_of(rows), number=number)

    local = over_neighbourhoods(x, near, index, k, memory, measure)
    copies = copies_in(distances, duplicates, near_duplicates)
    return mean_estimate(local, near[..., -1], copies, "LocalPCA", f"no row has {k} distinct neighbours")


class LocalKNN(LocalStage):
    r"""Local k-NN dimension ln 2/ln(r_2k/r_k), averaged over rows: see ``local_knn_from_distances``.

    Args:
        k: neighbours; 2k of them are looked at. ``"auto"``: max(2, min(int(√N), (N-1)//2)).
        pointwise, source, memory, in_keys, out_keys: as in ``LocalStage``.

    >>> import torch, tdgeom as tg
    >>> sheet = torch.rand(500, 2, generator=torch.Generator().manual_seed(0))
    >>> estimate, *_, local = tg.LocalKNN(k=20, pointwise=True)(sample=sheet)
    >>> print(f"{estimate:.1f}", local.shape)
    1.9 torch.Size([500])
    """

    name = "local_knn"
    least, auto = 1, True
    local = staticmethod(local_knn_from_distances)

    def __init__(self, *, k: int | Literal["auto"] = "auto", **others: Any) -> None:
        super().__init__(k=k, **others)

    def neighbors_needed(self, n: int) -> int:
        """2k."""
        return 2 * auto_k(self.k, n)


class LocalPCA(NeighborhoodStage):
    r"""Linear dimension of the k neighbours of every row, averaged: see ``local_pca``, rules in ``pca_dimension``.

    Args:
        k: neighbours a row, at least 2. ``"auto"``: max(2, min(int(√N), (N-1)//2)).
        rule, alpha, share: as in ``pca_dimension``.
        pointwise, source, memory, in_keys, out_keys: as in ``NeighborhoodStage``.

    >>> import torch, tdgeom as tg
    >>> sheet = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) @ torch.eye(2, 5)
    >>> float(tg.LocalPCA(k=20)(sample=sheet)[0])
    2.0
    """

    name = "local_pca"
    auto = True

    def __init__(
        self,
        *,
        k: int | Literal["auto"] = 100,
        rule: str = "fukunaga_olsen",
        alpha: float = 0.05,
        share: float = 0.95,
        **others: Any,
    ) -> None:
        super().__init__(k=k, **others)
        self.count = counting_rule(rule, alpha, share, LOCAL_PCA_RULES)

    def local(self, *table: Tensor, k: int) -> tuple[DimensionEstimate, Tensor]:
        """The estimate and the rows' own."""
        return _local_pca(*table, k=k, memory=self.memory, count=self.count)
