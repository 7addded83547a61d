"""Rows that are forgotten: exponential weights by age, and what sums of them amount to.

A row of age a (0: the last of the stream) weighs w = 2^(-a/halflife). Of n rows the weights sum to W = Σw, the effective sample
size is W²/Σw², and a scatter Σw(x-x̄)(x-x̄)ᵀ over W - Σw²/W is unbiased for independent rows (reliability weights). All three
follow from n alone, so that a state holds no weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tdgeom.numerics.centring import occurs
from tdgeom.numerics.moments import Moments, row_parts
from tdgeom.numerics.products import add_upper, factors

__all__ = [
    "add_weighted_rows",
    "age_weights",
    "check_halflife",
    "decay",
    "degrees_of_freedom",
    "effective_sample_size",
    "equal_weights_needed",
    "merge_later",
    "refuse_weighted",
    "weight_sum",
    "weighted_about_running_mean",
]


def check_halflife(halflife: float | None, owner: str) -> float | None:
    """The half-life as a float, or None; an error unless it is a positive number of rows."""
    if halflife is None:
        return None
    wrong = isinstance(halflife, bool) or not isinstance(halflife, int | float)
    if wrong or not (math.isfinite(halflife) and halflife > 0):
        raise ValueError(
            f"{owner}: halflife counts the rows after which a row weighs half, a positive number, got {halflife!r}. Leave it out "
            f"to weigh all rows alike."
        )
    return float(halflife)


def decay(rows: int, halflife: float) -> float:
    """What a row's weight is multiplied by when so many rows more have come: 2^(-rows/halflife).

    >>> decay(3, halflife=3)
    0.5
    """
    return 2.0 ** (-rows / halflife)


def age_weights(rows: int, halflife: float, device: torch.device) -> Tensor:
    """(N,) float64 weights of the last rows of a stream, in its order: the last weighs 1.

    >>> age_weights(3, 1.0, torch.device("cpu")).tolist()
    [0.25, 0.5, 1.0]
    """
    return torch.exp2(torch.arange(1 - rows, 1, dtype=torch.float64, device=device) / halflife)


def weight_sum(count: Tensor, halflife: float) -> Tensor:
    """Σw of ``count`` rows (...), float64: (1 - q^n)/(1 - q), q = 2^(-1/halflife).

    >>> float(weight_sum(torch.tensor(3), 1.0))
    1.75
    """
    rate = math.log(2) / halflife
    return torch.expm1(-rate * count.double()) / math.expm1(-rate)


def effective_sample_size(count: Tensor, halflife: float) -> Tensor:
    """(Σw)²/Σw² of ``count`` rows (...), float64: tanh(n·ln2/(2·halflife))/tanh(ln2/(2·halflife)), at most about 2.885·halflife.

    >>> round(float(effective_sample_size(torch.tensor(2), 1.0)), 6)
    1.8
    """
    rate = math.log(2) / (2 * halflife)
    return torch.tanh(rate * count.double()) / math.tanh(rate)


def degrees_of_freedom(count: Tensor, halflife: float | None) -> Tensor:
    """What a scatter is divided by, to be unbiased: n - 1, or with weights Σw - Σw²/Σw (reliability weights)."""
    if halflife is None:
        return count.double() - 1
    return weight_sum(count, halflife) * (1 - 1 / effective_sample_size(count, halflife))


def refuse_weighted(owner: str, norm4: Tensor, covariance: Tensor, needs: str) -> None:
    """An error where a measure whose formula counts rows alike is given moments of weighted ones: ``norm4`` is NaN there."""
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    if occurs(norm4.isnan() & trace.isfinite()):
        raise equal_weights_needed(owner, needs)


def equal_weights_needed(owner: str, needs: str) -> ValueError:
    """The error of a measure whose formula counts rows alike."""
    return ValueError(
        f"{owner} reads moments of rows that weigh less with age (halflife=), and {needs} is known for rows of equal weight "
        f"only. Give it moments without halflife=, or a sample of rows."
    )


def add_weighted_rows(
    state: Moments, rows: Tensor, halflife: float, dtype: torch.dtype = torch.float64
) -> None:
    """Add rows (N, D) that came after those of ``state`` (count, mean, scatter), in place.

    ``dtype`` and the half of ``scatter`` that counts: as ``add_rows``.
    """
    for part in row_parts(rows):
        y, mean, _ = weighted_about_running_mean([part], state["mean"], state["count"], halflife)
        state["mean"].copy_(mean)
        state["scatter"].mul_(decay(part.shape[0], halflife))
        add_upper(state["scatter"], factors(y, dtype))
        state["count"].add_(part.shape[0])


def weighted_about_running_mean(
    rows: Sequence[Tensor], mean: Tensor, count: Tensor, halflife: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``about_running_mean`` with weights: rows times the root of their weight, the step times that of the old sum.

    >>> y, mean, step = weighted_about_running_mean(
    ...     [torch.ones(1, 1)], torch.zeros(1, dtype=torch.float64), torch.tensor(1), 1.0
    ... )
    >>> [round(value, 6) for value in (*y.flatten().tolist(), float(mean), float(step))]  # weights 1/2 and 1
    [0.333333, 0.471405, 0.666667, 0.666667]
    """
    widths, n = [x.shape[1] for x in rows], rows[0].shape[0]
    weights = age_weights(n, halflife, rows[0].device)
    y = torch.empty(n + 1, sum(widths), dtype=torch.float64, device=rows[0].device)
    block = y[:-1]
    for x, part in zip(rows, block.split(widths, dim=1)):
        part.copy_(x)
    own = block[-1].clone()  # the heaviest row: near the mean, as offsets go
    block -= own
    total = weights.sum()
    for _ in range(2):  # what rounding has left of the mean is taken off again
        rest = weights @ block / total
        block -= rest
        own = own + rest
    before = weight_sum(count, halflife) * decay(n, halflife)
    step = (own - mean) * (total / (before + total))
    block -= mean + step - own
    block *= weights.sqrt().unsqueeze(1)
    y[-1] = step * before.sqrt()
    return y, mean + step, step


def merge_later(state: Moments, other: Moments, halflife: float) -> None:
    """Add the moments (count, mean, scatter) of rows that came after those of ``state``, in place."""
    later = other["count"].double()
    faded = torch.exp2(-later / halflife)
    w_a, w_b = weight_sum(state["count"], halflife) * faded, weight_sum(other["count"], halflife)
    delta = other["mean"] - state["mean"]
    total = w_a + w_b
    state["scatter"].mul_(faded).add_(other["scatter"]).addr_(delta * (w_a * w_b / total), delta)
    state["mean"].add_(delta * (w_b / total))
    state["count"].add_(other["count"])
