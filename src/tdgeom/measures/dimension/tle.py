"""Tight locality estimation: the maximum-likelihood dimension from all pairs within a neighbourhood."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tdgeom.measures.dimension.estimate import (
    DimensionEstimate,
    NeighborhoodStage,
    copies_in,
    mean_estimate,
    need_columns,
)
from tdgeom.measures.dimension.neighbourhoods import over_neighbourhoods
from tdgeom.measures.neighbors.nearest_neighbors import distinct_neighbors

__all__ = ["TLE", "tle", "tle_from_neighbors"]


def tle(x: Tensor, *, k: int = 20, epsilon: float = 1e-4, memory: int | None = None) -> DimensionEstimate:
    r"""Tight local intrinsic dimension of rows (\*B, N, D): see ``tle_from_neighbors``.

    Copies, exact or up to rounding, are dropped first and counted.

    >>> import torch
    >>> sheet = torch.rand(500, 2, generator=torch.Generator().manual_seed(0))
    >>> print(f"{tle(sheet).estimate:.1f}")
    2.1
    """
    table = distinct_neighbors(x, k, memory=memory)
    return tle_from_neighbors(
        x,
        table.distance,
        table.index,
        table.duplicates,
        table.near_duplicates,
        k=k,
        epsilon=epsilon,
        memory=memory,
    )[0]


def tle_from_neighbors(
    x: Tensor,
    distances: Tensor,
    index: Tensor,
    duplicates: Tensor | None = None,
    near_duplicates: Tensor | None = None,
    *,
    k: int = 20,
    epsilon: float = 1e-4,
    memory: int | None = None,
) -> tuple[DimensionEstimate, Tensor]:
    r"""Tight local estimation: maximum likelihood over all k² pairs of a neighbourhood, averaged over rows.

    Every two neighbours v, w of a row at distances d_v, d_w contribute two distances: that at which w is seen
    from v inside the ball of radius r_k that touches the neighbourhood, and the same for the reflection of w
    through the row.

    Formula:
        d_i = -m / Σ ln(t/r_k); t the m distances so measured
        tle = mean_i d_i

    As scikit-dimension's ``TLE``, except that ``epsilon`` (measurements below it are dropped) is relative to
    r_k where scikit-dimension compares with an absolute 1e-4: the estimate does not depend on the unit.

    Args:
        x: (\*B, N, D) the rows. distances, index: (\*B, N, >=k) their neighbours among distinct rows
            (``distinct_neighbors``); a row of NaN (a later copy) is left out. k >= 3.
        duplicates, near_duplicates: (\*B,) numbers of copies, passed on; None: the number of NaN rows, and -1.
        memory: bytes that the neighbourhoods at work may take.

    Returns:
        The ``DimensionEstimate`` ((\*B,) leaves; ``scale`` = mean r_k) and the rows' own estimates (\*B, N).
        ``standard_error`` is sd/√n over rows, which share neighbours (the actual spread on spheres is up to a
        third larger). NaN with a warning where no row has k distinct neighbours at different distances.

    Amsaleg, Chelly, Houle, Kawarabayashi, Radovanović, Treeratanajaru: "Intrinsic dimensionality estimation
    within tight localities", SDM 2019.

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
    local = over_neighbourhoods(x, near, index, k, memory, partial(_tight, epsilon=epsilon))
    local = torch.where(near[..., 0] > 0, local, torch.nan)
    reason = f"no row has {k} distinct neighbours whose distances differ"
    return mean_estimate(
        local, near[..., -1], copies_in(distances, duplicates, near_duplicates), "TLE", reason
    )


def _tight(rows: Tensor, near: Tensor, *, epsilon: float) -> Tensor:
    """One estimate a row, from its neighbours (n, k, D) about it and their distances (n, k)."""
    k = near.shape[-1]
    y, u = rows / near[:, -1:, None], near / near[:, -1:]
    own, other = (u * u).unsqueeze(-1), (u * u).unsqueeze(-2)
    gram = y @ y.mT
    apart = (own + other - 2 * gram).clamp(min=0)  # squared distances between neighbours
    mirrored = (own + other + 2 * gram).clamp(min=0)  # and to their reflections
    seen = torch.stack([_seen(square, own, other) for square in (apart, mirrored)])
    diagonal = torch.eye(k, dtype=torch.bool, device=near.device)
    dropped = (~(seen >= epsilon)).any(0) & ~diagonal
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
    outward = b > 0
    # Roots of nothing and branches not taken keep a derivative of zero: no NaN may reach the others'.
    root = (b * b + 4 * square * a).clamp(min=1e-300).sqrt()
    # The form without a difference also holds on the sphere itself, where a = 0.
    plain = 2 * square / torch.where(outward, root + b, 1.0)
    return torch.where(outward, plain, (root - b) / torch.where(a > 0, 2 * a, torch.inf))


class TLE(NeighborhoodStage):
    r"""Tight local intrinsic dimension, averaged over rows, see ``tle_from_neighbors``.

    Args:
        k: neighbours a row, at least 3.
        epsilon: measurements below this share of r_k are dropped.
        pointwise, source, memory, in_keys, out_keys: as in ``NeighborhoodStage``.

    >>> import torch, tdgeom as tg
    >>> sheet = torch.rand(500, 2, generator=torch.Generator().manual_seed(0))
    >>> print(f"{tg.TLE(k=20)(sample=sheet)[0]:.1f}")
    2.1
    """

    name = "tle"
    least = 3

    def __init__(self, *, k: int = 20, epsilon: float = 1e-4, **others: Any) -> None:
        super().__init__(k=k, **others)
        self.epsilon = epsilon

    def local(
        self, x: Tensor, index: Tensor, distances: Tensor, *copies: Tensor, k: int
    ) -> tuple[DimensionEstimate, Tensor]:
        """The estimate and the rows' own."""
        return tle_from_neighbors(x, distances, index, *copies, k=k, epsilon=self.epsilon, memory=self.memory)
