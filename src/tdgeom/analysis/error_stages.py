"""What an analysis with standard errors puts around its stages, and what makes errors of their replicates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import Tensor

from tdgeom.core.for_each import SHARED, ForEach
from tdgeom.core.for_each_pair import ForEachPair
from tdgeom.core.keys import NOT_WRITTEN, Key, key_tuple, optional_in_keys
from tdgeom.core.pair_stage import PairStage
from tdgeom.core.pipeline import opened
from tdgeom.core.renamed import is_streaming, stage_of
from tdgeom.core.stage import Stage
from tdgeom.core.streaming_stage import StreamingStage
from tdgeom.core.warnings import tell
from tdgeom.measures.jackknife import NO_ERROR, Jackknife
from tdgeom.measures.leave_out import LeaveOut, LeaveOutPair
from tdgeom.measures.leave_out_moments import LeaveOutMoments
from tdgeom.measures.left_out_methods import told_apart
from tdgeom.measures.router import RouterLoad
from tdgeom.measures.similarity.pair_sources import MomentPairStage
from tdgeom.measures.similarity.subspace import SubspaceNovelty
from tdgeom.stream.replicates import Replicates

__all__ = ["ErrorStages", "as_stage", "has_own_error"]

_TWIN = "sample_between"


class _AnyReplicates(Replicates):
    """Replicates of a stream that nobody has looked at: an output whose shape depends on the rows has none."""

    def beside_each_other(self, key: Key, values: list[Tensor]) -> list[Tensor]:
        """The value of all rows, and NaN."""
        unknown = torch.full(values[0].shape, torch.nan, dtype=torch.float64, device=values[0].device)
        return [values[0].double(), *(unknown for _ in values[1:])]


class _Called(Stage):
    """A module that is no stage, such as a function of the sample in a ``TensorDictModule``, as one."""

    def __init__(self, module: TensorDictModuleBase) -> None:
        super().__init__(reads=dict.fromkeys(module.in_keys), writes=list(module.out_keys))
        self.module = module

    def compute(self, *inputs: Tensor) -> list[Tensor]:
        """What the module writes."""
        td = self.module(TensorDict(dict(zip(self.in_keys, inputs)), batch_size=[]))
        return [torch.as_tensor(td.get(key)) for key in self.module.out_keys]


def as_stage(module: TensorDictModuleBase) -> TensorDictModuleBase:
    """A module of the sample's rows as a stage that can be called on some of them; any other as it is."""
    rows = bool(module.in_keys) and {key_tuple(key)[0] for key in module.in_keys} <= {
        "sample",
        "sample_carried",
    }
    return _Called(module) if rows and not is_streaming(module) and not optional_in_keys(module) else module


def _told(stage: TensorDictModuleBase) -> TensorDictModuleBase:
    """A stage that gets no errors; one of the user's own does not so without a word."""
    if not type(stage).__module__.startswith("tdgeom.") and hasattr(stage, "out_keys"):
        tell(
            f"errors=True: {type(stage).__name__} reads {list(stage.in_keys)[:4]}, of which no group of documents can be left "
            f"out, so {list(stage.out_keys)[:4]} have no errors. Read rows, ('sample'), or moments alone; or in a pipeline of "
            f"your own put the stage behind tg.Replicates(tg.StreamingCovariance()), and tg.Jackknife behind it."
        )
    return stage


def has_own_error(stage: Stage) -> bool:
    """Whether the stage itself writes the error of what it measures."""
    return any(key_tuple(key)[-1].endswith("_se") for key in stage.out_keys_source)


class ErrorStages:
    """The stages that replicates and errors need; with 0 groups none, and every stage stays as it is."""

    def __init__(self, groups: int) -> None:
        self.groups = groups
        self._streams = 0  # of one's own, each of which names the rows of its groups

    def of_sites(self, stage: TensorDictModuleBase, sites: Sequence[Any]) -> TensorDictModuleBase:
        """A stage of one site at all of these, with its replicates; a ``ForEach`` at its own."""
        if not isinstance(stage, ForEach):
            return ForEach(self.around(stage), sites)
        if not self.groups:
            return stage
        units: list[Any] = list(stage.module)
        made = [ForEach(self.around(unit.module), [unit.where]) for unit in units]
        # a site that is no single name, or shared keys of one's own, would be read elsewhere
        alike = all(set(own.in_keys) <= set(one.in_keys) for one, own in zip(made, units))
        return TensorDictSequential(*made) if alike else stage

    def of_pairs(self, stage: ForEachPair) -> list[TensorDictModuleBase]:
        """A ``ForEachPair`` of one's own, with its replicates."""
        inner = stage.units[0].module
        wrapped = [self.around(inner), *(self.beside(inner) if isinstance(inner, PairStage) else [])]
        if wrapped == [inner]:
            return [stage]
        settings = stage.settings()
        where = {"sites": settings["sites"], "pairs": stage.pairs}
        return [ForEachPair(one, **where, shared=settings.get("shared", SHARED)) for one in wrapped]

    def around(self, stage: TensorDictModuleBase) -> TensorDictModuleBase:
        """The stage with its replicates, where it has some: of rows of the sample, of the spectra, a stream of one's own."""
        if not self.groups or isinstance(stage, LeaveOut | LeaveOutPair | LeaveOutMoments):
            return stage
        if isinstance(stage, Stage) and has_own_error(stage):
            return stage
        if not isinstance(stage, Stage):
            stage = as_stage(stage)
        if isinstance(stage, RouterLoad):
            return Replicates(stage, groups=self.groups)
        if isinstance(stage, Replicates):
            return self._apart(stage, stage)
        if isinstance(stage, StreamingStage) and not type(stage).__module__.startswith("tdgeom."):
            return self._apart(_AnyReplicates(stage, groups=self.groups), stage)
        if not isinstance(stage, Stage):
            return _told(stage)
        if type(stage) is SubspaceNovelty and stage.in_keys == SubspaceNovelty().in_keys:
            vectors: list[Key] = [("replicates", side, "subspaces") for side in ("a", "b")]
            return SubspaceNovelty(k=stage.k, in_keys=[*vectors, *stage.in_keys[2:]], out_keys=stage.out_keys)
        needed = [key for key in stage.in_keys if key not in stage.optional_in_keys]
        roots = {key_tuple(key)[0] for key in needed}
        if roots == {"moments"} and not isinstance(stage, StreamingStage | PairStage):
            return LeaveOutMoments(stage)
        of_rows = not roots - {"sample", "sample_carried"}
        if isinstance(stage, StreamingStage) or not of_rows or not told_apart(stage):
            return _told(stage)
        return LeaveOutPair(stage) if isinstance(stage, PairStage) else LeaveOut(stage)

    def _apart(self, replicates: Replicates, stage: Any) -> Replicates:
        """Replicates whose groups' rows have a key of their own: several stand at a site."""
        self._streams += 1
        settings = {name: getattr(replicates, name) for name in ("groups", "by", "seed")}
        rows: Key = ("replicates", f"rows_{self._streams}")
        keys = [*replicates.out_keys[:-1], rows]
        return type(replicates)(
            replicates.__dict__["stage"], **settings, in_keys=list(replicates.in_keys), out_keys=keys
        )

    def beside(self, stage: PairStage) -> list[PairStage]:
        """For a measure over all rows by moments: the same of the sample's rows, for its error alone."""
        if not self.groups or not isinstance(stage, MomentPairStage) or stage.source == "sample":
            return []
        made = {
            name: value
            for name, value in stage.settings().items()
            if name not in ("source", "in_keys", "out_keys")
        }
        names = [key_tuple(key)[-1] for key in stage.out_keys]
        twin = type(stage).from_settings(made)
        if len(twin.out_keys) != len(names):  # a sketch has errors of its own
            return []
        return [LeaveOutPair(type(stage).from_settings(made, out_keys=[(_TWIN, name) for name in names]))]

    def jackknives(self, stages: Sequence[TensorDictModuleBase]) -> list[TensorDictModuleBase]:
        """One for the replicates of the sample, one for those of all rows' spectra, one for each router."""
        if not self.groups:
            return []
        by_rows: dict[Key, list[Key]] = {}
        twins: list[Key] = []
        for unit in [part for stage in stages for part in opened(stage)]:
            inner = stage_of(unit)
            inside = stage_of(inner.units[0]) if isinstance(inner, ForEachPair) else inner
            if isinstance(inside, LeaveOut | LeaveOutMoments | LeaveOutPair):
                apart = [key for key in unit.out_keys if key_tuple(key)[0] == _TWIN]
                twins += apart
                own = [key for key in unit.out_keys if key not in apart]
                by_rows.setdefault("sample_group_rows", []).extend(own)
            elif isinstance(inner, Replicates):
                *values, rows = unit.out_keys
                by_rows.setdefault(rows, []).extend(values)
            elif isinstance(inside, SubspaceNovelty) and key_tuple(unit.in_keys[0])[0] == "replicates":
                by_rows.setdefault((*key_tuple(unit.in_keys[0])[:-1], "rows"), []).extend(unit.out_keys)
        made: list[TensorDictModuleBase] = [
            Jackknife(keys, rows=rows, parts=True) for rows, keys in by_rows.items() if keys
        ]
        if twins:
            errors: list[Key] = [
                ("between", *key_tuple(key)[1:-1], f"{key_tuple(key)[-1]}_se")
                for key in twins
                if key_tuple(key)[-1] not in NO_ERROR
            ]
            silent: list[Key] = [NOT_WRITTEN] * len(twins)
            made.append(Jackknife(twins, rows="sample_group_rows", out_keys=[*silent, *errors]))
        return made
