"""The measures of a sample without each group of its rows, from one basis and sums over the groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import norm as normal
from torch import Tensor

from tdgeom.core.warnings import Gathered, gathered
from tdgeom.measures.jackknife import group_jackknife, without_bias
from tdgeom.measures.sample_metrics import (
    SAMPLE_METRICS,
    covariance_of,
    unit_rows,
    working,
)
from tdgeom.measures.spectrum_metrics import entropy_dimension
from tdgeom.numerics.quantiles import quantiles

__all__ = ["quantile_without", "sample_metrics_without"]

_EXACT = 128  # up to this width measuring anew costs no more
_NORMAL = normal.ppf((np.arange(40) + 0.5) / 40)  # forty equally likely places
_REFERENCE = 1024  # rows that stand for all where pairs of rows are summed


def group_sums(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sums of rows (n, ...) over each group: (groups, ...) in float64."""
    total = values.new_zeros((groups, *values.shape[1:]), dtype=torch.float64)
    return total.index_add_(0, group.to(values.device), values.double())


def sample_metrics_without(
    stage: Any, inputs: Sequence[Tensor | None], group: Tensor, groups: int, basis: Tensor | None = None
) -> list[Tensor] | None:
    """``SampleMetrics`` of all rows and without each group, (groups+1,) each; None of several samples.

    Up to D = 128 measured anew. Beyond, eigenvalues are the variances along ``basis`` (that of all rows of the run, or of the
    sample itself), which is first order in what a group changes; the second moment of cosines is that of all rows with 1,024 of
    them; means are exact. Quantiles: see ``quantile_without``. ``norm_max`` has no error: NaN.
    """
    sample = inputs[0]
    if sample is None or sample.ndim != 2:
        return None
    whole = dict(zip(SAMPLE_METRICS, stage.listed(stage.compute(*inputs))))
    group = group.to(sample.device)
    n_g = torch.bincount(group, minlength=groups).double()
    left = sample.shape[0] - n_g
    norms = torch.linalg.vector_norm(working(sample).double(), dim=-1)
    if sample.shape[1] <= _EXACT:
        found = _anew(stage, inputs, group, whole, n_g)
    else:
        found = _spectral(sample, group, groups, basis, whole) | _cosines(sample, group, groups, whole)
        found["norm_mean"] = (norms.sum() - group_sums(norms, group, groups)) / left
    for name, share in (("norm_q05", 0.05), ("norm_q50", 0.5), ("norm_q95", 0.95)):
        found[name] = quantile_without(norms, share, group, groups)[1:]
    outputs = []
    for name, value in whole.items():
        if name not in found:
            nothing = torch.full_like(value, torch.nan) if value.is_floating_point() else value
            outputs.append(torch.stack([value, *[nothing] * groups]))
            continue
        replicates = torch.where(n_g > 0, found[name], value.double())
        outputs.append(torch.cat((value.double()[None], replicates)))
    return outputs


def _anew(
    stage: Any, inputs: Sequence[Tensor | None], group: Tensor, whole: Mapping[str, Tensor], n_g: Tensor
) -> dict[str, Tensor]:
    """Each measure of the rows left; products made beforehand are of all rows, and left out."""
    sample = inputs[0]
    assert sample is not None
    values: list[Sequence[Tensor]] = []
    with gathered(Gathered()):  # what the replicates warn of is told of the whole
        for g, rows in enumerate(n_g.tolist()):
            kept = sample[group != g]
            if rows and len(kept):
                values.append(stage.listed(stage.compute(kept, *[None] * (len(inputs) - 1))))
            else:
                values.append(
                    [torch.full_like(one, torch.nan, dtype=torch.float64) for one in whole.values()]
                )
    stacked = zip(whole.items(), zip(*values))
    return {
        name: torch.stack([one.double() for one in each])
        for (name, value), each in stacked
        if value.is_floating_point()
    }


def quantile_without(values: Tensor, share: float, group: Tensor, groups: int) -> Tensor:
    """A quantile of (n,) values, and replicates that have its error: (groups+1,) float64.

    A quantile of the rows left jumps from one row to the next: where a group is not many rows beside √n, the jackknife's error
    is right on average and off by half from sample to sample. What groups change smoothly is the share F of values below the
    quantile q: θ₋g = q - (F₋g - F)·slope, where slope·error(F) is the root mean square by which the quantile function leaves q
    when its share does so by a normal of error(F): values that are few and apart (norms of embeddings) jump.

    Woodruff 1952, J. Am. Stat. Assoc. 47; Francisco and Fuller 1991.

    >>> rows, group = torch.arange(1000.0), torch.arange(1000) % 20
    >>> [round(float(q)) for q in quantile_without(rows, 0.5, group, 20)[:2]]
    [500, 500]
    """
    values, group = values.double(), group.to(values.device)
    n_g = torch.bincount(group, minlength=groups)
    below = ((values < (q := quantiles(values, (share,))[0])).double() + (values <= q).double()) / 2
    left = (below.sum() - group_sums(below, group, groups)) / (len(values) - n_g).clamp(min=1)
    shares = torch.cat((below.mean()[None], torch.where(n_g > 0, left, below.mean())))
    error = group_jackknife(shares, n_g).standard_error.nan_to_num(0.0)
    moved = quantiles(values, (share + float(error) * _NORMAL).clip(0.0, 1.0).tolist())
    spread = (torch.stack(moved) - q).square().mean().sqrt()
    return q - (shares - shares[0]) * (spread / torch.where(error > 0, error, torch.inf))


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
