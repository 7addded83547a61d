"""``as_metric``: streaming stages as a ``torchmetrics.Metric``, which is imported only here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from importlib import import_module
from typing import Any

import safetensors.torch
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from tdgeom.core.guessed_names import answer_guesses
from tdgeom.core.keys import Key, key_tuple, optional_in_keys
from tdgeom.core.pipeline import streams_of
from tdgeom.core.process_groups import rank_and_world
from tdgeom.core.renamed import describe, stage_of
from tdgeom.core.stage_settings import differences
from tdgeom.core.streaming_stage import refuse_ordered, tensor_text, text_tensor
from tdgeom.run.finish import call
from tdgeom.run.plan import Plan, make_plan

__all__ = ["as_metric"]

_HEADER = "header"


@answer_guesses
def as_metric(
    stage: TensorDictModuleBase,
    *,
    metrics: Sequence[str] | None = None,
    sync_on_compute: bool = True,
    dist_sync_on_step: bool = False,
    process_group: Any = None,
) -> Any:
    """Streaming stages, and what follows them, as a ``torchmetrics.Metric``.

    ``update`` takes the rows of a batch: a TensorDict, tensors in the order in which the stages name them, or tensors by the last
    part of their keys (others by name, which a ``MetricCollection`` passes on, are left alone). ``compute`` gives the value over
    all rows so far, of all ranks: their states are gathered and merged, whatever their shapes, so that it equals one pass over
    all rows. ``forward`` gives the batch's own value, ``merge_state`` adds another metric's rows, ``state_dict`` holds the state
    (bytes without pickle, which know stage and settings; ``metric.persistent(False)`` leaves it out).

    Args:
        stage: a streaming stage, or a pipeline of such stages and of stages that read their results; it is copied, and its state
            left behind. Rows are given: capture and selection stay outside.
        metrics: names of the outputs that ``compute`` gives; default all of the last stages (of the streaming ones where none
            follow). One output comes as a tensor, several as a dictionary; a name is the last part of a key, or all of it joined
            by ``/`` where several end alike.
        sync_on_compute, dist_sync_on_step, process_group: as ``torchmetrics.Metric`` takes them.

    Raises:
        ModuleNotFoundError: torchmetrics is not installed. TypeError: nothing in ``stage`` streams.
        ValueError: a stage that makes rows of batches; an unknown name in ``metrics``; at ``sync``, a stage with ``halflife=`` on
            several ranks.

    ::

        stages = TensorDictSequential(tg.StreamingCovariance(), tg.EigenSpectrum(), tg.SpectrumMetrics())
        metric = tg.as_metric(stages, metrics=["d_pr"])
        metric.update(tokens=rows)
        self.log("d_pr", metric)                      # in a LightningModule
    """
    if not streams_of(stage):
        raise TypeError(
            f"as_metric takes a streaming stage such as StreamingCovariance(), or a pipeline with one, got {describe(stage)}: "
            f"nothing in it adds up rows."
        )
    plan = make_plan(deepcopy(stage))
    if plan.batch:
        raise ValueError(
            f"as_metric: {describe(plan.batch[0])} makes rows of each batch; call it before, and give the metric the rows."
        )
    for unit in plan.stream:
        unit.reset()
    settings = {
        "sync_on_compute": sync_on_compute,
        "dist_sync_on_step": dist_sync_on_step,
        "process_group": process_group,
    }
    return _metric_class()(plan, _chosen(plan, metrics), settings)


def _chosen(plan: Plan, metrics: Sequence[str] | None) -> dict[str, Key]:
    """The keys that ``compute`` gives, by their names."""
    written = [key for unit in (plan.end or plan.stream) for key in unit.out_keys]
    found = _named(dict.fromkeys(written))
    if metrics is None:
        return found
    every = _named(dict.fromkeys(key for unit in (*plan.stream, *plan.end) for key in unit.out_keys))
    wanted = [metrics] if isinstance(metrics, str) else list(metrics)
    known = {**every, **found}
    if missing := [name for name in wanted if name not in known]:
        raise ValueError(
            f"as_metric: metrics={missing} are not among the outputs, which are {sorted(known)}."
        )
    return {name: known[name] for name in wanted}


def _named(keys: Mapping[Key, None]) -> dict[str, Key]:
    last = [key_tuple(key)[-1] for key in keys]
    return {
        name if last.count(name) == 1 else "/".join(map(str, key_tuple(key))): key
        for key, name in zip(keys, last)
    }


class _States:
    """The states of a plan's streaming stages as bytes, and back."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def about(self) -> list[dict[str, Any]]:
        """What a state must have been made with."""
        return [
            {
                "stage": describe(unit),
                "settings": stage_of(unit).merging_settings(),
                "in_keys": str(unit.in_keys),
            }
            for unit in self.plan.stream
        ]

    def packed(self, device: torch.device) -> Tensor:
        """(bytes,) uint8, also of states without rows: every rank has something to send."""
        held = {_HEADER: text_tensor(json.dumps(self.about(), sort_keys=True)).cpu()}
        for number, unit in enumerate(self.plan.stream):
            held |= {
                f"{number}.{name}": value.detach().cpu().contiguous()
                for name, value in stage_of(unit).state().items()
            }
        return torch.frombuffer(bytearray(safetensors.torch.save(held)), dtype=torch.uint8).to(device)

    def put(self, pieces: Sequence[Tensor]) -> None:
        """The states that these add up to, in this order, in place of the own."""
        parts = [safetensors.torch.load(piece.detach().cpu().numpy().tobytes()) for piece in pieces]
        for part in parts:
            told = tensor_text(part.pop(_HEADER, None))
            apart = differences(json.loads(told or "[]"), json.loads(json.dumps(self.about())))
            if apart:
                raise ValueError(
                    f"this is the state of another metric: {'; '.join(apart[:4])}. Make the metric as it was."
                )
        for number, unit in enumerate(self.plan.stream):
            stage = stage_of(unit)
            stage.reset()
            for part, piece in zip(parts, pieces):
                state = {name: part[f"{number}.{name}"].to(piece.device) for name in stage.state()}
                stage.merge_(stage.with_state(state))


@cache
def _metric_class() -> Any:
    """The class, once torchmetrics is wanted."""
    try:
        base: Any = import_module("torchmetrics").Metric
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "as_metric needs torchmetrics: python -m pip install torchmetrics."
        ) from error

    class StageMetric(base):
        """Streaming stages with the interface of torchmetrics: see ``as_metric``."""

        full_state_update = False
        higher_is_better = None
        is_differentiable = False

        def __init__(self, plan: Plan, chosen: Mapping[str, Key], settings: Mapping[str, Any]) -> None:
            super().__init__(**settings)
            self.__dict__.update(plan=plan, chosen=dict(chosen), states=_States(plan))
            # one list of bytes, which torchmetrics gathers, copies and restores; what it sets is merged
            self.add_state("packed", default=[], dist_reduce_fx=None, persistent=True)

        @property
        def packed(self) -> list[Tensor]:
            """The state, as bytes."""
            return [self.states.packed(self.device)]

        @packed.setter
        def packed(self, pieces: Sequence[Tensor]) -> None:
            self.states.put(pieces)

        def update(self, *rows: Any, **named: Any) -> None:
            """Add the rows of a batch."""
            given = self._given(rows, named)
            for unit in self.plan.stream:
                unit.update(given)

        def compute(self) -> Any:
            """The chosen outputs over all rows."""
            td = TensorDict({}, batch_size=[])
            for unit in self.plan.stream:
                unit.publish(td)
            for unit in self.plan.end:
                call(unit, td)
            found = {name: td.get(key) for name, key in self.chosen.items()}
            return next(iter(found.values())) if len(found) == 1 else found

        def reset(self) -> None:
            """Forget every row."""
            super().reset()
            for unit in self.plan.stream:
                unit.reset()

        def merge_state(self, incoming_state: Any) -> None:
            """Add the rows of another metric of the same stages (or of its ``metric_state``): with ``halflife=`` later ones."""
            state = getattr(incoming_state, "metric_state", incoming_state)
            if not isinstance(state, Mapping) or "packed" not in state:
                raise ValueError(
                    f"merge_state takes a metric that as_metric made, or its metric_state, got {type(incoming_state).__name__}."
                )
            self.packed = [*self.packed, *state["packed"]]
            self._computed = None

        def sync(self, *args: Any, **options: Any) -> None:
            """Merge the states of all ranks, on each."""
            for unit in self.plan.stream:
                refuse_ordered(stage_of(unit), rank_and_world()[1], f"{describe(unit)} as a metric")
            super().sync(*args, **options)

        def _given(self, rows: Sequence[Any], named: Mapping[str, Any]) -> TensorDictBase:
            keys = list(dict.fromkeys(key for unit in self.plan.stream for key in unit.in_keys))
            if len(rows) == 1 and isinstance(rows[0], TensorDictBase):
                return rows[0]
            if len(rows) == 1 and isinstance(rows[0], Mapping):
                return TensorDict(dict(rows[0]), batch_size=[])
            names = {key: name for name, key in _named(dict.fromkeys(keys)).items()}
            given = dict(zip(keys, rows)) | {key: named[name] for key, name in names.items() if name in named}
            free = {key for unit in self.plan.stream for key in optional_in_keys(unit)}
            missing = [names[key] for key in keys if key not in given and key not in free]
            if missing or len(rows) > len(keys):
                raise TypeError(
                    f"{type(self).__name__}.update takes a TensorDict, or tensors in this order or by name: "
                    f"{list(names.values())}; got {len(rows)} in order and {sorted(named)} by name."
                )
            return TensorDict(given, batch_size=[])

        def __hash__(self) -> int:
            return id(self)  # the state's bytes are new tensors at every look

        def __repr__(self) -> str:
            return f"StageMetric({', '.join(repr(stage_of(unit)) for unit in (*self.plan.stream, *self.plan.end))})"

    StageMetric.__module__, StageMetric.__qualname__ = __name__, "StageMetric"
    globals()["StageMetric"] = StageMetric
    return StageMetric


def __getattr__(name: str) -> Any:
    """``StageMetric``, for pickle in a process that has made none yet."""
    if name == "StageMetric":
        return _metric_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
