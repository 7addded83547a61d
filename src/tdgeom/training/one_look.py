"""One look at a model in training: the default analysis or any pipeline, over a probe or over what a training step read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn

from tdgeom.analysis.analysis_settings import AnalysisSettings
from tdgeom.analysis.one_model import analyzed, router_sites
from tdgeom.analysis.results import AnalysisResults
from tdgeom.core.process_groups import rank_and_world
from tdgeom.model.capture import Capture
from tdgeom.run.run import run
from tdgeom.training.training_rows import Replayed, captured_by, replaying
from tdgeom.training.untouched import bare_model

__all__ = ["Look", "Results"]

Results = AnalysisResults | TensorDictBase


class Look:
    """What is measured at each look.

    Args:
        settings: of the default analysis. pipeline: in its place: a pipeline, or a function that makes one of the model.
        dataloader: the probe; None: what training steps read. options: of ``run``, for the probe.
        owner: who is named in errors.
    """

    def __init__(
        self,
        settings: AnalysisSettings,
        pipeline: TensorDictModuleBase | Callable[[nn.Module], TensorDictModuleBase] | None,
        dataloader: Iterable[Any] | None,
        options: Mapping[str, Any],
        owner: str,
    ) -> None:
        self.settings, self.dataloader, self.options, self.owner = settings, dataloader, options, owner
        self.model: nn.Module | None = None
        self.pipeline: TensorDictModuleBase | None = None
        self._given = pipeline
        self._data: str | None = None
        self._prepared = False

    def bind(self, model: nn.Module) -> nn.Module:
        """The model inside of what is trained, which is that of all looks."""
        bare, given = bare_model(model), self._given
        if self.model is not None and self.model is not bare:
            raise ValueError(
                f"{self.owner}: this is another {type(bare).__name__} than at the first look. A watch is for one training: make "
                f"another."
            )
        if self.model is None:
            self.pipeline = given if given is None or isinstance(given, TensorDictModuleBase) else given(bare)
            self.model = bare
        return bare

    def prepare(self, model: nn.Module) -> None:
        """What is found out of a model once, before anything is measured."""
        if not self._prepared and self.pipeline is None:
            self.capture(model)
        self._prepared = True

    def capture(self, model: nn.Module) -> Capture:
        """What a training step is read by."""
        bare = self.bind(model)
        if self.pipeline is not None:
            return captured_by(self.pipeline)
        asked = Capture(bare, self.settings.sites, layers=self.settings.layers)
        routers = router_sites(bare, asked, self.settings)
        return Capture(bare, [*map(str, asked.sites), *map(str, routers)]) if routers else asked

    def results(self, model: nn.Module, calls: Sequence[TensorDictBase] | None) -> Results | None:
        """Measure; ``calls`` are what a training step read. On rank 0 of a process group."""
        loader = self.dataloader if calls is None else calls
        assert loader is not None
        options = {**self.options, "progress": False} if calls is None else {"progress": False}
        if calls is not None and rank_and_world()[1] > 1:
            options["sharded"] = True  # each rank trains on batches of its own
        if self.pipeline is None:
            read_by = None if calls is None else Replayed
            return analyzed(model, None, loader, self.settings, read_by=read_by, **options)
        pipeline = self.pipeline if calls is None else replaying(self.pipeline)
        return run(pipeline, loader, max_rows=self.settings.max_rows, **options)

    def note(self, results: Results, step: int) -> str | None:
        """Put the step into results; what is to be said of the probe, where it has given other data than before."""
        if isinstance(results, AnalysisResults):
            rows = "training batches, in training mode" if self.dataloader is None else "probe, in eval mode"
            results.metadata |= {"step": step, "rows_of": rows}
            data = results.metadata.get("data_sha256")
        else:
            results.set(("run", "step"), torch.tensor(step))
            data = results["run", "data_sha256"]
        if self.dataloader is None or not data:
            return None
        first, self._data = self._data, self._data or str(data)
        if first is None or first == str(data):
            return None
        return (
            f"{self.owner}: the probe has given other data than at the first look, so that steps differ by their rows too. "
            f"Give a loader that gives the same batches each time."
        )
