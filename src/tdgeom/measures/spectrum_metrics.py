"""What the eigenvalues of a covariance say about dimension, and RankMe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from tdgeom.core.keys import Key, Keys
from tdgeom.core.stage import Stage
from tdgeom.core.warnings import UnresolvedMeasureWarning, tell, tell_few_rows
from tdgeom.measures.eigen_spectrum import covariance_eigenvalues, eigenvalue_error
from tdgeom.numerics.centring import holds, real_rows, warn_undefined
from tdgeom.numerics.eigenvalues import refuse_truncated
from tdgeom.numerics.numerical_rank import above_rounding, leading_parts, numerical_rank

__all__ = [
    "SPECTRUM_MARKS",
    "SPECTRUM_METRICS",
    "RankMe",
    "SpectrumMetrics",
    "alpha_req",
    "entropy_dimension",
    "log_spectrum_slope",
    "marked_measures",
    "rankme",
    "spectrum_metrics",
    "unresolved",
]

SPECTRUM_METRICS = (
    "d_pr", "d_pr_norm", "d_entropy", "d_entropy_norm", "effective_rank", "stable_rank",
    "top1_share", "top10_share", "top32_share", "k90", "k95", "k99",
    "log_spectrum_slope_10_200", "alpha_req", "isoscore", "near_rank1",
)  # fmt: skip
SPECTRUM_MARKS = ("numerical_rank", "few_rows", "unresolved")
_POINTS = 6  # fewer make no fit
_UNDEFINED = ("d_entropy", "log_spectrum_slope_10_200", "alpha_req", "isoscore")
_REMEDY = "Give more rows, or take ParticipationRatio, which corrects for their number"


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
    part, real = values[..., first:last], above_rounding(values)[..., first:last]
    weight = torch.where(real, weight, 0.0)
    logs = torch.where(real, part, 1.0).log()
    slope = _weighted_slope(x.expand_as(logs), logs, weight.expand_as(logs))
    return torch.where((real.sum(-1) >= _POINTS) & ~part.isnan().any(-1), slope, torch.nan)


def _descending(eigenvalues: Tensor) -> Tensor:
    # torch.linalg.eigvalsh gives them ascending, and every measure of rank would be of the wrong end, without a word.
    eigenvalues = real_rows(eigenvalues, "a measure of eigenvalues")
    return eigenvalues.double().neg().sort(-1).values.neg()  # and NaN, of unknown ones, comes last


def log_spectrum_slope(eigenvalues: Tensor, first: int = 10, last: int = 200) -> Tensor:
    """Least-squares slope of ln λ on 0-based rank over ranks first..min(last, D)-1: (*B, D) -> (*B,).

    Eigenvalues, in any order, beyond the numerical rank are left out; NaN with 5 or fewer points.

    >>> round(float(log_spectrum_slope(torch.exp(-0.1 * torch.arange(50.0).double()))), 6)
    -0.1
    """
    values = _descending(eigenvalues)
    last = max(min(last, values.shape[-1]), first)
    rank = torch.arange(first, last, dtype=torch.float64, device=values.device)
    return _slope_over_ranks(values, first, last, rank, torch.ones_like(rank))


def alpha_req(eigenvalues: Tensor, first: int = 11, last: int = 100) -> Tensor:
    """Power-law exponent of the spectrum: minus the slope of ln λ on ln rank, (*B, D) -> (*B,).

    Formula:
        ln λ_i = c - alpha ln i; least squares over ranks 11..min(100, D), each weighted ``1/i``

    1-based ranks first..min(last, D) of λ given in any order, squared residuals weighted 1/rank, within the numerical rank
    only; NaN with 5 or fewer points. Stringer et al. (2019), High-dimensional geometry of population responses in visual
    cortex; Agrawal et al. (2022), alpha-ReQ.

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
    error: Tensor | None = None,
    total_variance: Tensor | None = None,
    d_pr: Tensor | None = None,
    alpha_ranks: tuple[int, int] = (11, 100),
) -> dict[str, Tensor]:
    """Every measure of ``SpectrumMetrics`` by name: (*B, D) eigenvalues in any order -> (*B,) each.

    float64, except the counts k90, k95, k99 (int64, -1 when undefined), near_rank1 (bool) and numerical_rank (int64).
    Eigenvalues that are no more than rounding count as 0: see ``numerical_rank``; ``error`` (*B, D), of descending
    eigenvalues, is what their products' rounding adds to it. Of a spectrum whose leading part alone is known, NaN beyond,
    ``total_variance`` and ``d_pr`` (*B,) say what they can of the rest, and what they leave open is NaN and -1.

    >>> round(float(spectrum_metrics(torch.tensor([1.0, 1.0, 0.0]))["d_pr"]), 6)
    2.0
    """
    values = _descending(eigenvalues).clamp(min=0)
    rank = numerical_rank(values, error=error)
    values = torch.where(above_rounding(values, error) | values.isnan(), values, 0.0)
    d = values.shape[-1]
    total = values.sum(-1) if total_variance is None else total_variance.double()
    p = values / total.unsqueeze(-1)
    d_pr = 1 / p.square().sum(-1) if d_pr is None else d_pr.double()
    d_entropy = entropy_dimension(values)
    top1 = p[..., 0]
    counts = {level: _components(p, level / 100, total > 0) for level in (90, 95, 99)}
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
        "near_rank1": (top1 >= 0.99 - 1e-9) & (counts[90] <= 1) & (total > 0),
        "numerical_rank": rank,
    }


def _components(shares: Tensor, level: float, defined: Tensor) -> Tensor:
    # Of a whole spectrum the last sum is 1 but for rounding; of its leading part it may fall short.
    whole = ~shares[..., -1].isnan()
    reached = (shares.nan_to_num().sum(-1) >= level - 1e-9) | whole
    return torch.where(defined & reached, leading_parts(shares, level), -1)


def unresolved(eigenvalues: Tensor, error: Tensor, metrics: Mapping[str, Tensor], **settings: Any) -> Tensor:
    """Which measures the eigenvalues under the products' rounding could move by more than 1e-4: (*B,) int64.

    Bit i stands for measure i of ``SPECTRUM_METRICS``. Three spectra are as good as the one found: that with the eigenvalues
    below their ``error`` as they came out; with all others larger by what rounding can do to a single one, error/√D; and with
    the leading ones smaller and the last ones larger by it. A measure that differs by 1e-4 between them is set.
    """
    values = _descending(eigenvalues).clamp(min=0)
    resolved, single = above_rounding(values, error), error / values.shape[-1] ** 0.5
    tilt = torch.linspace(-1, 1, values.shape[-1], dtype=torch.float64, device=values.device)
    moved = torch.zeros((len(SPECTRUM_METRICS), *values.shape[:-1]), dtype=torch.bool, device=values.device)
    for other, kept in (
        (values, None),
        (torch.where(resolved, values + single, 0.0), error),
        (torch.where(resolved, (values + tilt * single).clamp(min=0), 0.0), error),
    ):
        again = spectrum_metrics(other, error=kept, **settings)
        for bit, name in enumerate(SPECTRUM_METRICS):
            found, new = metrics[name].double(), again[name].double()
            moved[bit] |= ((found - new).abs() > 1e-4 * new.abs()) | (found.isnan() != new.isnan())
    bits = 2 ** torch.arange(len(SPECTRUM_METRICS), device=values.device)
    mask = (moved * bits.reshape(-1, *[1] * (moved.ndim - 1))).sum(0)
    return torch.where((error >= 0).all(-1), mask, 0)


class SpectrumMetrics(Stage):
    """Sixteen scalars of a covariance spectrum; λ are eigenvalues (not singular values), p = λ/Σλ; and what limits them.

    Formula:
        d_pr = (Σλ)²/Σλ²; participation ratio of the (centred) covariance, in [1, D]; ``d_pr_norm`` is it over D
        d_entropy = exp(-Σ p ln p); in [1, D]; ``d_entropy_norm`` is it over D
        effective_rank = exp(-Σ q ln q); ``q = √λ/Σ√λ``: Roy and Vetterli 2007 on centred singular values
        stable_rank = Σλ/λ₁; in [1, D]
        top1_share = p₁; ``top10_share`` and ``top32_share``: the sum of the first 10 and 32
        k90 = min {k : Σ_{i<=k} p_i >= 0.90}; to 1e-9; ``k95`` and ``k99`` likewise
        isoscore = (d_pr - 1)/(D - 1); in [0, 1]
        near_rank1 = p₁ >= 0.99 and k90 <= 1; one direction holds all but nothing

    ``log_spectrum_slope_10_200`` and ``alpha_req`` are slopes of ln λ on rank and on ln rank: see the functions. All are free of
    the data's scale and rotation.

    Behind them ``numerical_rank``, the number of eigenvalues that are more than rounding (the others count as 0);
    ``few_rows``, whether there are fewer than 10·d_pr rows, of which d_pr and its kin say more than of what they were drawn
    from (False where the number of rows is not known); ``unresolved``, the measures that eigenvalues under the rounding of
    float32 products could move by more than 1e-4: bit i for measure i of the order above, 0 after float64 products.

    Args:
        alpha_ranks: see ``alpha_req``.
        source: ``"eigenvalues"`` reads a whole spectrum (*B, D), in any order, and where present ``("moments", "count" |
            "covariance" | "relative_error" | "effective_sample_size")`` that it came from. ``"sketch"`` reads ``("sketch",
            "eigenvalues" | "total_variance" | "d_pr")`` of ``StreamingSketch``: measures of d_pr are the sketch's estimates,
            shares are those of its leading eigenvalues (never too large), and what needs the others is NaN (counts -1), with
            one warning.
        in_keys, out_keys: see ``Stage``.

    Writes ``("spectrum", name)`` (*B,). Without variance every measure is NaN (counts -1); a fit through 5 or fewer eigenvalues
    and the isoscore of one feature are NaN. One ``UndefinedMeasureWarning`` says which, and why.

    Raises:
        ValueError: negative values beyond rounding, which no covariance has; infinite ones; part of a spectrum in place of the
            whole.

        >>> import torch, tdgeom as tg
        >>> from tensordict import TensorDict
        >>> td = tg.SpectrumMetrics()(TensorDict(eigenvalues=torch.linspace(2, 1, 30)))
        >>> round(float(td["spectrum", "stable_rank"]), 3), int(td["spectrum", "k90"])
        (22.5, 26)
    """

    writes = [("spectrum", name) for name in (*SPECTRUM_METRICS, *SPECTRUM_MARKS)]
    optional = frozenset({"count", "covariance", "relative_error", "effective_sample_size"})

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
        reads: dict[Key, str] = {
            "eigenvalues": "D",
            ("moments", "count"): "",
            ("moments", "covariance"): "D D",
            ("moments", "relative_error"): "",
            ("moments", "effective_sample_size"): "",
        }
        if source == "sketch":
            reads = {
                ("sketch", "eigenvalues"): "D",
                ("sketch", "total_variance"): "",
                ("sketch", "d_pr"): "",
                ("sketch", "count"): "",
            }
        super().__init__(in_keys=in_keys, out_keys=out_keys, reads=reads)
        self.alpha_ranks, self.source = alpha_ranks, source

    def compute(self, eigenvalues: Tensor, *beside: Tensor | None) -> Mapping[str, Tensor]:
        """See ``spectrum_metrics``."""
        count: Tensor | None
        error = total_variance = d_pr = None
        if self.source == "sketch":
            total_variance, d_pr, count = (*beside, None, None, None)[:3]
        else:
            count, covariance, relative_error, effective = (*beside, *[None] * 4)[:4]
            count = count if effective is None else effective
            if covariance is not None and relative_error is not None:
                error = eigenvalue_error(covariance, relative_error)
        settings: Any = {"alpha_ranks": self.alpha_ranks}
        known: Any = {"total_variance": total_variance, "d_pr": d_pr, **settings}
        metrics = spectrum_metrics(eigenvalues, error=error, **known)
        negative = (eigenvalues.amin(-1) < -1e-3 * eigenvalues.abs().amax(-1)).any()
        infinite = eigenvalues.isinf().any()
        told = torch.stack([metrics[name].double() for name in _UNDEFINED])
        if holds(negative | infinite | ~(told == told).all()):  # one wait for the device
            self._refuse_or_warn(eigenvalues, metrics, negative, infinite)
        few = torch.zeros_like(metrics["near_rank1"]) if count is None else count < 10 * metrics["d_pr"]
        if count is not None and holds(few.any()):
            tell_few_rows(
                "SpectrumMetrics",
                "d_pr and its kin",
                count.min(),
                "10 for each of d_pr's dimensions",
                _REMEDY,
            )
        marks = torch.zeros_like(metrics["numerical_rank"])
        if error is not None:
            marks = unresolved(eigenvalues, error, metrics, **settings)
            if holds((marks != 0).any()):
                names = ", ".join(marked_measures(marks))
                tell(
                    f"SpectrumMetrics: eigenvalues below the rounding of float32 products could move {names} by more than "
                    f"1e-4: unresolved. StreamingCovariance(precision='float64') resolves them.",
                    UnresolvedMeasureWarning,
                )
        return {**metrics, "few_rows": few, "unresolved": marks}

    def _refuse_or_warn(
        self, eigenvalues: Tensor, metrics: dict[str, Tensor], negative: Tensor, infinite: Tensor
    ) -> None:
        key = self.in_keys[0]
        if holds(negative) or holds(infinite):
            got = "an infinite one" if holds(infinite) else f"{float(eigenvalues.min()):.3g}"
            raise ValueError(
                f"SpectrumMetrics expects {key!r} to hold the eigenvalues of a covariance, which are finite and not "
                f"negative; got {got} (shape {tuple(eigenvalues.shape)}). From rows: StreamingCovariance, then EigenSpectrum."
            )
        if self.source == "eigenvalues":
            refuse_truncated(eigenvalues, "SpectrumMetrics", key)
        if holds(eigenvalues.isnan().all(-1).any()):
            says = f"{key!r} is NaN (the covariance of one row, or of rows with NaN), so its measures are NaN and -1"
        elif holds(~(metrics["top1_share"] > 0).all()):
            says = f"{key!r} has no variance: all rows are the same, so its measures are NaN and -1"
        elif holds(eigenvalues.isnan().any()):
            lacks = [name for name, value in metrics.items() if holds((value.isnan() | (value == -1)).any())]
            says = (
                f"{key!r} holds the {int((~eigenvalues.isnan()).sum(-1).min())} leading of {eigenvalues.shape[-1]} "
                f"eigenvalues, which leave {', '.join(lacks)} open: NaN (counts -1). StreamingSketch(k=) publishes more"
            )
        else:
            says = self._too_few(metrics, eigenvalues.shape[-1])
        tell(f"SpectrumMetrics: {says}.")

    def _too_few(self, metrics: dict[str, Tensor], width: int) -> str:
        undefined = [name for name in _UNDEFINED if holds(metrics[name].isnan().any())]
        rank = int(metrics["numerical_rank"].min())
        return (
            f"too few eigenvalues for {', '.join(undefined)}: NaN. There are {width} features and {rank} eigenvalues above "
            f"rounding; a fit needs {_POINTS} or more within its ranks (slope 11 to 200, alpha_req {self.alpha_ranks[0]} to "
            f"{self.alpha_ranks[1]}), isoscore 2 features"
        )


def marked_measures(marks: Tensor | int) -> list[str]:
    """The measures that ``unresolved`` names, of any item.

    >>> marked_measures(torch.tensor([1, 1 << 4]))
    ['d_pr', 'effective_rank']
    """
    whole = [int(mark) for mark in torch.as_tensor(marks).flatten()]
    return [name for bit, name in enumerate(SPECTRUM_METRICS) if any(mark >> bit & 1 for mark in whole)]


def rankme(
    count: Tensor,
    mean: Tensor,
    covariance: Tensor,
    relative_error: Tensor | None = None,
    effective_sample_size: Tensor | None = None,
) -> Tensor:
    """exp entropy of s/Σs, s the singular values of the *uncentred* rows: (), (*B, D), (*B, D, D) -> (*B,).

    From moments: s² are the eigenvalues of (n-1)·covariance + n·mean·meanᵀ, those that are more than rounding (that of the
    covariance's products too, where ``relative_error`` () says it) and no more than n. Between 1 and min(n, D). Of rows that
    weigh less with age (``halflife=``) n is their ``effective_sample_size`` in the sum, and s those of the weighted rows.

    >>> round(float(rankme(torch.tensor(3), torch.zeros(2), torch.eye(2))), 6)
    2.0
    """
    n = (count if effective_sample_size is None else effective_sample_size).double()
    mean, covariance = (real_rows(moment, "rankme").double() for moment in (mean, covariance))
    scatter, offset = (n - 1)[..., None, None] * covariance, n.sqrt().unsqueeze(-1) * mean
    error = None if relative_error is None else eigenvalue_error(scatter, relative_error)
    return entropy_dimension(_uncentred_eigenvalues(scatter, offset, count, error).sqrt())


def _uncentred_eigenvalues(scatter: Tensor, offset: Tensor, count: Tensor, error: Tensor | None) -> Tensor:
    """Eigenvalues of ``scatter`` + offset·offsetᵀ, descending, 0 where they are no more than rounding or beyond ``count``.

    An offset a thousand times the spread would round the spread away, and leaves it alone: then the largest eigenvalue is the
    offset's, and the others are those of the scatter orthogonal to it, to second order in the ratio of their sizes.
    """
    size = offset.square().sum(-1)
    trace = scatter.diagonal(dim1=-2, dim2=-1).sum(-1)
    apart = (size > 1e6 * trace) & (trace > 0)
    unit = offset / torch.where(size > 0, size, 1.0).sqrt().unsqueeze(-1)
    turned = (scatter @ unit.unsqueeze(-1))[..., 0]
    along = (turned * unit).sum(-1)
    # (1-uuᵀ)S(1-uuᵀ), less what the offset's direction takes of it: b·bᵀ/(size + along), b = Su - (uᵀSu)u.
    beside = turned - along.unsqueeze(-1) * unit
    across = turned.unsqueeze(-1) * unit.unsqueeze(-2)
    within = scatter - across - across.mT + along[..., None, None] * unit.unsqueeze(-1) * unit.unsqueeze(-2)
    within = (
        within
        - beside.unsqueeze(-1) * beside.unsqueeze(-2) / (size + along).clamp(min=1e-300)[..., None, None]
    )
    whole = scatter + offset.unsqueeze(-1) * offset.unsqueeze(-2)
    rank = torch.where(apart, count - 1, count)
    values = covariance_eigenvalues(torch.where(apart[..., None, None], within, whole), rank)
    values = torch.where(above_rounding(values, error) | values.isnan(), values, 0.0)
    first = (size + along).unsqueeze(-1)
    return torch.where(apart.unsqueeze(-1), torch.cat((first, values[..., :-1]), -1), values)


class RankMe(Stage):
    """Effective rank of the uncentred rows, from streamed moments of all of them.

    Formula:
        rankme = exp(-Σ q ln q); ``q = s/Σs``, s the singular values of the (N, D) matrix of rows without centring

    The centred form is ``effective_rank`` of ``SpectrumMetrics``; only what is more than rounding counts. Between 1 and
    min(N, D); free of scale and rotation, not of offsets. Warns below 10 rows for each of its dimensions, and where float32
    products could have moved it.

    Reads ``("moments", "count" | "mean" | "covariance")`` and where present ``("moments", "relative_error" |
    "effective_sample_size")``: of rows that weigh less with age it is that of the weighted rows, their number the effective one.
    Writes ``("spectrum", "rankme")``.

    Garrido et al. (2023), RankMe: assessing the downstream performance of pretrained self-supervised representations by
    their rank.

        >>> import torch, tdgeom as tg
        >>> stage = tg.RankMe()
        >>> round(float(stage(torch.tensor(90), torch.zeros(3), torch.eye(3))), 3)
        3.0
    """

    reads = {
        ("moments", "count"): "",
        ("moments", "mean"): "D",
        ("moments", "covariance"): "D D",
        ("moments", "relative_error"): "",
        ("moments", "effective_sample_size"): "",
    }
    optional = frozenset({"relative_error", "effective_sample_size"})
    writes = [("spectrum", "rankme")]
    one_thread_a_site = True

    def compute(
        self,
        count: Tensor,
        mean: Tensor,
        covariance: Tensor,
        relative_error: Tensor | None = None,
        effective: Tensor | None = None,
    ) -> Tensor:
        """See ``rankme``."""
        value = rankme(count, mean, covariance, relative_error, effective)
        reason = "all rows are zero."
        if holds(~torch.isfinite(covariance).all()):
            reason = f"{self.in_keys[2]!r} is not finite (that of one row, or of rows with NaN)."
        warn_undefined(value, "RankMe", reason)
        rows = count if effective is None else effective
        if holds((rows < 10 * value).any()):
            tell_few_rows("RankMe", "rankme", rows.min(), "10 for each of its dimensions", "Give more rows")
        if relative_error is not None and holds(
            _moved(value, rankme(count, mean, covariance, None, effective)).any()
        ):
            tell(
                "RankMe: singular values below the rounding of float32 products could move it by more than 1e-4: unresolved. "
                "StreamingCovariance(precision='float64') resolves them.",
                UnresolvedMeasureWarning,
            )
        return value


def _moved(value: Tensor, other: Tensor) -> Tensor:
    return (value - other).abs() > 1e-4 * other
