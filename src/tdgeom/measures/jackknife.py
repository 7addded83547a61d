"""The delete-a-group jackknife: from values with each group of documents left out to a bias, an error and an interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor

from tdgeom.core.keys import Key, Keys, key_tuple
from tdgeom.core.stage import Stage
from tdgeom.core.warnings import FewRowsWarning, tell
from tdgeom.numerics.centring import holds

__all__ = [
    "SCALES",
    "NO_ERROR",
    "Jackknife",
    "JackknifeResult",
    "Scale",
    "error_interval",
    "group_jackknife",
    "scale_of",
    "value_and_parts",
]

Scale = Literal["linear", "log", "fisher", "logit"]


class JackknifeResult(NamedTuple):
    """What ``group_jackknife`` returns: the plain ``estimate``, its ``bias``, ``standard_error``, and degrees of freedom."""

    estimate: Tensor
    bias: Tensor
    standard_error: Tensor
    degrees: Tensor


def group_jackknife(values: Tensor, rows: Tensor) -> JackknifeResult:
    """Bias and standard error of a value from what it is without each group of rows, groups of any sizes.

    With G groups of m_g of n rows, h_g = n/m_g, θ the value of all rows and θ₋g that without group g:
    bias = Σ(1 - m_g/n)θ₋g - (G-1)θ, and variance = Σ (τ_g - θ + bias)²/(h_g - 1)/G of the pseudo-values
    τ_g = h_g θ - (h_g - 1)θ₋g. For equal groups these are (G-1)(mean θ₋g - θ) and (G-1)/G Σ(θ₋g - mean)².

    Args:
        values: (*B, G+1): the value of all rows, then those without each group.
        rows: (G,) rows of each group, or (*B, G); groups of none are passed over.

    Returns:
        ``estimate``, ``bias``, ``standard_error`` (*B,) float64, and ``degrees`` of freedom: groups with rows - 1. A group of
        documents counts as one draw, so that tokens of a document may depend on each other as they like; the documents must
        not. NaN below 2 groups with rows, and where a replicate is NaN.

    Busing, Meijer and van der Leeden (1999), Delete-m jackknife for unequal m; Kott (2001), The delete-a-group jackknife.

        >>> x = torch.arange(12.0)
        >>> left = [torch.cat((x[:i], x[i + 1 :])).mean() for i in range(12)]
        >>> means = torch.stack([x.mean(), *left])
        >>> round(float(group_jackknife(means, torch.ones(12)).standard_error / (x.std() / 12**0.5)), 6)
        1.0
    """
    if values.ndim < 1 or rows.ndim < 1 or values.shape[-1] != rows.shape[-1] + 1:
        raise ValueError(
            f"group_jackknife expects (..., G+1) values, that of all rows first, beside (G,) rows a group; got "
            f"{tuple(values.shape)} and {tuple(rows.shape)}."
        )
    whole, bias, parts, groups = _parts(values.double(), rows)
    few = (groups < 2) | ~torch.isfinite(whole)
    return JackknifeResult(
        whole,
        torch.where(few, torch.nan, bias),
        torch.where(few, torch.nan, parts.square().sum(-1).sqrt()),
        (groups - 1).clamp(min=0),
    )


def _parts(values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, bias, what each group adds to the error (..., G), whose squares sum to its square, and groups with rows."""
    m = rows.to(values.device).double()
    used, n = m > 0, m.sum(-1, keepdim=True)
    groups = used.sum(-1).double()
    whole = values[..., 0]
    # apart from the plain value, so that the sums of equal replicates are exactly 0
    apart = torch.where(used, values[..., 1:] - whole.unsqueeze(-1), 0.0)
    bias = ((1 - m / n) * apart).sum(-1)
    above = torch.where(used, n / m.clamp(min=1) - 1, 1.0)  # h - 1
    pseudo = torch.where(used, bias.unsqueeze(-1) - above * apart, 0.0)
    return whole, bias, pseudo / (above * groups.unsqueeze(-1)).sqrt(), groups


def error_interval(
    estimate: Tensor,
    standard_error: Tensor,
    degrees: Tensor | float,
    *,
    scale: Scale = "linear",
    level: float = 0.95,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The interval of a value with an error, from Student's t on a scale where the value is closer to normal.

    With ``bias`` it lies about the value less its bias, whose own error counts as a third of it: the variance is
    se² + (bias/3)². A bias above a fifth of the value, and above its error, is no small correction (the rows are few for what is
    measured) and the jackknife takes off too little: NaN.

    Args:
        estimate, standard_error: (...). degrees: of freedom of the error, groups - 1.
        scale: "log" for what is positive (dimensions, ranks, norms); "fisher", the inverse hyperbolic tangent, for correlations;
            "logit" for shares between 0 and 1; "linear". The error is carried over by the scale's slope at the estimate; an
            estimate that lies outside of the scale is taken as linear.
        level: of the interval.
        bias: (...) what the estimate is too large by, see ``group_jackknife``; NaN where it is not known: none is taken off.

    Returns:
        Its two ends, (...) each.

        >>> low, high = error_interval(torch.tensor(10.0), torch.tensor(1.0), 19, scale="log")
        >>> round(float(low), 2), round(float(high), 2)
        (8.11, 12.33)
    """
    if scale not in ("linear", "log", "fisher", "logit"):
        raise ValueError(f"error_interval: scale is 'linear', 'log', 'fisher' or 'logit', got {scale!r}.")
    if not 0 < level < 1:
        raise ValueError(f"error_interval: level lies between 0 and 1, got {level!r}.")
    x, error = estimate.double(), standard_error.double()
    if bias is not None:
        off = bias.double().nan_to_num()
        error = torch.where(too_biased(x, error, off), torch.nan, torch.hypot(error, off / 3))
        x = x - off
    degrees = torch.as_tensor(degrees, dtype=torch.float64, device="cpu")
    quantile = torch.as_tensor(student.ppf((1 + level) / 2, degrees.clamp(min=1).numpy()), device="cpu")
    quantile = torch.where(degrees >= 1, quantile, torch.nan).to(x.device)
    plain = (x - quantile * error, x + quantile * error)
    if scale == "linear":
        return plain
    inside = x > 0 if scale == "log" else x.abs() < 1 if scale == "fisher" else (x > 0) & (x < 1)
    safe = torch.where(inside, x, 0.5)
    forth, back, slope = {
        "log": (torch.log, torch.exp, 1 / safe),
        "fisher": (torch.atanh, torch.tanh, 1 / (1 - safe.square())),
        "logit": (torch.logit, torch.sigmoid, 1 / (safe * (1 - safe))),
    }[scale]
    ends = (back(forth(safe) + sign * quantile * error * slope) for sign in (-1, 1))
    low, high = (torch.where(inside, end, other) for end, other in zip(ends, plain))
    return low, high


def too_biased(estimate: Tensor, standard_error: Tensor, bias: Tensor) -> Tensor:
    """Where a bias is more than a correction: above a fifth of the value, and above its error."""
    return (bias.abs() > estimate.abs() / 5) & (bias.abs() > standard_error)


def resolved_error(standard_error: Tensor, values: Tensor, scale: Scale) -> Tensor:
    """The error of values (*B, G+1), NaN where it is no more than their rounding: they say nothing about a spread.

    Rounding is 8 units in the last place of the value, or of 1 for what lies between -1 and 1; at least 1e-12 of it.

    >>> float(resolved_error(torch.tensor(1e-17), torch.tensor([3e-16, 2e-16]).double(), "logit"))
    nan
    """
    eps = torch.finfo(values.dtype).eps if values.is_floating_point() else 0.0
    size = values[..., 0].double().abs()
    size = size.clamp(min=1) if scale in ("fisher", "logit") else size
    return torch.where(standard_error > size * max(8 * eps, 1e-12), standard_error, torch.nan)


SCALES: dict[str, Scale] = {
    **dict.fromkeys(
        ("d_pr", "d_entropy", "effective_rank", "stable_rank", "k90", "k95", "k99", "rankme", "alpha_req", "estimate",
         "sv_effective_rank", "sv_stable_rank", "sv_participation_ratio", "norm_mean", "norm_q05", "norm_q50", "norm_q95",
         "procrustes"), "log",
    ),
    **dict.fromkeys(
        ("linear_cka", "linear_cka_debiased", "rbf_cka", "cca_mean", "svcca", "pwcca_ab", "pwcca_ba", "rsa", "cknna",
         "layer_cosine_sim", "cos_sim_mean", "distance_correlation", "soft_matching"), "fisher",
    ),
    **dict.fromkeys(
        ("d_pr_norm", "d_entropy_norm", "top1_share", "top10_share", "top32_share", "isoscore", "feature_subspace_novelty",
         "neighborhood_overlap", "jaccard_knn", "label_overlap", "balanced", "ve_4", "ve_8", "ve_16", "ve_32", "cca_r2",
         "top_feature_share", "accuracy", "balanced_accuracy", "auroc", "router_entropy_norm"), "logit",
    ),
}  # fmt: skip
"""The scale on which a measure is closest to normal, by the last part of its name; "linear" for any other."""


def scale_of(name: str) -> Scale:
    """The scale of a measure, by its name or a column's that ends in it.

    >>> scale_of("d_pr"), scale_of("twonn_estimate"), scale_of("linear_cka"), scale_of("log_spectrum_slope_10_200")
    ('log', 'log', 'fisher', 'linear')
    """
    if name in SCALES:
        return SCALES[name]
    return next((scale for known, scale in SCALES.items() if name.endswith(f"_{known}")), "linear")


NO_ERROR: dict[str, str] = {
    **dict.fromkeys(
        ("rows", "duplicates", "near_duplicates", "routed_assignments"), "a count of the rows at hand"
    ),
    **dict.fromkeys(
        ("numerical_rank", "sv_numerical_rank", "k_used"), "a count of what rounding leaves resolved"
    ),
    **dict.fromkeys(
        ("near_rank1", "few_rows", "sv_few_rows", "unresolved", "most_used_expert"), "a mark, no number"
    ),
    "standard_error": "an error itself, of independent rows",
    "scale": "the distance at which an estimate looks, not an estimate",
    "rank": "which neighbours an estimate looks at",
    "ceiling": "the most that ties leave possible in this sample",
    **dict.fromkeys(("z", "p", "p_adjusted", "calibrated"), "a measure beside chance, whose spread it holds"),
    "norm_max": "a maximum: it has no spread that part of the rows could tell",
}
"""Leaves that are no estimates, and why: they have no error."""


def value_and_parts(values: Tensor, rows: Tensor) -> Tensor:
    """The value, and what each group adds to its error: (..., G+1) as ``group_jackknife`` takes them -> (..., G+1)."""
    whole, _, parts, _ = _parts(values.double(), rows)
    return torch.cat([whole.unsqueeze(-1), parts], -1)


def without_bias(values: Tensor, rows: Tensor) -> Tensor:
    """Replicates (..., G+1) that have the errors of these, of a method that knows no bias: the jackknife finds none.

    θ₋g - bias/(h_g - 1): the pseudo-values stay as they are.
    """
    _, bias, _, _ = _parts(values.double(), rows)
    m = rows.to(values.device).double()
    above = torch.where(m > 0, m.sum(-1, keepdim=True) / m.clamp(min=1) - 1, torch.inf)
    return torch.cat((values[..., :1].double(), values[..., 1:].double() - bias.unsqueeze(-1) / above), -1)


class Jackknife(Stage):
    """Replicate values to estimates with errors: a value of all rows, and behind it those without each group of documents.

    At each of ``keys`` it finds (groups + 1, ...), as stages behind ``Replicates`` and ``LeaveOut`` write them, and leaves the
    value of all rows there; beside it, under the last part of the key with a suffix:

    | suffix | |
    |---|---|
    | ``_se`` | standard error, see ``group_jackknife`` |
    | ``_bias`` | what the value is too large by, on average (with ``full=True``) |
    | ``_low``, ``_high`` | the interval, from Student's t on the measure's scale, see ``error_interval`` (with ``full=True``) |

    Leaves that are no estimates (counts, marks, an estimator's own ``standard_error``: ``NO_ERROR``) are only put back to their
    value of all rows.

    Args:
        keys: of the values, such as ``[("spectrum", "d_pr")]``.
        full: write bias and interval too.
        corrected: put the interval about the value less its bias.
        scale: of the interval; "auto" chooses by the measure's name, see ``scale_of``.
        level: of the interval.
        parts: also write, under ``("error_parts", *key)``, (G+1, ...): the value, then what each group of documents adds to its
            error (the squares sum to that of ``_se``), and under ``("error_bias", *key)`` what the value is too large by.
            ``tg.difference`` pairs the parts where two runs read the same documents, ``tg.intervals`` takes the bias off.
        rows: the key of the groups' sizes: ``("replicates", "rows")`` of ``Replicates``, ``"sample_group_rows"`` of
            ``SampleGroups``.

    One warning below 5 groups with rows, whose errors are hardly more than a guess; NaN below 2, and where the replicates differ
    by rounding alone: no error is 0.

        >>> import torch, tdgeom as tg
        >>> from tensordict import TensorDict
        >>> rows = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0))
        >>> td = TensorDict(tokens=rows, row_id=torch.arange(4000) << 20)
        >>> for stage in (tg.Replicates(tg.StreamingMean()), tg.Jackknife([("mean", "mean")])):
        ...     td = stage(td)
        >>> bool((td["mean", "mean_se"] * 4000**0.5 - 1).abs().max() < 0.5)
        True
    """

    def __init__(
        self,
        keys: Sequence[Key],
        *,
        full: bool = False,
        corrected: bool = False,
        scale: Scale | Literal["auto"] = "auto",
        level: float = 0.95,
        parts: bool = False,
        rows: Key = ("replicates", "rows"),
        in_keys: Keys = None,
        out_keys: Keys = None,
    ) -> None:
        if isinstance(keys, str) or not list(keys):
            raise TypeError(
                f"Jackknife: keys is a list of keys such as [('spectrum', 'd_pr')], got {keys!r}."
            )
        if scale not in ("auto", "linear", "log", "fisher", "logit"):
            raise ValueError(
                f"Jackknife: scale is 'auto', 'linear', 'log', 'fisher' or 'logit', got {scale!r}."
            )
        if not 0 < level < 1:
            raise ValueError(f"Jackknife: level lies between 0 and 1, got {level!r}.")
        values = [key_tuple(key) for key in keys]
        suffixes = ("_se", "_bias", "_low", "_high") if full else ("_se",)
        self._estimates = [key[-1] not in NO_ERROR for key in values]
        beside = [
            (*key[:-1], f"{key[-1]}{suffix}")
            for key, estimate in zip(values, self._estimates)
            for suffix in suffixes
            if estimate
        ]
        if parts:
            estimates = [key for key, estimate in zip(values, self._estimates) if estimate]
            beside += [(root, *key) for root in ("error_parts", "error_bias") for key in estimates]
        super().__init__(
            in_keys=in_keys,
            out_keys=out_keys,
            reads=[*values, rows],
            writes=[*values, *beside],
        )
        self.keys, self.full, self.corrected = [*keys], full, corrected
        self.scale, self.level, self.parts, self.rows = scale, level, parts, rows

    def compute(self, *inputs: Tensor) -> list[Tensor]:
        """The values of all rows, then what stands beside each."""
        *values, rows = inputs
        plain, beside, shares, biases = [], [], [], []
        for key, value, estimate in zip(self.keys, values, self._estimates):
            if value.ndim < 1 or value.shape[0] != rows.shape[0] + 1:
                raise ValueError(
                    f"Jackknife expects {key!r} of shape ({rows.shape[0]} + 1, ...): the value of all rows and those "
                    f"without each group; got {tuple(value.shape)}. Replicates(stage) around the streaming stage before it, or "
                    f"LeaveOut(stage) around the stage of a sample, writes it so."
                )
            plain.append(value[0].clone())
            if not estimate:
                continue
            name = str(key_tuple(key)[-1])
            found = group_jackknife(value.movedim(0, -1), rows)
            countable = not value.is_floating_point()
            nothing = torch.full_like(found.standard_error, torch.nan)
            error = resolved_error(found.standard_error, value.movedim(0, -1), scale_of(name))
            beside.append(nothing if countable else error)
            if self.parts:
                shares.append(value_and_parts(value.movedim(0, -1), rows).movedim(-1, 0))
                biases.append(nothing if countable else found.bias)
            if self.full:
                scale: Any = scale_of(name) if self.scale == "auto" else self.scale
                off = found.bias if self.corrected else None
                ends = error_interval(
                    found.estimate, error, found.degrees, scale=scale, level=self.level, bias=off
                )
                beside += [nothing] * 3 if countable else [found.bias, *ends]
        warn_few_groups("Jackknife", rows)
        return [*plain, *beside, *shares, *biases]


def warn_few_groups(stage: str, rows: Tensor) -> None:
    """Once, where the groups that have rows are too few to tell an error."""
    groups = int((rows > 0).sum())
    if holds((rows > 0).sum() < 5):
        tell(
            f"{stage}: {groups} group(s) of documents have rows: a standard error from so few is hardly more than a guess (NaN "
            f"below 2). Give rows of more documents, or by='row' where rows are independent.",
            FewRowsWarning,
        )


def with_errors(values: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """``{name}_se`` of replicate values (G+1,) by name; NaN where they differ by rounding alone."""
    return {
        f"{name}_se": resolved_error(group_jackknife(value, rows).standard_error, value, scale_of(name))
        for name, value in values.items()
    }
