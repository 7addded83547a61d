"""What the eigenvalues of a covariance say about dimension, and RankMe."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from tdgeom.core.keys import Key, Keys
from tdgeom.core.stage import Stage
from tdgeom.core.warnings import UndefinedMeasureWarning
from tdgeom.measures.eigen_spectrum import covariance_eigenvalues
from tdgeom.numerics.centring import holds, real_rows, warn_undefined
from tdgeom.numerics.eigenvalues import refuse_truncated

__all__ = [
    "SPECTRUM_METRICS",
    "RankMe",
    "SpectrumMetrics",
    "alpha_req",
    "entropy_dimension",
    "log_spectrum_slope",
    "rankme",
    "spectrum_metrics",
]

SPECTRUM_METRICS = (
    "d_pr", "d_pr_norm", "d_entropy", "d_entropy_norm", "effective_rank", "stable_rank",
    "top1_share", "top10_share", "top32_share", "k90", "k95", "k99",
    "log_spectrum_slope_10_200", "alpha_req", "isoscore", "near_rank1",
)  # fmt: skip


def entropy_dimension(weights: Tensor) -> Tensor:
    """exp(-Σ p ln p) of p = weights/Σweights: (*B, D) -> (*B,), between 1 and D; NaN without weight.

    >>> entropy_dimension(torch.ones(4))
    tensor(4.)
    """
    p = weights / weights.sum(-1, keepdim=True)
    return torch.exp(-torch.xlogy(p, p).sum(-1))


def _weighted_slope(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Least-squares slope of y on x with weights on the squared residuals, along the last dimension."""
    total = weight.sum(-1, keepdim=True)
    x = x - (weight * x).sum(-1, keepdim=True) / total
    return (weight * x * y).sum(-1) / (weight * x * x).sum(-1)


def _slope_over_ranks(values: Tensor, first: int, last: int, x: Tensor, weight: Tensor) -> Tensor:
    # Only eigenvalues above rounding count: the logarithm of a numerical zero is noise, not a spectrum.
    part = values[..., first:last]
    floor = values[..., :1] * values.shape[-1] * torch.finfo(values.dtype).eps
    real = part > floor
    weight = torch.where(real, weight, 0.0)
    logs = torch.where(real, part, 1.0).log()
    slope = _weighted_slope(x.expand_as(logs), logs, weight.expand_as(logs))
    return torch.where((real.sum(-1) > 5) & ~part.isnan().any(-1), slope, torch.nan)


def _descending(eigenvalues: Tensor) -> Tensor:
    # torch.linalg.eigvalsh gives them ascending, and every measure of rank would be of the wrong end, without a word.
    eigenvalues = real_rows(eigenvalues, "a measure of eigenvalues")
    return eigenvalues.double().neg().sort(-1).values.neg()  # and NaN, of unknown ones, comes last


def log_spectrum_slope(eigenvalues: Tensor, first: int = 10, last: int = 200) -> Tensor:
    """Least-squares slope of ln λ on 0-based rank over ranks first..min(last, D)-1: (*B, D) -> (*B,).

    Eigenvalues, in any order, at rounding level (λ <= D·eps·λ₁) are left out; NaN with 5 or fewer points.

    >>> round(float(log_spectrum_slope(torch.exp(-0.1 * torch.arange(50.0).double()))), 6)
    -0.1
    """
    values = _descending(eigenvalues)
    last = max(min(last, values.shape[-1]), first)
    rank = torch.arange(first, last, dtype=torch.float64, device=values.device)
    return _slope_over_ranks(values, first, last, rank, torch.ones_like(rank))


def alpha_req(eigenvalues: Tensor, first: int = 11, last: int = 100) -> Tensor:
    """Power-law exponent of the spectrum: minus the slope of ln λ on ln rank, (*B, D) -> (*B,).

    1-based ranks first..min(last, D) of λ given in any order, squared residuals weighted 1/rank, λ above rounding only; NaN
    with 5 or fewer points. Stringer et al. (2019), High-dimensional geometry of population responses in visual cortex;
    Agrawal et al. (2022), alpha-ReQ.

    >>> round(float(alpha_req(torch.arange(1.0, 101.0).double() ** -1.5)), 6)
    1.5
    """
    values = _descending(eigenvalues)
    last = max(min(last, values.shape[-1]), first - 1)
    rank = torch.arange(first, last + 1, dtype=torch.float64, device=values.device)
    return -_slope_over_ranks(values, first - 1, last, rank.log(), 1 / rank)


def spectrum_metrics(
    eigenvalues: Tensor,
    *,
    total_variance: Tensor | None = None,
    d_pr: Tensor | None = None,
    alpha_ranks: tuple[int, int] = (11, 100),
) -> dict[str, Tensor]:
    """Every measure of ``SpectrumMetrics`` by name: (*B, D) eigenvalues in any order -> (*B,) each.

    float64, except the counts k90, k95, k99 (int64, -1 when undefined) and near_rank1 (bool). Of a spectrum whose leading
    part alone is known, NaN beyond, ``total_variance`` and ``d_pr`` (*B,) say what they can of the rest, and what they leave
    open is NaN and -1.

    >>> round(float(spectrum_metrics(torch.tensor([1.0, 1.0, 0.0]))["d_pr"]), 6)
    2.0
    """
    values = _descending(eigenvalues).clamp(min=0)
    d = values.shape[-1]
    total = values.sum(-1) if total_variance is None else total_variance.double()
    p = values / total.unsqueeze(-1)
    shares = p.cumsum(-1)
    d_pr = 1 / p.square().sum(-1) if d_pr is None else d_pr.double()
    d_entropy = entropy_dimension(values)
    top1 = p[..., 0]
    counts = {level: _components(shares, level / 100, total > 0) for level in (90, 95, 99)}
    return {
        "d_pr": d_pr,
        "d_pr_norm": d_pr / d,
        "d_entropy": d_entropy,
        "d_entropy_norm": d_entropy / d,
        "effective_rank": entropy_dimension(values.sqrt()),
        "stable_rank": 1 / top1,
        "top1_share": top1,
        "top10_share": p[..., :10].sum(-1),
        "top32_share": p[..., :32].sum(-1),
        **{f"k{level}": count for level, count in counts.items()},
        "log_spectrum_slope_10_200": log_spectrum_slope(values),
        "alpha_req": alpha_req(values, *alpha_ranks),
        "isoscore": (d_pr - 1) / (d - 1) if d > 1 else torch.full_like(d_pr, torch.nan),
        "near_rank1": (top1 >= 0.99) & (counts[90] <= 1) & (total > 0),
    }


def _components(shares: Tensor, level: float, defined: Tensor) -> Tensor:
    count = (shares < level).sum(-1).clamp(max=shares.shape[-1] - 1) + 1
    # Of a whole spectrum the last share is 1 but for rounding; of its leading part it may fall short.
    reached = (shares >= level).any(-1) | ~shares[..., -1].isnan()
    return torch.where(defined & reached, count, -1)


class SpectrumMetrics(Stage):
    """Sixteen scalars of a covariance spectrum; λ are eigenvalues (not singular values), p = λ/Σλ.

    ``d_pr`` = (Σλ)²/Σλ² participation ratio, in [1, D], and ``d_pr_norm`` = d_pr/D; ``d_entropy`` = exp(-Σ p ln p) and
    ``d_entropy_norm``; ``effective_rank`` = exp entropy of √λ/Σ√λ (Roy and Vetterli 2007 on centred singular values);
    ``stable_rank`` = Σλ/λ₁; ``top1_share``, ``top10_share``, ``top32_share`` = sum of the first p; ``k90``, ``k95``,
    ``k99`` = smallest k with that cumulative share; ``log_spectrum_slope_10_200``; ``alpha_req``; ``isoscore`` =
    (d_pr-1)/(D-1); ``near_rank1`` = top1_share >= 0.99 and k90 <= 1. All are free of the data's scale and rotation.

    Args:
        alpha_ranks: see ``alpha_req``.
        source: ``"eigenvalues"`` reads a whole spectrum (*B, D), in any order. ``"sketch"`` reads ``("sketch", "eigenvalues" |
            "total_variance" | "d_pr")`` of ``StreamingSketch``: measures of d_pr are the sketch's estimates, shares are those
            of its leading eigenvalues (never too large), and what needs the others is NaN (counts -1), with one warning.
        in_keys, out_keys: see ``Stage``.

    Writes ``("spectrum", name)`` (*B,). Without variance every measure is NaN (counts -1) and one
    ``UndefinedMeasureWarning`` says so.

    Raises:
        ValueError: negative values beyond rounding, which no covariance has; part of a spectrum in place of the whole.

        >>> import torch, tdgeom as tg
        >>> from tensordict import TensorDict
        >>> td = tg.SpectrumMetrics()(TensorDict(eigenvalues=torch.tensor([2.0, 1.0, 1.0])))
        >>> round(float(td["spectrum", "stable_rank"]), 3), int(td["spectrum", "k90"])
        (2.0, 3)
    """

    writes = [("spectrum", name) for name in SPECTRUM_METRICS]

    def __init__(
        self,
        *,
        alpha_ranks: tuple[int, int] = (11, 100),
        source: Literal["eigenvalues", "sketch"] = "eigenvalues",
        in_keys: Keys = None,
        out_keys: Keys = None,
    ) -> None:
        if source not in ("eigenvalues", "sketch"):
            raise ValueError(f"SpectrumMetrics: source is 'eigenvalues' or 'sketch', got {source!r}.")
        reads: dict[Key, str] = {"eigenvalues": "D"}
        if source == "sketch":
            reads = {("sketch", "eigenvalues"): "D", ("sketch", "total_variance"): "", ("sketch", "d_pr"): ""}
        super().__init__(in_keys=in_keys, out_keys=out_keys, reads=reads)
        self.alpha_ranks, self.source = alpha_ranks, source

    def compute(
        self, eigenvalues: Tensor, total_variance: Tensor | None = None, d_pr: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """See ``spectrum_metrics``."""
        metrics = spectrum_metrics(
            eigenvalues, total_variance=total_variance, d_pr=d_pr, alpha_ranks=self.alpha_ranks
        )
        negative = (eigenvalues.amin(-1) < -1e-3 * eigenvalues.abs().amax(-1)).any()
        if holds(negative | ~(metrics["d_entropy"] > 0).all()):  # one wait for the device
            self._refuse_or_warn(eigenvalues, metrics, negative)
        return metrics

    def _refuse_or_warn(self, eigenvalues: Tensor, metrics: dict[str, Tensor], negative: Tensor) -> None:
        key = self.in_keys[0]
        if holds(negative):
            raise ValueError(
                f"SpectrumMetrics expects {key!r} to hold the eigenvalues of a covariance, which are not "
                f"negative; got {float(eigenvalues.min()):.3g} (shape {tuple(eigenvalues.shape)}). From rows: "
                f"StreamingCovariance, then EigenSpectrum."
            )
        if self.source == "eigenvalues":
            refuse_truncated(eigenvalues, "SpectrumMetrics", key)
        says = "has no variance (or NaN), so its measures are NaN and -1"
        if holds((metrics["top1_share"] > 0).all()):
            lacks = [name for name, value in metrics.items() if holds((value.isnan() | (value == -1)).any())]
            says = (
                f"holds the {int((~eigenvalues.isnan()).sum(-1).min())} leading of {eigenvalues.shape[-1]} eigenvalues, which "
                f"leave {', '.join(lacks)} open: NaN (counts -1). StreamingSketch(k=) publishes more"
            )
        warnings.warn(f"SpectrumMetrics: {key!r} {says}", UndefinedMeasureWarning, stacklevel=4)


def rankme(count: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """exp entropy of s/Σs, s the singular values of the *uncentred* rows: (), (*B, D), (*B, D, D) -> (*B,).

    From moments: s² are the eigenvalues of (n-1)·covariance + n·mean·meanᵀ. Between 1 and D.

    >>> round(float(rankme(torch.tensor(3), torch.zeros(2), torch.eye(2))), 6)
    2.0
    """
    n = count.double()[..., None, None]
    mean, covariance = (real_rows(moment, "rankme").double() for moment in (mean, covariance))
    gram = (n - 1) * covariance + n * mean.unsqueeze(-1) * mean.unsqueeze(-2)
    return entropy_dimension(covariance_eigenvalues(gram).sqrt())


class RankMe(Stage):
    """Effective rank of the uncentred rows, from streamed moments of all of them.

    exp(-Σ q ln q), q = s/Σs, s the singular values of the (N, D) matrix of rows without centring (the centred form is
    ``effective_rank`` of ``SpectrumMetrics``). Between 1 and D; free of scale and rotation, not of offsets.

    Reads ``("moments", "count" | "mean" | "covariance")``; writes ``("spectrum", "rankme")``.

    Garrido et al. (2023), RankMe: assessing the downstream performance of pretrained self-supervised representations by
    their rank.

        >>> import torch, tdgeom as tg
        >>> stage = tg.RankMe()
        >>> round(float(stage(torch.tensor(9), torch.zeros(3), torch.eye(3))), 3)
        3.0
    """

    reads = {("moments", "count"): "", ("moments", "mean"): "D", ("moments", "covariance"): "D D"}
    writes = [("spectrum", "rankme")]
    one_thread_a_site = True

    def compute(self, count: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
        """See ``rankme``."""
        reason = f"{self.in_keys[2]!r} holds NaN or all rows are zero."
        return warn_undefined(rankme(count, mean, covariance), "RankMe", reason)
