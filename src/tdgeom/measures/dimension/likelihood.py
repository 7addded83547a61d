"""Local estimators from the distances to k neighbours: maximum likelihood (Levina-Bickel) and the method of moments."""

from __future__ import annotations

import torch
from torch import Tensor

from tdgeom.measures.dimension.estimate import (
    DimensionEstimate,
    LocalStage,
    copies_in,
    masked_mean,
    mean_estimate,
    need_columns,
)
from tdgeom.measures.neighbors.nearest_neighbors import distinct_neighbors
from tdgeom.numerics.centring import warn_undefined

__all__ = [
    "MOM",
    "LevinaBickel",
    "levina_bickel",
    "levina_bickel_from_distances",
    "mom",
    "mom_from_distances",
]


def levina_bickel(x: Tensor, *, k: int = 20, memory: int | None = None) -> DimensionEstimate:
    r"""Maximum-likelihood dimension of rows (\*B, N, D): see ``levina_bickel_from_distances``.

    Copies, exact or up to rounding, are dropped first and counted.

    >>> import torch
    >>> sheet = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))
    >>> print(f"{levina_bickel(sheet).estimate:.1f}")
    2.0
    """
    table = distinct_neighbors(x, k, memory=memory)
    return levina_bickel_from_distances(table.distance, table.duplicates, table.near_duplicates, k=k)[0]


def levina_bickel_from_distances(
    distances: Tensor,
    duplicates: Tensor | None = None,
    near_duplicates: Tensor | None = None,
    *,
    k: int = 20,
) -> tuple[DimensionEstimate, Tensor]:
    r"""Maximum-likelihood dimension of every row, combined by the harmonic mean.

    Formula:
        d_i = (k-1) / Σ_{j<k} ln(r_k/r_j); the distances of row i
        levina_bickel = n / Σ_i d_i⁻¹

    The harmonic mean is the maximum-likelihood estimate of one dimension for all rows (MacKay & Ghahramani);
    scikit-dimension's ``MLE`` with its defaults.

    Args:
        distances: (\*B, N, >=k) ascending; a row of NaN (a later copy) is left out. k >= 2.
        duplicates, near_duplicates: (\*B,) numbers of copies, passed on; None: the number of NaN rows, and -1.

    Returns:
        The ``DimensionEstimate`` ((\*B,) leaves; ``scale`` = mean r_k) and the rows' own estimates (\*B, N).
        ``standard_error`` is d·sd/√n of the inverse estimates about their mean: rows are taken as independent
        though they share neighbours, so the spread is up to a third larger (measured on spheres). NaN with a
        warning where no row has k distinct neighbours or all its distances agree.

    Levina & Bickel: "Maximum likelihood estimation of intrinsic dimension", NIPS 2004; MacKay & Ghahramani:
    comments on it, 2005.

    >>> import torch
    >>> result, local = levina_bickel_from_distances(torch.tensor([[1.0, 2.0], [1.0, 4.0]]), k=2)
    >>> [round(value, 4) for value in (*local.tolist(), result.estimate.item())]
    [1.4427, 0.7213, 0.9618]
    """
    if k < 2:
        raise ValueError(f"LevinaBickel: k is at least 2, got {k!r}.")
    near = need_columns(distances, k, "LevinaBickel")
    valid = torch.isfinite(near[..., -1]) & (near[..., 0] > 0)
    near = torch.where(valid.unsqueeze(-1), near, 1.0)
    inverse = (near[..., -1:] / near[..., :-1]).log().mean(-1)  # 1/d of a row
    mean = masked_mean(inverse, valid)
    rows = valid.sum(-1)
    spread = masked_mean((inverse - mean.unsqueeze(-1)).square(), valid) / (rows - 1).clamp(min=1).double()
    estimate = torch.where(mean > 0, 1 / mean, torch.nan)
    error = torch.where(rows > 1, estimate * spread.sqrt() / mean, torch.nan)
    warn_undefined(estimate, "LevinaBickel", f"no row has {k} distinct neighbours whose distances differ.")
    scale = masked_mean(near[..., -1], valid)
    local = torch.where(valid & (inverse > 0), 1 / inverse, torch.nan)
    copies = copies_in(distances, duplicates, near_duplicates)
    return DimensionEstimate(estimate, error, scale, rows, *copies), local


def mom(x: Tensor, *, k: int = 20, memory: int | None = None) -> DimensionEstimate:
    r"""Dimension of rows (\*B, N, D) by the method of moments: see ``mom_from_distances``.

    Copies, exact or up to rounding, are dropped first and counted.

    >>> import torch
    >>> sheet = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))
    >>> print(f"{mom(sheet).estimate:.1f}")
    2.2
    """
    table = distinct_neighbors(x, k, memory=memory)
    return mom_from_distances(table.distance, table.duplicates, table.near_duplicates, k=k)[0]


def mom_from_distances(
    distances: Tensor,
    duplicates: Tensor | None = None,
    near_duplicates: Tensor | None = None,
    *,
    k: int = 20,
) -> tuple[DimensionEstimate, Tensor]:
    r"""Method of moments, averaged over rows.

    Formula:
        mom = mean_i m_i/(r_k - m_i); m_i the mean of row i's k distances

    Args:
        distances: (\*B, N, >=k) ascending; a row of NaN (a later copy) is left out. k >= 2.
        duplicates, near_duplicates: (\*B,) numbers of copies, passed on; None: the number of NaN rows, and -1.

    Returns:
        The ``DimensionEstimate`` ((\*B,) leaves; ``scale`` = mean r_k) and the rows' own estimates (\*B, N).
        ``standard_error`` is sd/√n over rows, which share neighbours (the actual spread on spheres is up to a
        third larger). A row whose k distances agree has no estimate and is left out; NaN with a warning where
        no row is left.

    Amsaleg et al.: "Extreme-value-theoretic estimation of local intrinsic dimensionality", Data Mining and
    Knowledge Discovery 32 (2018). scikit-dimension's ``MOM``.

    >>> import torch
    >>> mom_from_distances(torch.tensor([[1.0, 2.0], [1.0, 3.0]]), k=2)[1].tolist()
    [3.0, 2.0]
    """
    if k < 2:
        raise ValueError(f"MOM: k is at least 2, got {k!r}.")
    near = need_columns(distances, k, "MOM")
    last = near[..., -1]
    first = near.mean(-1)
    # With all distances alike the difference is rounding, not a gap.
    gap = last - first
    apart = gap > 4 * torch.finfo(torch.float64).eps * last
    local = torch.where(apart, first / torch.where(apart, gap, 1.0), torch.nan)
    reason = f"no row has {k} distinct neighbours whose distances differ"
    return mean_estimate(local, last, copies_in(distances, duplicates, near_duplicates), "MOM", reason)


class LevinaBickel(LocalStage):
    r"""Maximum-likelihood intrinsic dimension (Levina & Bickel, harmonic average), see ``levina_bickel_from_distances``.

    Args:
        k: neighbours a row, at least 2.
        pointwise, source, memory, in_keys, out_keys: as in ``LocalStage``.

    >>> import torch, tdgeom as tg
    >>> sheet = torch.rand(500, 2, generator=torch.Generator().manual_seed(0))
    >>> estimate, *_, local = tg.LevinaBickel(k=10, pointwise=True)(sample=sheet)
    >>> print(f"{estimate:.1f}", local.shape)
    1.9 torch.Size([500])
    """

    name = "levina_bickel"

    local = staticmethod(levina_bickel_from_distances)


class MOM(LocalStage):
    r"""Intrinsic dimension by the method of moments, averaged over rows, see ``mom_from_distances``.

    Args:
        k: neighbours a row, at least 2.
        pointwise, source, memory, in_keys, out_keys: as in ``LocalStage``.

    >>> import torch, tdgeom as tg
    >>> sheet = torch.rand(500, 2, generator=torch.Generator().manual_seed(0))
    >>> print(f"{tg.MOM(k=10)(sample=sheet)[0]:.1f}")
    2.5
    """

    name = "mom"

    local = staticmethod(mom_from_distances)
