"""Errors of what looks at neighbours: from subsets of the documents, for what a neighbour left out leaves behind is noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor

from tdgeom.core.warnings import FewRowsWarning, Gathered, gathered, tell
from tdgeom.measures.dimension.estimate import DimensionStage, NeighborhoodStage
from tdgeom.measures.jackknife import without_bias
from tdgeom.measures.neighbors.nearest_neighbors import distinct_neighbors

__all__ = ["decimation_without", "dimension_without", "group_subsets", "pair_of_subsets"]

_SHARE, _FAR_SHARE = 0.25, 0.5  # of the groups in each subset; where estimates look far
_CALLED = {_SHARE: "a quarter", _FAR_SHARE: "half"}
_FAR = 16  # neighbours
_TRIED = 400


@cache
def _design(groups: int, share: float = _SHARE) -> tuple[tuple[int, ...], float]:
    """Which groups the first subset has, and how many independent subsets all that are shifted from it are worth.

    A sum over a subset's groups has a variance over all shifts whose own spread is that of Σλχ²₁, λ the squared Fourier
    coefficients of the subset: worth (Σλ)²/Σλ² degrees of freedom, most where no two subsets share much.
    """
    generator = torch.Generator().manual_seed(0)
    count = max(1, round(groups * share))
    best: tuple[tuple[int, ...], float] = ((), 0.0)
    for _ in range(_TRIED if count > 1 else 1):
        own = [0, *(1 + torch.randperm(groups - 1, generator=generator, device="cpu")[: count - 1]).tolist()]
        power = torch.fft.fft(
            torch.zeros(groups, dtype=torch.float64, device="cpu").index_fill(
                0, torch.tensor(own, device="cpu"), 1
            )
        )
        size = power[1:].abs().square()
        worth = float(size.sum().square() / size.square().sum())
        best = max(best, (tuple(own), worth), key=lambda one: one[1])
    return best


def group_subsets(groups: int, share: float = _SHARE) -> Tensor:
    """As many subsets as groups, a quarter of the groups in each and each group in as many: bool (groups, groups).

    Or another ``share``.

    >>> group_subsets(5).int().tolist()[:2]
    [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0]]
    """
    first, _ = _design(groups, share)
    picked = torch.zeros(groups, groups, dtype=torch.bool)
    for r in range(groups):
        picked[r, [(r + place) % groups for place in first]] = True
    return picked


def dimension_without(stage: Any, inputs: Sequence[Any], group: Tensor, groups: int) -> list[Tensor] | None:
    """A dimension estimator of a sample, of all rows, and replicates that have its error: (groups+1, ...) each.

    See ``_from_subsets``. Estimates that look at 16 neighbours and more take subsets of half the groups: those of a quarter look
    four times as far as all rows do, where estimates are calmer (Gride's errors at n = 8 and 16: 0.94 and 0.90 of the
    spread).
    """
    sample = inputs[0]
    if stage.source != "sample" or sample.ndim != 2:
        return None
    whole = stage.listed(stage.compute(*inputs))
    far, ranks = _looks_at(stage, sample) >= _FAR, getattr(stage, "ranks", None)
    found, each = [], [False, True] if far and ranks else [far]
    for wide in each:
        call = _of_table(stage, sample) if wide else lambda kept: stage.listed(stage.compute(sample[kept]))
        share = _FAR_SHARE if wide else _SHARE
        found.append(_from_subsets(stage, whole, call, group, groups, share=share, silent=wide != far))
    if len(found) == 1:
        return found[0]
    wide_ranks = 2 * torch.tensor(ranks, device=sample.device) >= _FAR
    return [torch.where(wide_ranks, b, a) if a.shape[1:] == wide_ranks.shape else a for a, b in zip(*found)]


def _looks_at(stage: Any, sample: Tensor) -> int:
    """How many neighbours a row an estimator looks at; 0 of one that looks at more than their distances."""
    if (
        isinstance(stage, NeighborhoodStage)
        or type(stage).neighbors_needed is DimensionStage.neighbors_needed
    ):
        return 0
    return stage.neighbors_needed(sample.shape[0])


def _of_table(stage: Any, sample: Tensor) -> Callable[[Tensor], list[Tensor]]:
    """The stage of the rows kept, from one neighbour table with so many neighbours that enough are kept."""
    needed, most = stage.neighbors_needed(sample.shape[0]), sample.shape[0] - 1
    held = min(most, 3 * needed + 32)
    table = distinct_neighbors(sample, held, memory=stage.memory)

    def measured(kept: Tensor) -> list[Tensor]:
        nonlocal held, table
        while True:
            known = torch.isfinite(table.distance)
            rows = kept & known[:, 0]
            some = torch.where(known & kept[table.index], table.distance, torch.inf)[rows]
            some = some.sort(-1).values[:, :needed]
            if held == most or not bool(torch.isinf(some).any()):
                break
            held = min(most, 2 * held)
            table = distinct_neighbors(sample, held, memory=stage.memory)
        if bool(torch.isinf(some).any()):
            raise ValueError("fewer rows than neighbours")
        return stage.listed(stage.measure(some, table.duplicates, table.near_duplicates))

    return measured


def decimation_without(stage: Any, inputs: Sequence[Any], group: Tensor, groups: int) -> list[Tensor] | None:
    """``Decimation`` with replicates that have its errors: at each level the runs of its size in a subset, or the subset itself.

    A level of larger runs than a subset has rows takes the error of one run of the subset's size, as the estimator itself does.
    """
    sample = inputs[0]
    if sample.ndim != 2:
        return None
    whole = stage.listed(stage.compute(*inputs))
    sizes = [sample.shape[0] >> level for level in range(whole[0].shape[0])]

    def of_rows(kept: Tensor) -> list[Tensor]:
        rows = sample[kept]
        found = []
        for size in (min(size, rows.shape[0]) for size in sizes):
            runs = rows.shape[0] // size
            used = runs if stage.max_repeats is None else min(runs, stage.max_repeats)
            parts = rows[: used * size].unflatten(0, (used, size))
            found.append(stage.estimator.listed(stage.estimator.compute(parts))[0].mean(-1))
        return [torch.stack(found), *whole[1:]]

    return _from_subsets(stage, whole, of_rows, group, groups)


def pair_of_subsets(stage: Any, a: Any, b: Any, group: Tensor, groups: int) -> list[Tensor] | None:
    """A measure of two sides' neighbours (CKNNA, information imbalance) and replicates that have its errors: (groups+1,) each."""
    x, y = a.inputs[0], b.inputs[0]
    if x.ndim != 2 or y.ndim != 2:
        return None
    for side, rows in ((a, x), (b, y)):
        if "plain" not in side.held:
            side.held["plain"], side.held["subsets"] = stage.prepare(rows), {}

    def compared(kept: Tensor) -> list[Tensor]:
        key = int(kept.nonzero()[0]), int(kept.sum()), hash(tuple(kept.nonzero().flatten().tolist()))
        sides = []
        for side, rows in ((a, x), (b, y)):
            if key not in side.held["subsets"]:
                side.held["subsets"][key] = stage.prepare(rows[kept])
            sides.append(side.held["subsets"][key])
        return stage.listed(stage.compare(*sides))

    whole = stage.listed(stage.compare(a.held["plain"], b.held["plain"]))
    # mean ranks of nearest rows fall as rows come in, and their spread with them
    relative = all(name.startswith("information_imbalance") for name in stage.out_names)
    return _from_subsets(stage, whole, compared, group, groups, relative=relative)


def _from_subsets(
    stage: Any,
    whole: list[Tensor],
    call: Callable[[Tensor], list[Tensor]],
    group: Tensor,
    groups: int,
    *,
    relative: bool = False,
    share: float = _SHARE,
    silent: bool = False,
) -> list[Tensor]:
    """Outputs of all rows, and replicates that have their errors, of a function of the rows kept: (groups+1, ...) each.

    ``relative``: the subsets tell the error as a share of the value. ``share``: of the groups in each subset.

    Where a row is left out, the rows next to it look at another neighbour, by chance nearer or farther: with a twentieth of the
    rows left out that is most of what moves, and a jackknife's error comes out about 1.6 times too large. So the measure is
    called on subsets of a quarter of the groups: of n rows b, error² = variance over subsets · b/(n - b). Subsets overlap, so
    that 20 are worth about 15 degrees of freedom: the error is larger by what Student's t is, for intervals take those of the
    groups. The replicates are the value of all rows and these differences, sized so that the jackknife gives this error (they
    have no bias).

    Politis, Romano and Wolf (1999), Subsampling; Abadie and Imbens (2008), On the failure of the bootstrap for matching
    estimators (a row drawn twice is its own nearest neighbour).
    """
    group = group.to(whole[0].device)
    m = torch.bincount(group, minlength=groups).double()
    n, found, shares = m.sum(), [], []
    with gathered(Gathered()):
        for picked in group_subsets(groups, share).to(group.device):
            kept = picked[group]
            try:
                values = call(kept)
            except ValueError:  # too few rows for the neighbours looked at
                values = [torch.full_like(value, torch.nan, dtype=torch.float64) for value in whole]
            found.append(values)
            shares.append(kept.sum().double() / (n - kept.sum()))
    outputs, unknown = [], False
    wider = float(student.ppf(0.975, _design(groups, share)[1]) / student.ppf(0.975, max(groups - 1, 1))) ** 2
    for name, value, *others in zip(stage.out_names, whole, *found):
        if not value.is_floating_point() or any(one.shape != value.shape for one in others):
            outputs.append(torch.stack([value] * (groups + 1)))
            continue
        subsets = torch.stack(others).double()
        estimate = name == "estimate" or len(stage.out_names) < 3
        unknown |= estimate and bool(subsets.isnan().any() & ~value.isnan().all())
        tail = [1] * value.ndim
        middle = subsets.mean(0)
        apart = (subsets - middle) * (value / middle if relative else 1)
        apart = apart * torch.stack(shares).sqrt().reshape(-1, *tail)
        # the jackknife's variance is Σ(h - 1)·apart²/G, h = n/m
        size = torch.where(m > 0, (n / m.clamp(min=1) - 1), torch.inf) * (groups - 1) / (m > 0).sum() / wider
        replicates = torch.cat(
            (value.double()[None], value.double() + apart / size.sqrt().reshape(-1, *tail))
        )
        outputs.append(without_bias(replicates.movedim(0, -1), m).movedim(-1, 0))
    if unknown and not silent:
        tell(
            f"{type(stage).__name__}: no standard error at some scales: {_CALLED[share]} of the {int(n)} rows are too few for "
            f"the neighbours looked at. Take a larger sample_size, or fewer neighbours.",
            FewRowsWarning,
        )
    return outputs
