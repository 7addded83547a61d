"""Gride: intrinsic dimension at many scales from ratios of the distances to the n-th and 2n-th neighbour."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tdgeom.measures.dimension.estimate import (
    DimensionEstimate,
    DimensionStage,
    copies_in,
    masked_mean,
    need_columns,
)
from tdgeom.measures.neighbors.nearest_neighbors import distinct_neighbors
from tdgeom.numerics.centring import warn_undefined
from tdgeom.numerics.quantiles import quantiles_of_numbers

__all__ = ["Gride", "gride", "gride_from_distances", "gride_ranks"]

_STEPS = 14  # Newton's method starts within a factor 2 of the root and squares its error at every step


def gride_ranks(range_max: int) -> list[int]:
    """The neighbour ranks n = 1, 2, 4, ... with 2n <= range_max at which Gride looks.

    >>> gride_ranks(64)
    [1, 2, 4, 8, 16, 32]
    """
    if range_max < 2:
        raise ValueError(f"Gride: range_max is at least 2, got {range_max!r}.")
    return [2**i for i in range(range_max.bit_length() - 1)]


def gride(
    x: Tensor, *, range_max: int = 64, compat: Literal["dadapy"] | None = None, memory: int | None = None
) -> DimensionEstimate:
    r"""Intrinsic dimension of rows (\*B, N, D) at many scales by Gride: see ``gride_from_distances``.

    Copies, exact or up to rounding, are dropped first and counted.

    >>> import torch
    >>> sheet = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0))
    >>> [round(d, 1) for d in gride(sheet, range_max=8).estimate.tolist()]
    [2.0, 1.8, 1.9]
    """
    ranks = gride_ranks(range_max)
    table = distinct_neighbors(x, 2 * ranks[-1], memory=memory)
    copies = table.duplicates, table.near_duplicates
    return gride_from_distances(table.distance, *copies, range_max=range_max, compat=compat)


def gride_from_distances(
    distances: Tensor,
    duplicates: Tensor | None = None,
    near_duplicates: Tensor | None = None,
    *,
    range_max: int = 64,
    compat: Literal["dadapy"] | None = None,
) -> DimensionEstimate:
    r"""Intrinsic dimension at n = 1, 2, 4, ... with 2n <= range_max, by maximum likelihood on μ = r_2n/r_n.

    Formula:
        0 = (N-1)/d - (2n-1) Σ ln μ + (n-1) Σ (ln μ)/(1 - μ^(-d)); the estimate is the root d; n = 1: TwoNN's "ml"
        standard_error = [N/d² + (n-1) Σ (ln μ)² μ^d/(μ^d - 1)²]^(-1/2); from the Fisher information
        scale = (mean r_n + mean r_2n)/2

    The left side falls and is convex in d, so Newton's method from below runs monotonically into the root,
    for all scales and data sets at once.

    Args:
        distances: (\*B, N, >= the last 2n) ascending; a row of NaN (a later copy) is left out.
        duplicates, near_duplicates: (\*B,) numbers of copies, passed on; None: the number of NaN rows, and -1.
        compat: ``"dadapy"`` leaves out ratios above q50 + 20 (q95 - q50) from the root, as DADApy does; None:
            no cut.

    Returns:
        leaves (\*B, scales), ``duplicates`` and ``near_duplicates`` (\*B,). NaN with a warning at scales where fewer than 3
        distinct rows have 2n neighbours or every r_2n = r_n.

    Denti, Doimo, Laio, Mira: "The generalized ratios intrinsic dimension estimator", Scientific
    Reports 12 (2022).

    >>> import torch
    >>> r = torch.tensor([[1.0, 2.0], [1.0, 4.0], [1.0, 8.0]], dtype=torch.float64)
    >>> print(f"{gride_from_distances(r, range_max=2).estimate.item():.6f}")
    0.480898
    """
    if compat not in (None, "dadapy"):
        raise ValueError(f"Gride: compat is None or 'dadapy', got {compat!r}.")
    ranks = torch.tensor(gride_ranks(range_max), device=distances.device)
    near = need_columns(distances, 2 * 2 ** (len(ranks) - 1), "Gride")
    inner, outer = near[..., ranks - 1].mT, near[..., 2 * ranks - 1].mT  # (*B, scales, N)
    valid = torch.isfinite(outer) & (inner > 0)
    inner, outer = torch.where(valid, inner, 1.0), torch.where(valid, outer, 1.0)
    log_ratio = (outer / inner).log()
    kept = valid & _below_cut(outer / inner, valid) if compat == "dadapy" else valid
    n = ranks.double()
    estimate = _root(log_ratio, kept, n)
    count = valid.sum(-1)
    t = estimate.unsqueeze(-1) * log_ratio
    informative = torch.where(valid & torch.isfinite(t), _fisher(t), 0.0).sum(-1)
    error = estimate * (count.double() + (n - 1) * informative).rsqrt()
    warn_undefined(
        estimate,
        "Gride",
        "a scale needs at least 3 distinct rows whose 2n-th neighbour is farther than the n-th.",
    )
    scale = masked_mean((inner + outer) / 2, valid)
    copies = copies_in(distances, duplicates, near_duplicates)
    return DimensionEstimate(estimate, error, scale, count, *copies)


def _root(log_ratio: Tensor, kept: Tensor, n: Tensor) -> Tensor:
    """The root (*B, scales) of the score, with the gradient of the implicit function."""
    count = kept.sum(-1).double()
    values = torch.where(kept, log_ratio, 0.0)
    total = values.sum(-1)
    with torch.no_grad():
        # t/(1-e^(-t)) <= 1 + t and >= t give the root's lower bound, and twice that is above it.
        d = ((count - 1) + (n - 1) * count) / ((2 * n - 1) * total)
        for _ in range(_STEPS):
            score, slope = _score(d, values, kept, n)
            d = d - score / slope
        _, slope = _score(d, values, kept, n)
    score, _ = _score(d, values, kept, n)
    d = d - score / slope
    return torch.where((count >= 3) & (total > 0) & torch.isfinite(d), d, torch.nan)


def _score(d: Tensor, values: Tensor, kept: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """The derivative of the log likelihood in d, and its own derivative."""
    t = d.unsqueeze(-1) * values
    weight = torch.where(t > 0, t / -torch.expm1(-torch.where(t > 0, t, 1.0)), 1.0)
    share = torch.where(kept, weight, 0.0).sum(-1)
    count = kept.sum(-1).double()
    score = (count - 1 + (n - 1) * share) / d - (2 * n - 1) * values.sum(-1)
    slope = -(count - 1 + (n - 1) * torch.where(kept, _fisher(t), 0.0).sum(-1)) / d.square()
    return score, slope


def _fisher(t: Tensor) -> Tensor:
    """t² e^t/(e^t - 1)² = (t/2 / sinh(t/2))², 1 at t = 0."""
    half = torch.where(t > 0, t, 1.0) / 2
    # sinh overflows beyond 700, where the quotient is 0 to every digit
    return torch.where(t > 0, (half / torch.sinh(half.clamp(max=350.0))).square(), 1.0)


def _below_cut(ratio: Tensor, valid: Tensor) -> Tensor:
    middle, high = quantiles_of_numbers(torch.where(valid, ratio, torch.nan), (0.5, 0.95))
    return ratio < (20 * (high - middle) + middle).unsqueeze(-1)


class Gride(DimensionStage):
    r"""Intrinsic dimension at many scales by Gride, from a sample (default) or from a neighbour table.

    The formulas, conventions and errors are those of ``gride_from_distances``.

    Args:
        range_max: highest neighbour rank; the scales are ``gride_ranks(range_max)`` (attribute ``ranks``).
        compat: ``"dadapy"`` for DADApy's cut of large ratios; None: every row counts.
        source, memory, in_keys, out_keys: as in ``DimensionStage``.

    Writes ``estimate``, ``standard_error``, ``scale``, ``rows``, each (scales,), ``duplicates`` and ``near_duplicates`` (), and
    ``rank`` (scales,) int64, the n of each scale.

    >>> import torch, tdgeom as tg
    >>> stage = tg.Gride(range_max=4)
    >>> estimate, *_ = stage(sample=torch.rand(500, 2, generator=torch.Generator().manual_seed(0)))
    >>> stage.ranks, estimate.shape
    ([1, 2], torch.Size([2]))
    """

    name = "gride"

    def __init__(
        self,
        *,
        range_max: int = 64,
        compat: Literal["dadapy"] | None = None,
        **source_and_keys: Any,
    ) -> None:
        super().__init__(further=["rank"], **source_and_keys)
        if compat not in (None, "dadapy"):
            raise ValueError(f"Gride: compat is None or 'dadapy', got {compat!r}.")
        self.range_max, self.compat = range_max, compat
        self.ranks = gride_ranks(range_max)

    def neighbors_needed(self, n: int) -> int:
        """The highest rank."""
        return 2 * self.ranks[-1]

    def measure(self, distances: Tensor, *copies: Tensor) -> tuple[Tensor, ...]:
        """The outputs, and at which ranks."""
        found = gride_from_distances(distances, *copies, range_max=self.range_max, compat=self.compat)
        ranks = torch.tensor(self.ranks, device=distances.device)
        return (*found, ranks.expand(found.estimate.shape).clone())
