"""Local estimators from the distances to k neighbours: Levina-Bickel, method of moments, tight locality."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tdgeom.dimension._estimate import (
    DimensionEstimate,
    LocalStage,
    NeighborhoodStage,
    masked_mean,
    mean_estimate,
    need_columns,
    warn_undefined,
)
from tdgeom.keys import Key
from tdgeom.neighbors._blocks import budget
from tdgeom.neighbors.knn import distinct_neighbors

__all__ = [
    "MOM",
    "TLE",
    "LevinaBickel",
    "levina_bickel",
    "levina_bickel_from_distances",
    "mom",
    "mom_from_distances",
    "tle",
    "tle_from_neighbors",
]


def levina_bickel(x: Tensor, *, k: int = 20, memory: int | None = None) -> DimensionEstimate:
    r"""Maximum-likelihood dimension of rows (\*B, N, D): see ``levina_bickel_from_distances``.

    Exact copies are dropped first and counted.

    >>> import torch
    >>> sheet = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))
    >>> print(f"{levina_bickel(sheet).estimate:.1f}")
    2.0
    """
    table = distinct_neighbors(x, k, memory=memory)
    return levina_bickel_from_distances(table.distance, table.duplicates, k=k)[0]


def levina_bickel_from_distances(
    distances: Tensor, duplicates: Tensor | None = None, *, k: int = 20
) -> tuple[DimensionEstimate, Tensor]:
    r"""Maximum-likelihood dimension: per row (k-1)/Σ_{j<k} ln(r_k/r_j), combined by the harmonic mean.

    The harmonic mean is the maximum-likelihood estimate of one dimension for all rows (MacKay & Ghahramani);
    scikit-dimension's ``MLE`` with its defaults.

    Args:
        distances: (\*B, N, >=k) ascending; a row of NaN (a later copy) is left out. k >= 2.
        duplicates: (\*B,) number of copies, passed on; None: the number of rows left out.

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
    warn_undefined(estimate, "LevinaBickel", f"no row has {k} distinct neighbours whose distances differ")
    if duplicates is None:
        duplicates = distances.shape[-2] - rows
    scale = masked_mean(near[..., -1], valid)
    local = torch.where(valid & (inverse > 0), 1 / inverse, torch.nan)
    return DimensionEstimate(estimate, error, scale, rows, duplicates), local


def mom(x: Tensor, *, k: int = 20, memory: int | None = None) -> DimensionEstimate:
    r"""Dimension of rows (\*B, N, D) by the method of moments: see ``mom_from_distances``.

    Exact copies are dropped first and counted.

    >>> import torch
    >>> sheet = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))
    >>> print(f"{mom(sheet).estimate:.1f}")
    2.2
    """
    table = distinct_neighbors(x, k, memory=memory)
    return mom_from_distances(table.distance, table.duplicates, k=k)[0]


def mom_from_distances(
    distances: Tensor, duplicates: Tensor | None = None, *, k: int = 20
) -> tuple[DimensionEstimate, Tensor]:
    r"""Method of moments: per row m₁/(r_k - m₁), m₁ the mean of the k distances; averaged over rows.

    Args:
        distances: (\*B, N, >=k) ascending; a row of NaN (a later copy) is left out. k >= 2.
        duplicates: (\*B,) number of copies, passed on; None: the number of NaN rows.

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
    duplicates = _copies(near) if duplicates is None else duplicates
    reason = f"no row has {k} distinct neighbours whose distances differ"
    return mean_estimate(local, last, duplicates, "MOM", reason)


def tle(x: Tensor, *, k: int = 20, epsilon: float = 1e-4, memory: int | None = None) -> DimensionEstimate:
    r"""Tight local intrinsic dimension of rows (\*B, N, D): see ``tle_from_neighbors``.

    Exact copies are dropped first and counted.

    >>> import torch
    >>> sheet = torch.rand(500, 2, generator=torch.Generator().manual_seed(0))
    >>> print(f"{tle(sheet).estimate:.1f}")
    2.1
    """
    table = distinct_neighbors(x, k, memory=memory)
    return tle_from_neighbors(
        x, table.distance, table.index, table.duplicates, k=k, epsilon=epsilon, memory=memory
    )[0]


def tle_from_neighbors(
    x: Tensor,
    distances: Tensor,
    index: Tensor,
    duplicates: Tensor | None = None,
    *,
    k: int = 20,
    epsilon: float = 1e-4,
    memory: int | None = None,
) -> tuple[DimensionEstimate, Tensor]:
    r"""Tight local estimation: maximum likelihood over all k² pairs of a neighbourhood, averaged over rows.

    Every two neighbours v, w of a row at distances d_v, d_w contribute two distances: that at which w is seen
        from v
    inside the ball of radius r_k that touches the neighbourhood, and the same for the reflection of w through
    the row. A row's estimate is minus the number of measurements over the sum of their ln(distance/r_k).

    As scikit-dimension's ``TLE``, except that ``epsilon`` (measurements below it are dropped) is relative to
    r_k where scikit-dimension compares with an absolute 1e-4: the estimate does not depend on the unit.

    Args:
        x: (\*B, N, D) the rows. distances, index: (\*B, N, >=k) their neighbours among distinct rows
            (``distinct_neighbors``); a row of NaN (a later copy) is left out. k >= 3.
        duplicates: (\*B,) number of copies, passed on; None: the number of NaN rows.
        memory: bytes that the neighbourhoods at work may take.

    Returns:
        The ``DimensionEstimate`` ((\*B,) leaves; ``scale`` = mean r_k) and the rows' own estimates (\*B, N).
        ``standard_error`` is sd/√n over rows, which share neighbours (the actual spread on spheres is up to a
        third larger). NaN with a warning where no row has k distinct neighbours at different distances.

    Amsaleg, Chelly, Houle, Kawarabayashi, Radovanović, Treeratanajaru: "Intrinsic dimensionality estimation
        within
    tight localities", SDM 2019.

    >>> import torch
    >>> line = torch.linspace(0, 1, 60).square()[:, None] @ torch.ones(1, 4)
    >>> table = distinct_neighbors(line, 10)
    >>> result, local = tle_from_neighbors(line, table.distance, table.index, k=10)
    >>> print(f"{result.estimate:.1f}", local.shape)
    1.2 torch.Size([60])
    """
    if k < 3:
        raise ValueError(f"TLE: k is at least 3, got {k!r}.")
    near = need_columns(distances, k, "TLE")
    width = x.shape[-1]
    flat = x.reshape(-1, width)
    offset = torch.arange(flat.shape[0] // x.shape[-2], device=x.device) * x.shape[-2]
    index = (index[..., :k].reshape(len(offset), -1, k) + offset[:, None, None]).reshape(-1, k)
    near_flat = near.reshape(-1, k)
    which = (torch.isfinite(near_flat[:, -1]) & (near_flat[:, 0] > 0)).nonzero().squeeze(-1)
    step = max(1, budget(memory) // (8 * k * (2 * width + 12 * k)))
    parts = [_tight(flat, rows, near_flat[rows], index[rows], epsilon) for rows in which.split(step)]
    local = near_flat.new_full((len(flat),), torch.nan)
    if parts:
        local = local.index_put((which,), torch.cat(parts))
    duplicates = _copies(near) if duplicates is None else duplicates
    reason = f"no row has {k} distinct neighbours whose distances differ"
    return mean_estimate(local.view(near.shape[:-1]), near[..., -1], duplicates, "TLE", reason)


def _tight(flat: Tensor, rows: Tensor, near: Tensor, index: Tensor, epsilon: float) -> Tensor:
    """One estimate for each row in ``rows``, from its neighbours at ``index`` (n, k)."""
    k = index.shape[-1]
    radius = near[:, -1:, None]
    y = (flat[index].double() - flat[rows].double().unsqueeze(1)) / radius
    u = near / near[:, -1:]
    own, other = (u * u).unsqueeze(-1), (u * u).unsqueeze(-2)
    gram = y @ y.mT
    apart = (own + other - 2 * gram).clamp(min=0)  # squared distances between neighbours
    mirrored = (own + other + 2 * gram).clamp(min=0)  # and to their reflections
    seen = torch.stack([_seen(square, own, other) for square in (apart, mirrored)])
    diagonal = torch.eye(k, dtype=torch.bool, device=flat.device)
    dropped = (~(seen >= epsilon)).any(0) & ~diagonal  # not(>=) drops NaN too
    skip = dropped | diagonal
    pairs = torch.where(skip, 1.0, seen).log().sum((0, -1, -2))
    close = u < epsilon
    singles = torch.where(close, 1.0, u).log().sum(-1)
    count = k**2 - dropped.sum((-1, -2)) - close.sum(-1)
    return torch.where(pairs < -epsilon, -2 * count.double() / (pairs + 2 * singles), torch.nan)


def _seen(square: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Distance of a neighbour seen from another, as a share of the radius: the root in (0, 1] of a quadratic."""
    b = own + square - other
    a = 1 - own
    root = (b * b + 4 * square * a).clamp(min=0).sqrt()
    # The form without a difference: it also holds on the sphere itself, where a = 0.
    plain = torch.where(b > 0, 2 * square / torch.where(b > 0, root + b, 1.0), torch.nan)
    inner = a > 0
    return torch.where(b > 0, plain, (root - b) / torch.where(inner, 2 * a, torch.nan))


def _copies(near: Tensor) -> Tensor:
    return near.shape[-2] - torch.isfinite(near[..., 0]).sum(-1)


class LevinaBickel(LocalStage):
    r"""Maximum-likelihood intrinsic dimension (Levina & Bickel, harmonic average), see ``levina_bickel_from_distances``.

    Args:
        k: neighbours a row, at least 2.
        pointwise: also write the rows' own estimates, (N,), as ``pointwise`` (NaN on later copies).
        source: ``"sample"`` (searches itself, in ``memory`` bytes) or ``"neighbors"`` (reads
            ``NearestNeighbors``'s ``distinct_distance`` and ``duplicates``).
        in_keys, out_keys: default roots ``"sample"`` or ``"neighbors"``, and ``("dimension",
            "levina_bickel")``.

    Writes ``estimate``, ``standard_error``, ``scale``, ``rows``, ``duplicates``, each ().

    >>> import torch, tdgeom as tg
    >>> sheet = torch.rand(500, 2, generator=torch.Generator().manual_seed(0))
    >>> estimate, *_, local = tg.LevinaBickel(k=10, pointwise=True)(sample=sheet)
    >>> print(f"{estimate:.1f}", local.shape)
    1.9 torch.Size([500])
    """

    name = "levina_bickel"

    def __init__(
        self,
        *,
        k: int = 20,
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

    def local(self, distances: Tensor, duplicates: Tensor) -> tuple[DimensionEstimate, Tensor]:
        """The estimate and the rows' own."""
        return levina_bickel_from_distances(distances, duplicates, k=self.k)


class MOM(LocalStage):
    r"""Intrinsic dimension by the method of moments, averaged over rows, see ``mom_from_distances``.

    Args:
        k: neighbours a row, at least 2.
        pointwise: also write the rows' own estimates, (N,), as ``pointwise`` (NaN on later copies).
        source: ``"sample"`` (searches itself, in ``memory`` bytes) or ``"neighbors"`` (reads
            ``NearestNeighbors``'s ``distinct_distance`` and ``duplicates``).
        in_keys, out_keys: default roots ``"sample"`` or ``"neighbors"``, and ``("dimension", "mom")``.

    Writes ``estimate``, ``standard_error``, ``scale``, ``rows``, ``duplicates``, each ().

    >>> import torch, tdgeom as tg
    >>> sheet = torch.rand(500, 2, generator=torch.Generator().manual_seed(0))
    >>> print(f"{tg.MOM(k=10)(sample=sheet)[0]:.1f}")
    2.5
    """

    name = "mom"

    def __init__(
        self,
        *,
        k: int = 20,
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

    def local(self, distances: Tensor, duplicates: Tensor) -> tuple[DimensionEstimate, Tensor]:
        """The estimate and the rows' own."""
        return mom_from_distances(distances, duplicates, k=self.k)


class TLE(NeighborhoodStage):
    r"""Tight local intrinsic dimension, averaged over rows, see ``tle_from_neighbors``.

    Args:
        k: neighbours a row, at least 3.
        epsilon: measurements below this share of r_k are dropped.
        pointwise: also write the rows' own estimates, (N,), as ``pointwise`` (NaN on later copies).
        source: ``"sample"`` (searches itself, in ``memory`` bytes) or ``"neighbors"`` (reads the sample and
            ``NearestNeighbors``'s ``index``, ``distinct_distance``, ``duplicates``; with copies in the sample
            it searches again, for their table cannot serve distinct rows).
        in_keys, out_keys: default roots ``"sample"`` (and ``"neighbors"``), and ``("dimension", "tle")``.

    Writes ``estimate``, ``standard_error``, ``scale``, ``rows``, ``duplicates``, each ().

    >>> import torch, tdgeom as tg
    >>> sheet = torch.rand(500, 2, generator=torch.Generator().manual_seed(0))
    >>> print(f"{tg.TLE(k=20)(sample=sheet)[0]:.1f}")
    2.1
    """

    name = "tle"

    def __init__(
        self,
        *,
        k: int = 20,
        epsilon: float = 1e-4,
        pointwise: bool = False,
        source: Literal["sample", "neighbors"] = "sample",
        memory: int | None = None,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        super().__init__(
            k=k,
            least=3,
            pointwise=pointwise,
            source=source,
            memory=memory,
            in_keys=in_keys,
            out_keys=out_keys,
        )
        self.epsilon = epsilon

    def local(
        self, x: Tensor, distances: Tensor, index: Tensor, duplicates: Tensor
    ) -> tuple[DimensionEstimate, Tensor]:
        """The estimate and the rows' own."""
        return tle_from_neighbors(
            x, distances, index, duplicates, k=self.k, epsilon=self.epsilon, memory=self.memory
        )
