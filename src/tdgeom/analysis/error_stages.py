"""What an analysis with standard errors puts around its stages, and what makes errors of their replicates."""

from __future__ import annotations

from collections.abc import Sequence

from tensordict.nn import TensorDictModuleBase

from tdgeom.core.for_each_pair import ForEachPair
from tdgeom.core.keys import NOT_WRITTEN, Key, key_tuple
from tdgeom.core.pair_stage import PairStage
from tdgeom.core.pipeline import opened
from tdgeom.core.renamed import stage_of
from tdgeom.core.stage import Stage
from tdgeom.core.streaming_stage import StreamingStage
from tdgeom.measures.jackknife import NO_ERROR, Jackknife
from tdgeom.measures.leave_out import LeaveOut, LeaveOutPair
from tdgeom.measures.leave_out_moments import LeaveOutMoments
from tdgeom.measures.left_out_methods import told_apart
from tdgeom.measures.router import RouterLoad
from tdgeom.measures.similarity.pair_sources import MomentPairStage
from tdgeom.measures.similarity.subspace import SubspaceNovelty
from tdgeom.stream.replicates import Replicates

__all__ = ["ErrorStages"]

_TWIN = "sample_between"


class ErrorStages:
    """The stages that replicates and errors need; with 0 groups none, and every stage stays as it is."""

    def __init__(self, groups: int) -> None:
        self.groups = groups

    def around(self, stage: TensorDictModuleBase) -> TensorDictModuleBase:
        """The stage with its replicates, where it has some: of rows of the sample, of the spectra, a router's load."""
        if not self.groups or not isinstance(stage, Stage):
            return stage
        if isinstance(stage, RouterLoad):
            return Replicates(stage, groups=self.groups)
        if type(stage) is SubspaceNovelty and stage.in_keys == SubspaceNovelty().in_keys:
            vectors: list[Key] = [("replicates", side, "subspaces") for side in ("a", "b")]
            return SubspaceNovelty(k=stage.k, in_keys=[*vectors, *stage.in_keys[2:]], out_keys=stage.out_keys)
        needed = [key for key in stage.in_keys if key not in stage.optional_in_keys]
        roots = {key_tuple(key)[0] for key in needed}
        if roots == {"moments"} and not isinstance(stage, StreamingStage | PairStage):
            return LeaveOutMoments(stage)
        of_rows = not roots - {"sample", "sample_carried"}
        if isinstance(stage, StreamingStage) or not of_rows or not told_apart(stage):
            return stage
        return LeaveOutPair(stage) if isinstance(stage, PairStage) else LeaveOut(stage)

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
