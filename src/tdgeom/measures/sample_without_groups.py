"""The measures of a sample without each group of its rows, from one basis and sums over the groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tdgeom.measures.jackknife import without_bias
from tdgeom.measures.sample_metrics import (
    SAMPLE_METRICS,
    covariance_of,
    unit_rows,
    working,
)
from tdgeom.measures.spectrum_metrics import entropy_dimension
from tdgeom.numerics.quantiles import quantiles

__all__ = ["sample_metrics_without"]

_EXACT = 128  # up to this width measuring anew costs no more
_REFERENCE = 1024  # rows that stand for all where pairs of rows are summed


def group_sums(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sums of rows (n, ...) over each group: (groups, ...) in float64."""
    total = values.new_zeros((groups, *values.shape[1:]), dtype=torch.float64)
    return total.index_add_(0, group.to(values.device), values.double())


def sample_metrics_without(
    stage: Any, inputs: Sequence[Tensor | None], group: Tensor, groups: int, basis: Tensor | None = None
) -> list[Tensor] | None:
    """``SampleMetrics`` of all rows and without each group, (groups+1,) each; None of few features, or of several samples.

    Eigenvalues are the variances along ``basis`` (that of all rows of the run, or of the sample itself), which is first order
    in what a group changes; the second moment of cosines is that of all rows with 1,024 of them. Means and quantiles are
    exact. ``norm_max`` has no error: NaN.
    """
    sample = inputs[0]
    if sample is None or sample.ndim != 2 or sample.shape[1] <= _EXACT:
        return None
    whole = dict(zip(SAMPLE_METRICS, stage.listed(stage.compute(*inputs))))
    group = group.to(sample.device)
    n_g = torch.bincount(group, minlength=groups).double()
    left = sample.shape[0] - n_g
    found = _spectral(sample, group, groups, basis, whole) | _cosines(sample, group, groups, whole)
    norms = torch.linalg.vector_norm(working(sample).double(), dim=-1)
    found["norm_mean"] = (norms.sum() - group_sums(norms, group, groups)) / left
    kept = [quantiles(norms[group != g], (0.05, 0.5, 0.95)) for g in range(groups)]
    for name, values in zip(("norm_q05", "norm_q50", "norm_q95"), zip(*kept)):
        found[name] = torch.stack(values)
    outputs = []
    for name, value in whole.items():
        if name not in found:
            nothing = torch.full_like(value, torch.nan) if value.is_floating_point() else value
            outputs.append(torch.stack([value, *[nothing] * groups]))
            continue
        replicates = torch.where(n_g > 0, found[name], value.double())
        outputs.append(torch.cat((value.double()[None], replicates)))
    return outputs


def variances_without(rows: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Variances of the columns of centred rows (n, D) over all, (D,), and without each group, (groups, D)."""
    n = rows.shape[0]
    sums, squares = group_sums(rows, group, groups), group_sums(rows.square(), group, groups)
    left = (n - torch.bincount(group, minlength=groups).double()).unsqueeze(-1)
    total = squares.sum(0)
    # rows are about the mean of all: what is left has the mean -sums/left
    return total / (n - 1), (total - squares - sums.square() / left) / (left - 1)


def _spectral(
    sample: Tensor, group: Tensor, groups: int, basis: Tensor | None, whole: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    rows = working(sample)
    rows = rows - rows.mean(0)
    size = rows.abs().amax().clamp(min=torch.finfo(rows.dtype).tiny)
    rows = rows / size
    if basis is None or basis.shape[0] != rows.shape[1] or not torch.isfinite(basis).all():
        basis = torch.linalg.eigh(covariance_of(rows))[1]
    _, spreads = variances_without(rows, group, groups)
    found = {"top_feature_share": spreads.amax(-1) / spreads.sum(-1)}
    along, alongs = variances_without(rows @ basis.to(rows.dtype), group, groups)
    values = torch.cat((along[None], alongs)).clamp(min=0).sort(-1, descending=True).values
    p = values / values.sum(-1, keepdim=True)
    measures = {
        "sv_effective_rank": entropy_dimension(values.sqrt()),
        "sv_stable_rank": 1 / p[:, 0],
        "sv_participation_ratio": 1 / p.square().sum(-1),
        **{f"ve_{k}": p[:, :k].sum(-1) for k in (4, 8, 16, 32)},
    }
    # what the basis makes of all rows is not quite their own spectrum: the differences count, their mean does not
    rows_of = torch.bincount(group, minlength=groups)
    apart = {
        name: without_bias(value - value[0] + whole[name], rows_of)[1:] for name, value in measures.items()
    }
    return found | apart


def _cosines(sample: Tensor, group: Tensor, groups: int, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean of the cosines over pairs left, and their standard deviation."""
    unit, directed = unit_rows(working(sample))
    there = directed.double()
    n = there.sum() - group_sums(there, group, groups)
    sums = unit.sum(0, dtype=torch.float64) - group_sums(unit, group, groups)
    pairs = n * (n - 1)
    mean = (sums.square().sum(-1) - n) / pairs
    # each row's squared distances from the mean, of its cosines with others, by those with some; within a group by all
    some = unit[:_REFERENCE]
    own = (unit @ some.mT - whole["cos_sim_mean"].to(unit.dtype)).square()
    own.diagonal().zero_()
    own = (own * there[: some.shape[0]]).sum(-1, dtype=torch.float64)
    others = there[: some.shape[0]].sum() - torch.where(
        torch.arange(len(own), device=own.device) < some.shape[0], there, 0.0
    )
    own = torch.where(directed, own / others.clamp(min=1), 0.0)
    count = there.sum()
    total = whole["cos_sim_std"].square() * (count * (count - 1) - 1)
    own = own * (total / own.sum())
    within = []
    for g in range(groups):
        rows = unit[group == g]
        apart = (rows @ rows.mT - whole["cos_sim_mean"].to(unit.dtype)).square()
        apart.diagonal().zero_()
        some = (there[group == g] @ apart.double()) @ there[group == g]
        within.append(some)
    summed = total - 2 * group_sums(own, group, groups) + torch.stack(within)
    variance = summed / pairs - (mean - whole["cos_sim_mean"]).square()
    return {"cos_sim_mean": mean, "cos_sim_std": variance.clamp(min=0).sqrt()}
