"""What the passes of an analysis share with its tables, and what a job leaves of them beside its streaming state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensordict.nn import TensorDictSequential

from tdgeom.analysis.analysis_settings import AnalysisSettings
from tdgeom.core.stage_settings import differences, made_again, plain_setting
from tdgeom.files.json_text import plain
from tdgeom.measures.router import RouterLoad
from tdgeom.run.state_file import StateTo

__all__ = ["ANALYSIS", "AnalysisState", "Described", "file_of_stack", "settings_of"]

ANALYSIS = "analysis"  # of a state file's record, what it says of the analysis


@dataclass(frozen=True)
class Described:
    """What the tables say of the model: its names, the last layer of each of its stacks, and what a row is."""

    name: Mapping[str, str]
    depths: Mapping[str | None, int]
    unit: str


@dataclass(frozen=True)
class AnalysisState:
    """Where an analysis leaves its state, and what is known of it before its end: ``metadata`` without the run's counts."""

    path: Path
    settings: AnalysisSettings
    metadata: Mapping[str, Any]

    def of_pass(
        self,
        stack: str | None,
        stacks: Sequence[str | None],
        sites: Sequence[str],
        pipeline: TensorDictSequential,
        described: Described,
    ) -> StateTo:
        """Where the pass over one stack leaves its state, with all that its end needs."""
        routers = [unit for unit in pipeline.modules() if isinstance(unit, RouterLoad)]
        keys = [key for key in pipeline.out_keys if isinstance(key, tuple) and key[0] == "router"]
        about = {
            "stacks": list(stacks),
            "sites": [str(site) for site in sites],
            "routers": list(dict.fromkeys(str(key[1]) for key in keys)),
            "router_top_k": routers[0].top_k if routers else 2,
            "settings": {name: plain_setting(value) for name, value in _arguments(self.settings).items()},
            "record": self.settings.record(),
            "name": dict(described.name),
            "depths": [[name, depth] for name, depth in described.depths.items()],
            "unit": described.unit,
        }
        beside = {"metadata": dict(self.metadata)}
        return StateTo(file_of_stack(self.path, stack, stacks), {ANALYSIS: plain(about)}, plain(beside))


def file_of_stack(path: Path, stack: str | None, stacks: Sequence[str | None]) -> Path:
    """The file of one pass: the first stack's is the one that was named, another's has the stack's name behind it."""
    return path if stack == stacks[0] else path.with_name(f"{path.name}.{stack}")


def settings_of(about: Mapping[str, Any], given: AnalysisSettings | None) -> AnalysisSettings:
    """The settings that an analysis was made with; ``given`` where plain data cannot hold them.

    Raises:
        ValueError: others than those of then. TypeError: settings that must be given again.
    """
    if given is None:
        try:
            made = {
                name: made_again(value, f"AnalysisSettings.{name}")
                for name, value in about["settings"].items()
            }
        except TypeError as error:
            said = str(error).split(" Give it again")[0]
            raise TypeError(f"merge_states: {said} Give settings=AnalysisSettings(...), as then.") from error
        given = AnalysisSettings(**made)
    apart = differences(about["record"], plain(given.record()), "settings")
    if apart:
        raise ValueError(
            f"merge_states: these are not the settings of then: {'; '.join(apart[:4])} (there: in the files)."
        )
    return given


_SAME_BY_NAME = (
    *("layers", "calls", "max_rows", "sample_size", "seed", "select"),
    *("output_router_logits", "novelty_k", "neighbors", "errors", "convergence", "significance"),
)


def _arguments(settings: AnalysisSettings) -> dict[str, Any]:
    """Arguments that make these settings again: families by name, every measure as its stage."""
    found = {name: getattr(settings, name) for name in _SAME_BY_NAME}
    diagnostics: Any = settings.diagnostics or ()  # by name: one of the user's own is among the stages
    return {**found, "metrics": [*settings.families, *settings.stages], "diagnostics": list(diagnostics)}
