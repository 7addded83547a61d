"""One grid of patches: the cells of each site of a kind, and how its numbers are written."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from tdgeom.core.warnings import UndefinedMeasureWarning
from tdgeom.model.edits.edit_call import EditCall
from tdgeom.model.patching.paired_runs import Paired, PairedRuns
from tdgeom.model.patching.patched_columns import Columns, position_columns
from tdgeom.model.patching.patched_passes import Cells
from tdgeom.model.patching.patching_metrics import Measured
from tdgeom.model.positions import position_groups, position_mask
from tdgeom.model.sites import HEAD_KINDS, Site
from tdgeom.model.structure.resolved_site import ResolvedSite

GRIDS = ("position", "head", "neuron", "layer")


@dataclass
class Grid:
    """The cells of a kind: ``cells`` for each of its sites, what columns are called, and where positions of examples lie."""

    runs: PairedRuns
    kind: str
    by: str
    positions: Any
    entries: list[ResolvedSite]
    cells: list[Cells]
    labels: list[int]
    ranks: Tensor | None
    changed: list[Tensor] = field(default_factory=list)

    @property
    def examples(self) -> int:
        """How many cells there are, counted for each example."""
        return len(self.entries) * len(self.labels) * self.runs.examples

    def pair(self, entry: ResolvedSite) -> Paired:
        """One of its sites in both runs."""
        return self.runs.pair(entry, self.positions)


def grid_cells(
    runs: PairedRuns,
    kind: str,
    sites: Sequence[Site],
    by: str | None,
    positions: Any,
    heads: Sequence[int] | None,
    features: Sequence[int] | None,
) -> Grid:
    """The cells of the sites of a kind. Raises for a ``by`` that the sites have no axis for."""
    if by not in (None, *GRIDS):
        raise ValueError(
            f"by= expects {', '.join(map(repr, GRIDS[:-1]))}, {GRIDS[-1]!r} or None, got {by!r}."
        )
    entries = [next(e for e in runs.capture.resolved if e.site == site) for site in sites]
    flat = runs.read[runs.base]["acts", sites[0]].ndim == 2
    along = by or ("head" if sites[0].kind in HEAD_KINDS else "layer" if flat else "position")
    positions = runs.positions_meant(positions)
    if flat and (along == "position" or not (isinstance(positions, str) and positions == "all")):
        raise ValueError(
            f"activation patching by position: {str(sites[0])!r} has none, it is one row an example. Remedy: by='layer' or "
            "by='neuron', positions='all'."
        )
    found: list[tuple[Cells, list[int], Tensor | None]] = []
    for entry in entries:
        paired = runs.pair(entry, positions)
        found.append(_cells(runs, entry, paired, along, positions, heads, features))
    if any(labels != found[0][1] for _, labels, _ in found):
        raise ValueError(
            f"activation patching: the sites of {kind} have columns of their own, {[len(cells) for cells, *_ in found]} of them. "
            "Remedy: layers= of one shape."
        )
    return Grid(
        runs, kind, along, positions, entries, [cells for cells, *_ in found], found[0][1], found[0][2]
    )


def _cells(
    runs: PairedRuns,
    entry: ResolvedSite,
    paired: Paired,
    by: str,
    positions: Any,
    heads: Sequence[int] | None,
    features: Sequence[int] | None,
) -> tuple[Cells, list[int], Tensor | None]:
    words = runs.words_beside(entry.site, paired.mask.shape[1])
    if by == "position":
        columns = position_columns(paired.mask, positions, **words)
        columns = _in_both(columns, paired, positions)
        keep = _kept(entry, paired, heads, features)
        return Cells(columns.masks, keep=keep), columns.labels, columns.ranks
    groups = position_groups(positions)
    if groups is not None:
        raise ValueError(
            f"by={by!r} patches all positions= together: give one set of them, not {len(groups)}."
        )
    mask, _ = position_mask(paired.mask, positions, **words)
    if not bool((mask & paired.present).any()):
        raise ValueError(f"activation patching: no example has the positions {positions!r} in both runs.")
    if by == "layer":
        return Cells(mask[None], keep=_kept(entry, paired, heads, features)), [0], None
    if by == "head":
        count = _head_count(entry)
        own = _chosen("heads", heads, count)
        units = torch.tensor([head // entry.groups for head in own], device=mask.device)
        masks = mask.expand(len(own), *mask.shape)
        return Cells(masks, units, 2, _kept(entry, paired, None, features)), own, None
    if paired.own.ndim != 3:
        raise ValueError(
            f"by='neuron' needs sites with one axis of features, such as 'mlp_act', got {str(entry.site)!r}, "
            f"{tuple(paired.own.shape)}. Remedy: by='head'."
        )
    if heads is not None:
        raise ValueError(f"heads= means nothing at {str(entry.site)!r}, which has none. Remedy: features=.")
    own = _chosen("features", features, paired.own.shape[-1])
    return Cells(mask.expand(len(own), *mask.shape), torch.tensor(own, device=mask.device), -1), own, None


def _in_both(columns: Columns, paired: Paired, positions: Any) -> Columns:
    """Columns of positions that some example has in both runs; of numbers, all of them must be such."""
    kept = (columns.masks & paired.present).flatten(1).any(1)
    if bool(kept.all()):
        return columns
    named = isinstance(positions, int | list | tuple) or position_groups(positions) is not None
    if named or not bool(kept.any()):
        lost = [label for label, ok in zip(columns.labels, kept.tolist()) if not ok]
        raise ValueError(
            f"activation patching: no example has the positions {lost} of positions={positions!r} in both runs."
        )
    labels = [label for label, ok in zip(columns.labels, kept.tolist()) if ok]
    return Columns(columns.masks[kept], labels, columns.ranks[kept])


def _kept(
    entry: ResolvedSite, paired: Paired, heads: Sequence[int] | None, features: Sequence[int] | None
) -> Tensor | None:
    """What of a position is patched, broadcast over what lies behind (B, T); ``None`` for all."""
    shape = paired.own.shape[2:]
    keep = None
    if heads is not None:
        own = [head // entry.groups for head in _chosen("heads", heads, _head_count(entry))]
        keep = torch.zeros(shape[0], dtype=torch.bool, device=paired.own.device)
        keep[own] = True
        keep = keep.reshape(-1, *[1] * (len(shape) - 1))
    if features is not None:
        some = torch.zeros(shape[-1], dtype=torch.bool, device=paired.own.device)
        some[_chosen("features", features, shape[-1])] = True
        keep = some if keep is None else keep & some
    return keep


def _head_count(entry: ResolvedSite) -> int:
    if not entry.head_count or (entry.head_axis is None and not EditCall(entry.site).is_pattern):
        raise ValueError(
            f"by='head' or heads= needs sites with heads ({', '.join(HEAD_KINDS)}), got {str(entry.site)!r}."
        )
    return entry.head_count


def _chosen(what: str, given: Sequence[int] | None, count: int) -> list[int]:
    if given is None:
        return list(range(count))
    listed = [given] if isinstance(given, int) else [int(one) for one in given]
    if not listed or any(not -count <= one < count for one in listed):
        raise IndexError(f"{what}={given!r} is out of range: there are {count}.")
    return [one % count for one in listed]


# ------------------------------------------------------------------------------------------------- results


def two_ends(result: TensorDict, runs: PairedRuns, measures: Sequence[Measured]) -> dict[str, list[Tensor]]:
    """The metrics of both runs, (B,) each, written as "clean" and "corrupted"."""
    found: dict[str, list[Tensor]] = {}
    for name, value in runs.final.items():
        home = value.device if isinstance(value, Tensor) else runs.device
        everyone = torch.arange(runs.examples, device=home)
        found[name] = [measure.of(value, everyone) for measure in measures]
        for measure, own in zip(measures, found[name]):
            result.set(measure.under(name), own)
    return found


def fill(values: Sequence[Tensor], there: Tensor, changes: Tensor, base: Sequence[Tensor]) -> list[Tensor]:
    """Cells (C, B) of each metric: what was run; of the run to patch, where both hold the same; NaN where there is no cell."""
    present, same = there.cpu(), (there & ~changes).cpu()
    filled = []
    for index, own in enumerate(base):
        unpatched = own.detach().double().cpu().expand(present.shape)
        value = values[index] if values else torch.full_like(unpatched, torch.nan)
        value = torch.where(same & value.isnan(), unpatched, value)
        filled.append(value.masked_fill(~present, torch.nan))
    return filled


def write_grid(
    result: TensorDict,
    grid: Grid,
    measure: Measured,
    values: Tensor,
    goal: Tensor,
    base: Tensor,
) -> None:
    """The values (layers, C, B) of a metric, their mean over examples, and how far it goes from ``base`` to ``goal`` (B,)."""
    mean = values.nanmean(-1)
    # examples without the position count neither here nor in what the effect is measured against
    known = ~values.isnan()
    weight = known.double() / known.sum(-1, keepdim=True).clamp(min=1)
    start, end = ((weight * v.detach().double().cpu()).sum(-1) for v in (base, goal))
    reach = torch.where(end == start, torch.nan, end - start)
    if bool((reach.isnan() & known.any(-1)).any()):
        warnings.warn(
            f"activation_patching: the two runs have the same metric, so 'recovered' of {grid.kind} is undefined (NaN).",
            UndefinedMeasureWarning,
            stacklevel=4,
        )
    result.set(measure.under("per_example", grid.kind), values)
    result.set(measure.under("grid", grid.kind), mean)
    result.set(measure.under("recovered", grid.kind), (mean - start) / reach)


def write_axes(result: TensorDict, grid: Grid, *, alike: bool) -> None:
    """What the axes of a grid are, and where the two runs differ; said, where they do not though their metrics do."""
    layers = [-1 if entry.site.layer is None else entry.site.layer for entry in grid.entries]
    result.set(("layers", grid.kind), torch.tensor(layers, device="cpu"))
    result.set(("columns", grid.kind), torch.tensor(grid.labels, device="cpu"))
    if grid.ranks is not None:
        result.set(("positions", grid.kind), grid.ranks.cpu())
    changed = torch.stack(grid.changed)
    result.set(("changed", grid.kind), changed)
    if not alike and not bool(changed.any()):
        warnings.warn(
            f"activation_patching: both runs hold the same at every cell of {grid.kind}, so that patching it changes "
            "nothing. Remedy: positions= at which they differ, or sites behind those.",
            UserWarning,
            stacklevel=4,
        )
