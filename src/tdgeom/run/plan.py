"""Which stages of a pipeline run per batch, which stream, and which run once at the end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches

from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import nn

from tdgeom.core.for_each import Renamed, RenamedStream
from tdgeom.core.keys import Key, as_key, key_tuple
from tdgeom.core.streaming_stage import StreamingStage

__all__ = ["Plan", "describe", "is_streaming", "make_plan", "stages", "touches"]

SECOND_PASS = "run it in a second pass, tg.run(second_pipeline, loader, inputs=first_result)"


@dataclass
class Plan:
    """A pipeline split at the stream boundary, each part in pipeline order."""

    batch: list[TensorDictModuleBase] = field(default_factory=list)
    stream: list[TensorDictModuleBase] = field(default_factory=list)
    end: list[TensorDictModuleBase] = field(default_factory=list)

    @property
    def stream_keys(self) -> list[Key]:
        """What the streaming stages read: rows."""
        return list(dict.fromkeys(key for unit in self.stream for key in unit.in_keys))


def stages(module: nn.Module) -> list[TensorDictModuleBase]:
    """The stages of a pipeline in order, sequences opened."""
    original = getattr(module, "_orig_mod", None)
    if original is not None and (is_streaming(original) or stages(original) != [original]):
        raise TypeError(
            "run cannot see into a compiled module: its stages would vanish. Give run the plain TensorDictSequential and "
            "compile single per-batch or end stages, or the model's own submodules, instead."
        )
    if isinstance(module, TensorDictSequential) and type(module).forward is TensorDictSequential.forward:
        parts = module.module.values() if isinstance(module.module, nn.ModuleDict) else module.module
        return [unit for part in parts for unit in stages(part)]
    if isinstance(module, list | tuple):
        raise TypeError(
            f"run takes one pipeline, got a {type(module).__name__}: TensorDictSequential(*stages) makes one of stages."
        )
    if not TensorDictModuleBase.is_tdmodule_compatible(module):
        raise TypeError(
            f"run takes TensorDict modules, got {type(module).__name__}, which has no in_keys and out_keys. Wrap a function in "
            f"TensorDictModule(function, in_keys=[...], out_keys=[...]), or write a tg.Stage."
        )
    reached = module.module if isinstance(module, RenamedStream) else module
    hidden = [
        type(part).__name__
        for part in module.modules()
        if isinstance(part, StreamingStage) and part is not reached
    ]
    if hidden:
        raise TypeError(
            f"{describe(module)} holds the streaming stage {hidden[0]} where run cannot reach its update(). Put it in a "
            f"TensorDictSequential, or use ForEach."
        )
    return [module]  # type: ignore[list-item]


def is_streaming(unit: nn.Module) -> bool:
    """True for a stage that accumulates rows."""
    return isinstance(unit, StreamingStage | RenamedStream)


def describe(unit: nn.Module) -> str:
    """A stage's name for messages."""
    unit = getattr(unit, "_orig_mod", unit)
    if isinstance(unit, Renamed):
        return f"{describe(unit.module)} at {unit.where}"
    inner = getattr(unit, "module", None)
    if type(unit).__name__ == "TensorDictModule" and inner is not None:
        return f"TensorDictModule({getattr(inner, '__name__', type(inner).__name__)})"
    return type(unit).__name__


def touches(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """A key, its parent or its leaf: writing one is writing the other."""
    return a[: len(b)] == b or b[: len(a)] == a


class _Writers:
    """Who writes what: key parts to (unit, phase), found by first element to stay linear in the number of keys."""

    def __init__(self) -> None:
        self._by_root: dict[str, dict[tuple[str, ...], tuple[nn.Module, str]]] = {}

    def add(self, key: Key, unit: nn.Module, phase: str) -> None:
        parts = key_tuple(key)
        for other, (writer, _) in self.find(parts):
            if other == parts or len(other) != len(parts):
                raise ValueError(
                    f"{describe(writer)} and {describe(unit)} both write {as_key(parts)!r}. Give one of them another root "
                    f"with out_keys=."
                )
        self._by_root.setdefault(parts[0], {})[parts] = (unit, phase)

    def find(self, parts: tuple[str, ...]) -> list[tuple[tuple[str, ...], tuple[nn.Module, str]]]:
        written = self._by_root.get(parts[0], {})
        if parts in written:
            return [(parts, written[parts])]
        return [(other, entry) for other, entry in written.items() if touches(other, parts)]


def make_plan(pipeline: nn.Module, given: Iterable[Key] = ()) -> Plan:
    """Split a pipeline, or refuse it by the stage's name and with the remedy.

    A stage that is not streaming, with at least one input, all of them written by streaming or end stages (or ``given``,
    with at least one written), belongs to the end; every other runs per batch.
    """
    plan, writers = Plan(), _Writers()
    known = [key_tuple(key) for key in given]
    for unit in stages(pipeline):
        phases = {}
        optional = getattr(unit, "_optional", [False] * len(unit.in_keys))
        for key, may_miss in zip(unit.in_keys, optional):
            parts = key_tuple(key)
            found = {phase for _, (_, phase) in writers.find(parts)}
            if found:
                phases[as_key(parts)] = "batch" if found == {"batch"} else "end"
            elif any(touches(parts, other) for other in known):
                phases[as_key(parts)] = "given"
            elif not may_miss:
                phases[as_key(parts)] = "batch"
        phase = _phase(unit, phases)
        {"batch": plan.batch, "stream": plan.stream, "end": plan.end}[phase].append(unit)
        for key in unit.out_keys:
            writers.add(key, unit, "batch" if phase == "batch" else "end")
    _refuse_idle(plan)
    return plan


def _phase(unit: nn.Module, phases: dict[Key, str]) -> str:
    finished = [key for key, phase in phases.items() if phase == "end"]
    per_batch = [key for key, phase in phases.items() if phase == "batch"]
    if is_streaming(unit):
        if finished:
            raise ValueError(
                f"{describe(unit)} streams rows but reads {finished}, which exist only when the stream has ended; {SECOND_PASS}."
            )
        return "stream"
    if finished and per_batch:
        carried = [key_tuple(key)[-1] for key in per_batch if key_tuple(key)[0] == "sample"]
        if carried:
            raise ValueError(
                f"{describe(unit)} reads {[as_key(('sample', name)) for name in carried]}, which nothing put into the sample. "
                f"Sites are named to RowSample; what batches hold is carried by SelectTokens(..., also={carried}) and "
                f"RowSample(..., also={carried}), or analyze_model(..., select={{'also': {carried}}})."
            )
        raise ValueError(
            f"{describe(unit)} reads finished results {finished} together with {per_batch}, which no streaming stage wrote. "
            f"If these are rows of a batch, {SECOND_PASS}; if they are misspelt, name the keys with in_keys=."
        )
    return "end" if finished else "batch"


def _refuse_idle(plan: Plan) -> None:
    """Every per-batch stage must reach a streaming stage, or its work is thrown away batch by batch."""
    needed = [key_tuple(key) for unit in plan.stream for key in unit.in_keys]
    for unit in reversed(plan.batch):
        if not any(touches(key_tuple(out), key) for out in unit.out_keys for key in needed):
            raise ValueError(
                f"{describe(unit)} runs once a batch and writes {list(unit.out_keys)[:4]}, but nothing it writes reaches a "
                f"streaming stage, so its results would be lost batch by batch. {_remedy(unit, plan)}"
            )
        needed.extend(key_tuple(key) for key in unit.in_keys)


_USUAL_WRITER = {
    "sample": "tg.RowSample(sites)",
    "moments": "tg.ForEach(tg.StreamingCovariance(), sites)",
    "cross_moments": "tg.StreamingCrossMoments(sites, pairs=...)",
    "eigenvalues": "tg.ForEach(tg.EigenSpectrum(), sites)",
    "eigenvectors": "tg.ForEach(tg.EigenSpectrum(), sites)",
    "neighbors": "tg.ForEach(tg.NearestNeighbors(k), sites)",
    "mean": "tg.StreamingMean()",
    "collected": "tg.Collect(sites)",
}


def _remedy(unit: nn.Module, plan: Plan) -> str:
    """What is most likely meant where a per-batch stage reaches no streaming stage."""
    acts = [key_tuple(key) for key in unit.out_keys if key_tuple(key)[0] == "acts"]
    if acts and any(key_tuple(key)[0] == "tokens" for key in plan.stream_keys):
        sites = [str(parts[-1]) for parts in acts]
        return f"The streaming stages read rows: put tg.SelectTokens({sites[:4]}) behind it."
    later = (*plan.stream, *plan.end)  # had they come before this stage, it would run at the end itself
    written = [key_tuple(key) for one in (*plan.batch, *later) for key in one.out_keys]
    made = {parts[0] for parts in written}
    for key in unit.in_keys:
        parts = key_tuple(key)
        root = parts[0]
        writer = next((o for o in later if any(touches(key_tuple(k), parts) for k in o.out_keys)), None)
        if writer is not None:
            return f"It reads {key!r}, which {describe(writer)} writes further on: put {describe(unit)} behind that."
        if root in made:
            if not any(touches(other, parts) for other in written):
                have = [other[1] for other in written if other[0] == root and len(other) > 1]
                return f"It reads {key!r}, which no stage writes; under {root!r} there is {list(dict.fromkeys(have))[:4]}."
            continue
        if root in _USUAL_WRITER:
            return f"It reads {root!r}, which no earlier stage writes: put {_USUAL_WRITER[root]} before it."
        near = get_close_matches(root, sorted({*made, *_USUAL_WRITER}), n=1, cutoff=0.8)
        if near:
            return f"It reads {key!r}, which no stage writes. Did you mean {near[0]!r}?"
    return "Put tg.StreamingMean() or tg.Collect() behind it to keep its values, or leave it out."
