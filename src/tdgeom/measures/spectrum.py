"""Covariance spectra: eigenvalues, what they say about dimension, and RankMe."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.core.stage import Stage
from tdgeom.core.warnings import UndefinedMeasureWarning
from tdgeom.numerics.eigenvalues import leading_eigenpairs, symmetric_eigenvalues

__all__ = [
    "SPECTRUM_METRICS",
    "EigenSpectrum",
    "RankMe",
    "SpectrumMetrics",
    "alpha_req",
    "eigen_spectrum",
    "entropy_dimension",
    "log_spectrum_slope",
    "rankme",
    "spectrum_metrics",
]

SPECTRUM_METRICS = (
    "d_pr",
    "d_pr_norm",
    "d_entropy",
    "d_entropy_norm",
    "effective_rank",
    "stable_rank",
    "top1_share",
    "top10_share",
    "top32_share",
    "k90",
    "k95",
    "k99",
    "log_spectrum_slope_10_200",
    "alpha_req",
    "isoscore",
    "near_rank1",
)


def eigen_spectrum(
    covariance: Tensor, k: int = 32, rank: int | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending and clipped at 0, and the first k eigenvectors as columns, of (*B, D, D).

    float64 throughout. Returns (*B, D) and (*B, D, min(k, D)); the sign of each vector is fixed (its largest-magnitude
    entry is positive). Eigenvalues beyond ``rank`` (rows less 1; an int or (*B,)) are exactly 0. A covariance that is not
    finite gives NaN.

    >>> eigen_spectrum(torch.diag(torch.tensor([1.0, 4.0])), k=1)[0]
    tensor([4., 1.], dtype=torch.float64)
    """
    covariance = covariance.double()
    k = min(k, covariance.shape[-1])
    # eigh raises on NaN: such a matrix goes in as zeros and comes out as NaN, the others of the batch as they are.
    finite = torch.isfinite(covariance).all(-1).all(-1)[..., None]
    values, vectors = leading_eigenpairs(torch.where(finite[..., None], covariance, 0.0), k)
    vectors = vectors.flip(-1)
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
    values = torch.where(finite, _zero_beyond(values.flip(-1).clamp(min=0), rank), torch.nan)
    return values, torch.where(finite[..., None], vectors, torch.nan)


def _zero_beyond(values: Tensor, rank: int | Tensor | None) -> Tensor:
    """What is left beyond the rank is rounding, and measures of √λ would count it."""
    if rank is None:
        return values
    if isinstance(rank, Tensor):
        rank = rank.to(values.device).unsqueeze(-1)
    within = torch.arange(values.shape[-1], device=values.device) < rank
    return torch.where(within, values, torch.zeros_like(values))


def covariance_eigenvalues(covariance: Tensor, rank: int | Tensor | None = None) -> Tensor:
    """Eigenvalues of (*B, D, D), descending, clipped at 0, and exactly 0 beyond ``rank``; NaN where it is not finite."""
    covariance = covariance.double()
    finite = torch.isfinite(covariance).all(-1).all(-1)[..., None]
    values = symmetric_eigenvalues(torch.where(finite[..., None], covariance, 0.0)).flip(-1).clamp(min=0)
    return torch.where(finite, _zero_beyond(values, rank), torch.nan)


class EigenSpectrum(Stage):
    """Eigenvalues of a covariance, all of them, and its leading eigenvectors.

    λ descending, clipped at 0; eigenvectors as columns with a fixed sign. The covariance is taken as it is (unbiased and
    centred when it comes from ``StreamingCovariance``).

    Reads ``("moments", "covariance")`` (*B, D, D) and where present ``("moments", "count")`` (*B,): with fewer rows than
    features the eigenvalues beyond count-1 are 0, not rounding. Writes ``"eigenvalues"`` (*B, D) and ``"eigenvectors"``
    (*B, D, min(k, D)), float64.

        >>> import torch, tdgeom as tg
        >>> values, vectors = tg.EigenSpectrum(k=1)(moments_covariance=torch.diag(torch.tensor([1.0, 3.0])))
        >>> values.tolist(), vectors.flatten().tolist()
        ([3.0, 1.0], [0.0, 1.0])
    """

    reads = {("moments", "covariance"): "D D", ("moments", "count"): ""}
    optional = frozenset({"count"})
    writes = ["eigenvalues", "eigenvectors"]
    one_thread_a_site = True

    def __init__(
        self, *, k: int = 32, in_keys: Key | list[Key] | None = None, out_keys: Key | list[Key] | None = None
    ) -> None:
        if k < 1:
            raise ValueError(f"EigenSpectrum: k must be at least 1, got {k}.")
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.k = k

    def compute(self, covariance: Tensor, count: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See ``eigen_spectrum``."""
        return eigen_spectrum(covariance, self.k, None if count is None else count - 1)


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
    weight = torch.where(real, weight, torch.zeros_like(weight))
    logs = torch.where(real, part, torch.ones_like(part)).log()
    slope = _weighted_slope(x.expand_as(logs), logs, weight.expand_as(logs))
    return torch.where(real.sum(-1) > 5, slope, torch.full_like(slope, torch.nan))


def _descending(eigenvalues: Tensor) -> Tensor:
    # torch.linalg.eigvalsh gives them ascending, and every measure of rank would be of the wrong end, without a word.
    return eigenvalues.double().sort(-1, descending=True).values


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


def spectrum_metrics(eigenvalues: Tensor, *, alpha_ranks: tuple[int, int] = (11, 100)) -> dict[str, Tensor]:
    """Every measure of ``SpectrumMetrics`` by name: (*B, D) eigenvalues in any order -> (*B,) each.

    float64, except the counts k90, k95, k99 (int64, -1 when undefined) and near_rank1 (bool).

    >>> round(float(spectrum_metrics(torch.tensor([1.0, 1.0, 0.0]))["d_pr"]), 6)
    2.0
    """
    values = _descending(eigenvalues).clamp(min=0)
    d = values.shape[-1]
    total = values.sum(-1)
    defined = total > 0
    p = values / total.unsqueeze(-1)
    shares = p.cumsum(-1)
    d_pr = 1 / p.square().sum(-1)
    d_entropy = entropy_dimension(values)
    top1 = p[..., 0]
    counts = {level: _components(shares, level / 100, defined) for level in (90, 95, 99)}
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
        "near_rank1": (top1 >= 0.99) & (counts[90] <= 1) & defined,
    }


def _components(shares: Tensor, level: float, defined: Tensor) -> Tensor:
    count = (shares < level).sum(-1).clamp(max=shares.shape[-1] - 1) + 1
    return torch.where(defined, count, torch.full_like(count, -1))


class SpectrumMetrics(Stage):
    """Sixteen scalars of a covariance spectrum; λ are eigenvalues (not singular values), p = λ/Σλ.

    ``d_pr`` = (Σλ)²/Σλ² participation ratio, in [1, D], and ``d_pr_norm`` = d_pr/D; ``d_entropy`` = exp(-Σ p ln p) and
    ``d_entropy_norm``; ``effective_rank`` = exp entropy of √λ/Σ√λ (Roy and Vetterli 2007 on centred singular values);
    ``stable_rank`` = Σλ/λ₁; ``top1_share``, ``top10_share``, ``top32_share`` = sum of the first p; ``k90``, ``k95``,
    ``k99`` = smallest k with that cumulative share; ``log_spectrum_slope_10_200``; ``alpha_req``; ``isoscore`` =
    (d_pr-1)/(D-1); ``near_rank1`` = top1_share >= 0.99 and k90 <= 1. All are free of the data's scale and rotation.

    Reads ``"eigenvalues"`` (*B, D), in any order; writes ``("spectrum", name)`` (*B,). Without variance every measure is
    NaN (counts -1) and one ``UndefinedMeasureWarning`` says so.

    Raises:
        ValueError: negative values beyond rounding, which no covariance has.

        >>> import torch, tdgeom as tg
        >>> from tensordict import TensorDict
        >>> td = tg.SpectrumMetrics()(TensorDict(eigenvalues=torch.tensor([2.0, 1.0, 1.0])))
        >>> round(float(td["spectrum", "stable_rank"]), 3), int(td["spectrum", "k90"])
        (2.0, 3)
    """

    reads = {"eigenvalues": "D"}
    writes = [("spectrum", name) for name in SPECTRUM_METRICS]

    def __init__(
        self,
        *,
        alpha_ranks: tuple[int, int] = (11, 100),
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.alpha_ranks = alpha_ranks

    def compute(self, eigenvalues: Tensor) -> Mapping[str, Tensor]:
        """See ``spectrum_metrics``."""
        if not torch.compiler.is_compiling():
            self._check(eigenvalues)
        return spectrum_metrics(eigenvalues, alpha_ranks=self.alpha_ranks)

    def _check(self, eigenvalues: Tensor) -> None:
        negative = eigenvalues.amin(-1) < -1e-3 * eigenvalues.abs().amax(-1)
        flags = torch.stack([negative.any(), (eigenvalues.sum(-1) > 0).all()])  # one wait for the device
        below_zero, varied = flags.tolist()
        if below_zero:
            raise ValueError(
                f"SpectrumMetrics expects {self.in_keys[0]!r} to hold the eigenvalues of a covariance, which are not "
                f"negative; got {float(eigenvalues.min()):.3g} (shape {tuple(eigenvalues.shape)}). From rows: "
                f"StreamingCovariance, then EigenSpectrum."
            )
        if not varied:
            warnings.warn(
                f"SpectrumMetrics: {self.in_keys[0]!r} has no variance (or NaN), so its measures are NaN and -1",
                UndefinedMeasureWarning,
                stacklevel=3,
            )


def rankme(count: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """exp entropy of s/Σs, s the singular values of the *uncentred* rows: (), (*B, D), (*B, D, D) -> (*B,).

    From moments: s² are the eigenvalues of (n-1)·covariance + n·mean·meanᵀ. Between 1 and D.

    >>> round(float(rankme(torch.tensor(3), torch.zeros(2), torch.eye(2))), 6)
    2.0
    """
    n = count.double()[..., None, None]
    mean = mean.double()
    gram = (n - 1) * covariance.double() + n * mean.unsqueeze(-1) * mean.unsqueeze(-2)
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
        value = rankme(count, mean, covariance)
        if not torch.compiler.is_compiling() and bool(value.isnan().any()):
            warnings.warn(
                f"RankMe: {self.in_keys[2]!r} holds NaN or all rows are zero, so it is NaN",
                UndefinedMeasureWarning,
                stacklevel=2,
            )
        return value
