"""Which stages of a pipeline run per batch, which stream, and which run once at the end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from tensordict.nn import TensorDictModuleBase, TensorDictSequential, WrapModule
from torch import nn

from tdgeom.core.keys import NOT_WRITTEN, Key, KeyTable, key_tuple, optional_in_keys, touches
from tdgeom.core.missing_parts import USUAL_WRITERS, as_written, below, missing_part, usual_writer
from tdgeom.core.pair_stage import PairStage
from tdgeom.core.pipeline import parts_of, why_closed
from tdgeom.core.renamed import Renamed, RenamedStream, describe, is_streaming, stage_of
from tdgeom.core.stage import Stage
from tdgeom.core.streaming_stage import StreamingStage
from tdgeom.core.wrong_objects import refuse_class

__all__ = ["Plan", "make_plan", "stages"]

SECOND_PASS = "run it in a second pass, tg.run(second_pipeline, loader, inputs=first_result)"


@dataclass
class Plan:
    """A pipeline split at the stream boundary, each part in pipeline order.

    ``hidden`` are keys that ``select_out_keys`` on a sequence of streaming stages keeps from everything after it.
    """

    batch: list[TensorDictModuleBase] = field(default_factory=list)
    stream: list[Any] = field(default_factory=list)
    end: list[TensorDictModuleBase] = field(default_factory=list)
    hidden: set[Key] = field(default_factory=set)

    @property
    def stream_keys(self) -> list[Key]:
        """What the streaming stages read: rows."""
        return list(dict.fromkeys(key for unit in self.stream for key in unit.in_keys))

    @property
    def optional_stream_keys(self) -> set[Key]:
        """Those of them that no streaming stage needs."""
        needed = {key for unit in self.stream for key in unit.in_keys if key not in optional_in_keys(unit)}
        return set(self.stream_keys) - needed


def stages(
    module: Any, hidden: set[Key] | None = None, *, inside: bool = False
) -> list[TensorDictModuleBase]:
    """The stages of a pipeline in order, sequences opened where calling their parts is calling them.

    A sequence that is more than its parts (hooks, selected keys, a ``forward`` of its own) is one stage if nothing in it
    streams, and refused if something does; what ``select_out_keys`` hides of a sequence of streams is added to ``hidden``.
    """
    refuse_class("run", module)
    original = getattr(module, "_orig_mod", None)
    if original is not None and (is_streaming(original) or stages(original) != [original]):
        raise TypeError(
            "run cannot see into a compiled module: its stages would vanish. Give run the plain TensorDictSequential and "
            "compile single per-batch or end stages, or the model's own submodules, instead."
        )
    if isinstance(module, list | tuple):
        raise TypeError(
            f"run takes one pipeline, got a {type(module).__name__}: TensorDictSequential(*stages) makes one of stages."
        )
    if not TensorDictModuleBase.is_tdmodule_compatible(module):
        raise TypeError(
            f"run takes TensorDict modules, got {type(module).__name__}, which has no in_keys and out_keys. Wrap a function in "
            f"TensorDictModule(function, in_keys=[...], out_keys=[...]), or write a tg.Stage."
        )
    if isinstance(module, TensorDictSequential) and _opens(module, inside):
        if inside and hidden is not None:
            hidden |= set(module.out_keys_source) - set(module.out_keys)
        return [unit for part in parts_of(module) for unit in stages(part, hidden, inside=True)]
    _refuse_unreached(module)
    return [module]


def _opens(sequence: TensorDictSequential, inside: bool) -> bool:
    """Whether to open a sequence (True) or to call it whole (False)."""
    if why_closed(sequence) is None:
        return True
    streams = [is_streaming(part) for part in sequence.modules() if is_streaming(part)]
    only_streams = all(is_streaming(part) for part in parts_of(sequence))
    if why_closed(sequence, but_selection=True) is None and streams and (only_streams or not inside):
        return True
    if streams:
        raise TypeError(
            f"run calls the streaming stages inside this {type(sequence).__name__} by themselves, and would pass over what makes "
            f"it more than its parts: {why_closed(sequence)}. Put that on the whole pipeline's results, on a stage that does not "
            f"stream, or on a sequence without streaming stages."
        )
    return False


def _refuse_unreached(module: nn.Module) -> None:
    reached = stage_of(module) if is_streaming(module) else None
    held = [part for part in module.modules() if isinstance(part, StreamingStage) and part is not reached]
    if held:
        raise TypeError(
            f"{describe(module)} holds the streaming stage {type(held[0]).__name__} where run cannot reach its "
            f"update(). Put it in a TensorDictSequential, or use ForEach."
        )
    if reached is None:
        return
    layers = [part for part in module.modules() if part is reached or isinstance(part, Renamed)]
    own = [f"{name}()" for part in layers for name in ("forward", "__call__") if _overrides(part, name)]
    if own:
        raise TypeError(
            f"{describe(module)} overrides {own[0]}, which run does not call: it calls update() for every block of rows and "
            f"publish() once. Override accumulate() or result() instead."
        )
    hooks = [
        hook for part in layers for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    ]
    if any(
        not hasattr(hook, "out_keys") for hook in hooks
    ):  # select_out_keys is a hook too, and publish() follows it
        raise TypeError(
            f"{describe(module)} has forward hooks, which run would not call: it calls update() for every block of rows and "
            f"publish() once. Override accumulate() or result(), or put a stage of your own behind it."
        )


def _overrides(part: nn.Module, name: str) -> bool:
    usual = RenamedStream if isinstance(part, Renamed) else StreamingStage
    return name in part.__dict__ or getattr(type(part), name) is not getattr(usual, name)


def make_plan(pipeline: nn.Module, given: Iterable[Key] = ()) -> Plan:
    """Split a pipeline, or refuse it by the stage's name and with the remedy.

    A stage that is not streaming, with at least one input, all of them written by streaming or end stages (or ``given``,
    with at least one written), belongs to the end; every other runs per batch.
    """
    plan, writers, known = Plan(), KeyTable(), KeyTable(given)
    for unit in stages(pipeline, plan.hidden):
        phases = {}
        optional = set(optional_in_keys(unit))
        for key in unit.in_keys:
            found = {phase for _, phase in writers.touching(key).values()}
            if found:
                phases[key] = "batch" if found == {"batch"} else "end"
            elif known.touching(key):
                phases[key] = "given"
            elif key not in optional:
                phases[key] = "batch"
        _refuse_one_for_many(unit, writers)
        phase = _phase(unit, phases, writers)
        if phase == "batch":
            _refuse_too_late(unit, plan)
        {"batch": plan.batch, "stream": plan.stream, "end": plan.end}[phase].append(unit)
        for key in unit.out_keys:
            if key != NOT_WRITTEN and key not in plan.hidden:
                _refuse_second_writer(key, unit, writers)
                writers.add(key, (unit, "batch" if phase == "batch" else "end"))
    _refuse_idle(plan)
    return plan


def _refuse_second_writer(key: Key, unit: TensorDictModuleBase, writers: KeyTable) -> None:
    """A stage may write again what it has read (x -> x)."""
    others = [writer for writer, _ in writers.touching(key).values()]
    if others and key not in unit.in_keys:
        raise ValueError(
            f"{describe(others[0])} and {describe(unit)} both write {key!r}. Give one of them another root with out_keys=."
        )


def _refuse_too_late(unit: TensorDictModuleBase, plan: Plan) -> None:
    """In a run every per-batch stage comes before any streaming one: one that would change what was read before it is refused."""
    if isinstance(unit, WrapModule) and plan.stream:
        raise ValueError(
            f"{describe(unit)} names no keys, so run cannot tell whether it belongs to each batch or to the end. Give it "
            f"its keys: TensorDictModule(function, in_keys=[...], out_keys=[...]), or put it before the streaming stages."
        )
    for stream in plan.stream:
        read = KeyTable(stream.in_keys)
        for key in unit.out_keys:
            if read.touching(key):
                raise ValueError(
                    f"{describe(unit)} writes {key!r} after {describe(stream)} has read it; run calls every per-batch stage "
                    f"before any streaming one. Write it under another key with out_keys=, and let later stages read that."
                )


def _refuse_one_for_many(unit: Any, writers: KeyTable) -> None:
    """A stage of one site where named sites are: it would read a tensor, and finds the tensors of all."""
    for key in unit.in_keys if isinstance(unit, Stage) else ():
        written = list(writers.touching(key))
        if sites := below(key, written):
            name = type(unit).__name__
            raise TypeError(
                f"{name} reads one tensor at {key!r}, which holds the sites {sites[:6]}. For all of them: "
                f"tg.ForEach({as_written(unit)}(...), sites); for one: in_keys=[{(*key_tuple(key), sites[0])!r}]."
            )


def _phase(unit: Any, phases: dict[Key, str], known: KeyTable) -> str:
    finished = [key for key, phase in phases.items() if phase == "end"]
    per_batch = [key for key, phase in phases.items() if phase == "batch"]
    if is_streaming(unit):
        if finished:
            raise ValueError(
                f"{describe(unit)} streams rows but reads {finished}, which exist only when the stream has ended; {SECOND_PASS}."
            )
        return "stream"
    if finished and per_batch:
        carried = [key_tuple(key)[-1] for key in per_batch if key_tuple(key)[0].startswith("sample")]
        if carried and isinstance(unit, PairStage):
            raise ValueError(
                f"{describe(unit)} compares two sites and reads {per_batch}, which no stage writes. For pairs of sites: "
                f"tg.ForEachPair({as_written(unit)}(...), sites)."
            )
        if carried:
            raise ValueError(
                f"{describe(unit)} reads {per_batch}, which nothing put into the sample. "
                f"Sites are named to RowSample; what batches hold is carried by SelectTokens(..., also={carried}) and "
                f"RowSample(..., also={carried}), or analyze_model(..., select={{'also': {carried}}})."
            )
        absent = [key for key in per_batch if not known.touching(key) and _finished_writer(key)]
        if absent:
            raise ValueError(
                f"{describe(unit)} reads {absent}, which no earlier stage writes: put {_finished_writer(absent[0])} "
                f"before it."
            )
        raise ValueError(
            f"{describe(unit)} reads finished results {finished} together with {per_batch}, which no streaming stage wrote. "
            f"If these are rows of a batch, {SECOND_PASS}; if they are misspelt, name the keys with in_keys=."
        )
    return "end" if finished else "batch"


def _refuse_idle(plan: Plan) -> None:
    """Every per-batch stage must reach a streaming stage, or its work is thrown away batch by batch."""
    needed = KeyTable(plan.stream_keys)
    for unit in reversed(plan.batch):
        if isinstance(unit, WrapModule):
            return  # it may read anything that comes before it
        if not any(map(needed.touching, unit.out_keys)):
            raise ValueError(
                f"{describe(unit)} runs once a batch and writes {list(unit.out_keys)[:4]}, but nothing it writes reaches a "
                f"streaming stage, so its results would be lost batch by batch. {_remedy(unit, plan)}"
            )
        for key in unit.in_keys:
            needed.add(key)


def _finished_writer(key: Key) -> str | None:
    """The stage that usually writes a key, where it exists only when the stream has ended."""
    root = key_tuple(key)[0]
    return None if root in ("acts", "grads", "tokens", "row_id", "sample_row_id") else usual_writer(root)


def _remedy(unit: Any, plan: Plan) -> str:
    """What is most likely meant where a per-batch stage reaches no streaming stage."""
    acts = [key_tuple(key) for key in unit.out_keys if key_tuple(key)[0] == "acts"]
    if acts and any(key_tuple(key)[0] == "tokens" for key in plan.stream_keys):
        sites = [str(parts[-1]) for parts in acts]
        others = [
            (one, key)
            for one in plan.batch
            for key in one.in_keys
            if key_tuple(key)[0] == "acts" and key_tuple(key) not in acts
        ]
        if others:
            return f"{describe(others[0][0])} reads {others[0][1]!r}; the sites are {sites[:4]}: name them as capture.sites does."
        return f"The streaming stages read rows: put tg.SelectTokens({sites[:4]}) behind it."
    later = (*plan.stream, *plan.end)  # had they come before this stage, it would run at the end itself
    written = [key_tuple(key) for one in (*plan.batch, *later) for key in one.out_keys]
    made = {parts[0] for parts in written}
    for key in unit.in_keys:
        parts = key_tuple(key)
        root = parts[0]
        behind = next((o for o in later if any(touches(key_tuple(k), parts) for k in o.out_keys)), None)
        if behind is not None:
            return f"It reads {key!r}, which {describe(behind)} writes further on: put {describe(unit)} behind that."
        if root in made:
            if not any(touches(other, parts) for other in written):
                have = list(
                    dict.fromkeys(other[1] for other in written if other[0] == root and len(other) > 1)
                )
                usual = missing_part(
                    as_written(stage_of(unit)), [key], written, pair=isinstance(unit, PairStage)
                )
                return f"It reads {key!r}, which no stage writes; under {root!r} there is {have[:4]}. {usual}".rstrip()
            continue
        if writer := _finished_writer(key):
            return f"It reads {root!r}, which no earlier stage writes: put {writer} before it."
        near = get_close_matches(root, sorted({*made, *USUAL_WRITERS}), n=1, cutoff=0.8)
        if near and near[0] != root:
            return f"It reads {key!r}, which no stage writes. Did you mean {near[0]!r}?"
    return "Put tg.StreamingMean() or tg.Collect() behind it to keep its values, or leave it out."
