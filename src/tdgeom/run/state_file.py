"""The streaming state of a run over a part of the data, in one file; and such files added up, in any process, on any day.

Nobody's process group is needed: array jobs, workers of a serving engine or different machines each leave a file that does not
grow with the rows. It is a safetensors file with one JSON record: nothing in it is run when it is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdgeom.core.renamed import describe, stage_of
from tdgeom.core.stage_settings import differences
from tdgeom.files.errors import StoreError
from tdgeom.files.json_text import plain
from tdgeom.files.shards import Shard
from tdgeom.numerics.hashing import hash_ids
from tdgeom.run.identity import pipeline_identity
from tdgeom.run.plan import Plan
from tdgeom.run.sealed_records import read_record, write_record

__all__ = [
    "LoaderOrder",
    "Part",
    "SequencesMet",
    "StateTo",
    "added_up",
    "parse_shard",
    "read_parts",
    "write_part",
]

FORMAT = 1
END = "end"
_MET = 2048  # sequences by whose hashes overlapping parts are found out
_SEED = 23


@dataclass(frozen=True)
class StateTo:
    """Where a run leaves its state, and what else its file says, plain data for whoever ends the analysis.

    ``about`` must be alike in files that are added up, ``beside`` need not.
    """

    path: Path
    about: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One file: where it lies, its record, and how to read its tensors."""

    path: Path
    record: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class SequencesMet:
    """Which sequences a run has had, in bounded memory: those with the smallest hashes, all of them where they are few.

    Of two runs with sequences in common these share some, unless what they share is a small part of many.
    """

    def __init__(self) -> None:
        self.smallest = np.zeros(0, dtype=np.int64)

    def add(self, sequences: Tensor) -> None:
        """The sequences of a block's rows."""
        self.join(hash_ids(torch.unique(sequences.long()), _SEED).numpy())

    def join(self, hashes: Sequence[int] | np.ndarray) -> None:
        """The sequences of another run, by their hashes."""
        self.smallest = np.union1d(self.smallest, np.asarray(hashes, dtype=np.int64))[:_MET]


class LoaderOrder:
    """Which batches a loader has given, in which order; jobs that have parts of one loader have the same.

    ``known``: a hash of all up to the 1st, the 2nd, the 4th, the 8th and so on and, once it has ended, of all of them.

    >>> one = LoaderOrder()
    >>> one.add("a"), one.add("b"), one.add("c"), one.end()
    (None, None, None, None)
    >>> list(one.known)
    ['1', '2', '3', 'end']
    """

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}
        self._count, self._hash = 0, hashlib.sha256()

    def add(self, digest: str) -> None:
        """The next batch."""
        self._count += 1
        self._hash.update(digest.encode())
        if self._count & (self._count - 1) == 0:
            self.known[str(self._count)] = self._hash.hexdigest()

    def end(self) -> None:
        """There are no more."""
        self.known |= {str(self._count): self._hash.hexdigest(), END: self._count}


def parse_shard(shard: str | Sequence[int] | None, owner: str) -> tuple[int, int] | None:
    """``"3/16"`` or (3, 16), the third of sixteen parts, as (2, 16): counted from 0.

    >>> parse_shard("3/16", "run")
    (2, 16)
    """
    if shard is None:
        return None
    try:
        given: Any = shard.split("/") if isinstance(shard, str) else list(shard)
        number, count = (int(one) for one in given)
    except (TypeError, ValueError):
        number = count = 0
    if not 1 <= number <= count:
        raise ValueError(
            f"{owner}: shard is 'K/N', part K of N counted from 1, such as '3/16'; got {shard!r}."
        )
    return number - 1, count


def write_part(to: StateTo, plan: Plan, record: Mapping[str, Any]) -> None:
    """Write the state of all streaming stages and what must be alike in files that are added up."""
    tensors: dict[str, Tensor] = {}
    for number, unit in enumerate(plan.stream):
        stage = stage_of(unit)
        stage.settle()
        tensors |= {f"stage/{number}/{name}": value for name, value in stage.state().items()}
    stages = pipeline_identity(plan)
    whole = {
        "format": FORMAT,
        "kind": "state",
        "batch_stages": stages[: len(plan.batch)],
        "stream_stages": stages[len(plan.batch) :],
        "about": plain(dict(to.about)),
        "beside": plain(dict(to.beside)),
        **plain(dict(record)),
    }
    try:
        write_record(to.path, tensors, whole)
    except StoreError as error:
        raise OSError(f"run could not write its state: {error}") from error


def read_parts(files: Sequence[str | Path]) -> list[Part]:
    """The files, checked one by one.

    Raises:
        ValueError: no file, one twice, a damaged one, or one of another kind or format.
    """
    if isinstance(files, str | Path):
        raise TypeError(
            f"merge_states takes the list of all parts' files, got one path, {str(files)!r}. Write [path, ...]."
        )
    paths = [Path(file) for file in files]
    if not paths:
        raise ValueError("merge_states got no files: give those that run(..., state=FILE) wrote.")
    stacks = [path for path in paths if path.suffix and path.with_suffix("") in paths]
    if stacks:
        raise ValueError(
            f"merge_states finds the files of further stacks by itself: leave out {[path.name for path in stacks[:4]]}."
        )
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise ValueError(f"merge_states got {path} twice: its rows would count twice.")
        seen.add(path.resolve())
    return [_read(path) for path in paths]


def _read(path: Path) -> Part:
    if not path.is_file():
        raise FileNotFoundError(f"merge_states: there is no file {path}.")
    try:
        shard = Shard(path)
        record, tensors = read_record(shard)
    except StoreError as error:
        raise ValueError(f"the state {path} cannot be read: {error} Run that part again.") from error
    if record.get("kind") != "state":
        raise ValueError(f"{path} is no state of a run (state=FILE): it is a checkpoint, or something else.")
    if record.get("format") != FORMAT:
        raise ValueError(
            f"the state {path} has format {record.get('format')!r}; this version reads {FORMAT}."
        )
    return Part(path, record, tensors)


def added_up(parts: Sequence[Part], plan: Plan, *, partial: bool = False) -> dict[str, Any]:
    """Put the sum of all parts into the plan's streaming stages; what the parts' records say together.

    Raises:
        ValueError: parts of different pipelines, weights, settings or divisions; parts that have rows in common; parts that are
            missing, unless ``partial``; a pipeline whose streaming stages are not those of the files.
    """
    first = parts[0]
    for part in parts[1:]:
        for what in ("settings", "batch_stages", "stream_stages", "about"):
            apart = differences(first.record.get(what), part.record.get(what), what)
            if apart:
                raise ValueError(
                    f"{part.path} and {first.path} do not belong together: {'; '.join(apart[:4])} (there: {first.path}). States "
                    f"are added up that were made with the same call."
                )
    missing = _refuse_overlap(parts, partial)
    own = pipeline_identity(plan)
    apart = differences(first.record["stream_stages"], plain(own[len(plan.batch) :]), "stream_stages")
    if not apart and plan.batch:
        apart = differences(first.record["batch_stages"], plain(own[: len(plan.batch)]), "batch_stages")
    if apart:
        raise ValueError(
            f"merge_states: the pipeline is not the one of {first.path}: {'; '.join(apart[:4])} (there: in the file). Give the "
            f"pipeline of then, or its stages from the streaming ones on."
        )
    for number, unit in enumerate(plan.stream):
        stage = stage_of(unit)
        stage.reset()
        for part in parts:
            state = {name: part.tensors.get(f"stage/{number}/{name}") for name in stage.state()}
            lacking = [name for name, value in state.items() if value is None]
            if lacking:
                raise ValueError(f"{part.path} holds no {lacking} of {describe(unit)}: it was changed.")
            stage.merge_(
                stage.with_state({name: value.clone() for name, value in state.items() if value is not None})
            )
    counts: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for part in parts:
        for name, count in part.record["counts"].items():
            counts[name] = counts.get(name, 0) + int(count)
        for name, time in part.record["seconds"].items():
            seconds[name] = seconds.get(name, 0.0) + float(time)
    stopped = sorted({str(part.record["stopped"]) for part in parts})
    return {"counts": counts, "seconds": seconds, "stopped": " and ".join(stopped), "missing": missing}


def _refuse_overlap(parts: Sequence[Part], partial: bool) -> list[int]:
    """Raise where parts have rows in common or some are missing; the numbers (from 1) of the missing ones."""
    shards: list[Any] = [part.record.get("shard") for part in parts]
    by_number: dict[int, Part] = {}
    missing: list[int] = []
    if any(shard is not None for shard in shards):
        if any(shard is None or shard[1] != (shards[0] or [0, 0])[1] for shard in shards):
            told = ", ".join(f"{part.path}: {_words(shard)}" for part, shard in zip(parts[:6], shards))
            raise ValueError(
                f"merge_states: the files are parts of different divisions ({told}). Give those of one."
            )
        for part, shard in zip(parts, shards):
            other = by_number.setdefault(shard[0], part)
            if other is not part:
                raise ValueError(
                    f"{part.path} and {other.path} are both part {_words(shard)}: their rows would count twice."
                )
        missing = [number + 1 for number in range(shards[0][1]) if number not in by_number]
        if missing and not partial:
            raise ValueError(
                f"merge_states has {len(parts)} of {shards[0][1]} parts; missing: {missing[:12]}. Give all, or partial=True for "
                f"the numbers of these alone."
            )
        _refuse_other_order(parts)
    by_data: dict[str, Part] = {}
    for part in parts:
        data = part.record["data_sha256"]
        if data and part.record["counts"]["rows"] and (other := by_data.setdefault(data, part)) is not part:
            raise ValueError(
                f"{part.path} and {other.path} are of the very same batches: their rows would count twice."
            )
    met = np.concatenate([np.asarray(part.record["sequences"], dtype=np.int64) for part in parts])
    owner = np.repeat(np.arange(len(parts)), [len(part.record["sequences"]) for part in parts])
    order = np.argsort(met, kind="stable")
    twice = np.flatnonzero(np.diff(met[order]) == 0)
    if len(twice):
        a, b = (parts[owner[order[twice[0] + place]]].path for place in (0, 1))
        raise ValueError(
            f"{a} and {b} have sequences in common ({len(twice)} of the {len(met)} of all files that are compared): their rows "
            f"would count twice. Number the sequences of all jobs apart: shard='K/N', or a 'sequence_id' in the batches."
        )
    return missing


def _refuse_other_order(parts: Sequence[Part]) -> None:
    """Raise where jobs that each took every n-th batch have not met the same batches in the same order."""
    known = {part.path: dict(part.record.get("order") or {}) for part in parts}
    for path, order in known.items():
        for other, its in known.items():
            apart = [
                int(count) for count in order if count != END and its.get(count, order[count]) != order[count]
            ]
            ends = [one[END] for one in (order, its) if END in one]
            if not apart and len(set(ends)) < 2:
                continue
            where = (
                "began with different batches"
                if min(apart, default=0) == 1
                else f"gave other batches, or another order, before the batch {min(apart)}"
                if apart
                else f"ended after {ends[0]} and after {ends[1]} batches"
            )
            raise ValueError(
                f"merge_states: the loaders of {path} and {other} {where}, so they are not parts of one loader "
                f"(shuffle=True?): some sequences would count twice, others never. Give every job the same loader in one order, "
                f"or its own part with sharded=True."
            )


def _words(shard: Any) -> str:
    return "no part" if shard is None else f"{shard[0] + 1}/{shard[1]}"
