"""Errors of dimension estimators: from subsets of the documents, for what a neighbour left out leaves behind is noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.warnings import FewRowsWarning, Gathered, gathered, tell

__all__ = ["dimension_without", "group_subsets"]

_SHARE = 0.2  # of the groups in each subset


def group_subsets(groups: int) -> Tensor:
    """As many subsets as groups, a fifth of the groups in each and each group in as many: bool (groups, groups).

    >>> group_subsets(5).int().tolist()[:2]
    [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0]]
    """
    count = max(1, round(groups * _SHARE))
    first: list[int] = []
    step = 0
    while len(first) < count:  # 0, 1, 3, 6, ...: no two subsets share many
        place = step * (step + 1) // 2 % groups
        first += [] if place in first else [place]
        step += 1
        if step > 2 * groups:
            first = list(range(count))
    picked = torch.zeros(groups, groups, dtype=torch.bool)
    for r in range(groups):
        picked[r, [(r + place) % groups for place in first]] = True
    return picked


def dimension_without(stage: Any, inputs: Sequence[Any], group: Tensor, groups: int) -> list[Tensor] | None:
    """A dimension estimator of a sample, of all rows, and replicates that have its error: (groups+1, ...) each.

    Where a row is left out, the rows next to it look at another neighbour, by chance nearer or farther: with a twentieth of the
    rows left out that is most of what moves, and a jackknife's error comes out about 1.6 times too large. So the estimator is
    called on subsets of a fifth of the groups: of n rows b, error² = variance over subsets · b/(n - b). The replicates are
    the value of all rows and these differences, sized so that the jackknife gives this error (they have no bias).

    Politis, Romano and Wolf (1999), Subsampling; Abadie and Imbens (2008), On the failure of the bootstrap for matching
    estimators (a row drawn twice is its own nearest neighbour).
    """
    sample = inputs[0]
    if stage.source != "sample" or sample.ndim != 2:
        return None
    group = group.to(sample.device)
    whole = stage.listed(stage.compute(*inputs))
    m = torch.bincount(group, minlength=groups).double()
    n, found, shares = m.sum(), [], []
    with gathered(Gathered()):
        for picked in group_subsets(groups).to(group.device):
            kept = picked[group]
            try:
                values = stage.listed(stage.compute(sample[kept]))
            except ValueError:  # too few rows for the neighbours looked at
                values = [torch.full_like(value, torch.nan, dtype=torch.float64) for value in whole]
            found.append(values)
            shares.append(kept.sum().double() / (n - kept.sum()))
    outputs, unknown = [], False
    for name, value, *others in zip(stage.out_names, whole, *found):
        if not value.is_floating_point() or any(one.shape != value.shape for one in others):
            outputs.append(torch.stack([value] * (groups + 1)))
            continue
        subsets = torch.stack(others).double()
        unknown |= name == "estimate" and bool(subsets.isnan().any() & ~value.isnan().all())
        tail = [1] * value.ndim
        apart = (subsets - subsets.mean(0)) * torch.stack(shares).sqrt().reshape(-1, *tail)
        # the jackknife's variance is Σ(h - 1)·apart²/G, h = n/m
        size = torch.where(m > 0, (n / m.clamp(min=1) - 1), torch.inf) * (groups - 1) / (m > 0).sum()
        outputs.append(
            torch.cat((value.double()[None], value.double() + apart / size.sqrt().reshape(-1, *tail)))
        )
    if unknown:
        tell(
            f"{type(stage).__name__}: no standard error at some scales: a fifth of the {int(n)} rows are too few for the "
            f"neighbours looked at. Take a larger sample_size, or fewer neighbours.",
            FewRowsWarning,
        )
    return outputs
