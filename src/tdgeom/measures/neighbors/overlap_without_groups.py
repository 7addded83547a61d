"""Overlaps of neighbourhoods without each group of rows: what every row adds to them, as itself and as a neighbour of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tdgeom.measures.neighbors.nearest_neighbors import nearest_neighbors

__all__ = ["label_overlap_without", "overlap_without"]


def overlap_without(stage: Any, a: Any, b: Any, group: Tensor, groups: int) -> list[Tensor] | None:
    """``NeighborhoodOverlap`` and ``JaccardKNN`` of a sample, of all rows and without each group: (groups+1,).

    By influence, since a neighbour left out is one lost, and in its place comes the next on either side: what these two are worth
    to a row is what one place more brings it, dc/dk of its shared neighbours c(k), from k/2 to 3k/2, half of it on either side.
    (Rows that are far from the others then gain and lose as much as the density of rows says: o(k, N) depends on k/N.) A row's
    influence is its own value and what it gains or loses the rows whose neighbour it is. Of the influences' spread the part is
    taken off that single neighbours make, which is in it twice (as their own and as that of the row that they are neighbours of).
    """
    if stage.source != "sample" or stage.ceiling or a.inputs[0].ndim != 2:
        return None
    k, n = stage.k, group.shape[0]
    if n < 2 * k + 2:
        return None
    for side in (a, b):
        if "plain" not in side.held:
            side.held["plain"] = stage.prepare(side.inputs[0])
        if "wide" not in side.held:
            found = nearest_neighbors(side.inputs[0], k + k // 2, metric=stage.metric, memory=stage.memory)
            side.held["wide"] = found.index
    whole = stage.compare(a.held["plain"], b.held["plain"])
    x, y = a.held["wide"], b.held["wide"]
    shared = _members(x[:, :k], y[:, :k])
    common = shared.sum(-1)
    jaccard = stage.measure == "jaccard_knn"
    own = common / (2 * k - common) if jaccard else common / k
    slope = (2 * k / (2 * k - common).square() if jaccard else torch.full_like(own, 1 / k)).unsqueeze(-1)
    less, more = (_members(x[:, :m], y[:, :m]).sum(-1, keepdim=True) for m in (k - k // 2, k + k // 2))
    worth = (more - less) / (4 * (k // 2)) if k > 1 else torch.full_like(less, 0.5) * own.unsqueeze(-1)
    apart = _lent(own - own.mean(), x[:, :k], (shared - worth) * slope)
    apart = _lent(apart, y[:, :k], -worth * slope)
    rate = shared.mean(0)
    single = (slope.square().mean() * (rate * (1 - rate)).sum()) / n
    return [_replicates(whole[0].double(), apart, single, group, groups)]


def label_overlap_without(
    stage: Any, inputs: Sequence[Any], group: Tensor, groups: int
) -> list[Tensor] | None:
    """``LabelOverlap`` (plain, k neighbours) of a sample, of all rows and without each group: (groups+1,)."""
    sample, label = inputs[:2]
    if stage.source != "sample" or stage.class_fraction is not None or stage.balanced or sample.ndim != 2:
        return None
    asked = (
        label != stage.ignore_index
        if label.is_floating_point() or label.dtype != torch.bool
        else torch.ones_like(label)
    )
    k, n = stage.k, int(asked.sum())
    if label.ndim != 1 or n < 2 * k + 2:
        return None
    whole = stage.compute(*inputs)
    rows, label = sample[asked], label[asked]
    index = nearest_neighbors(rows, 2 * k, metric=stage.metric, memory=stage.memory).index
    same = (label[index] == label.unsqueeze(-1)).double()
    own = same[:, :k].mean(-1)
    gain = (same[:, :k] - same[:, k:].mean(-1, keepdim=True)) / k
    apart = _lent(own - own.mean(), index[:, :k], gain)
    rate = same[:, :k].mean(0)
    single = (rate * (1 - rate)).sum() / k**2 / n
    return [_replicates(whole.double(), apart, single, group[asked.to(group.device)], groups)]


def _members(index: Tensor, others: Tensor) -> Tensor:
    """(N, a) 1.0 where a row of ``index`` (N, a) is among the same row's ``others`` (N, b)."""
    return (index.unsqueeze(-1) == others.unsqueeze(-2)).any(-1).double()


def _lent(apart: Tensor, index: Tensor, gain: Tensor) -> Tensor:
    """``apart`` (N,) and, of every row, the gains (N, k) of those whose neighbours (N, k) it is among."""
    return apart.index_add(0, index.flatten(), gain.expand(index.shape).flatten())


def _replicates(whole: Tensor, apart: Tensor, single: Tensor, group: Tensor, groups: int) -> Tensor:
    apart = apart - apart.mean()
    n = apart.shape[0]
    spread = apart.square().mean() / n
    apart = apart * (1 - single / spread).clamp(min=0.5).sqrt() if bool(spread > 0) else apart
    group = group.to(apart.device)
    left = n - torch.bincount(group, minlength=groups).double()
    sums = apart.new_zeros(groups).index_add_(0, group, apart)
    return torch.cat((whole[None], whole - sums / left))
