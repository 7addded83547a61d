"""Checkpoints of a run: streaming state and the place in the loader, in files that are written whole or not at all.

One process keeps one file. Of several ranks each writes its state into a file of its own, under a new number; then rank 0 writes
the file that was named, which holds its own state and names those of the others: only what that file names counts. However
many ranks go on, each takes up some of the states, and the sum is the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key, key_tuple
from tdgeom.core.process_groups import from_first_rank, gather_texts, rank_and_world
from tdgeom.core.renamed import stage_of
from tdgeom.core.stage_settings import differences
from tdgeom.core.streaming_stage import StreamingStage, tensor_text, text_tensor
from tdgeom.core.words import Words
from tdgeom.files.errors import StoreError
from tdgeom.files.json_text import plain
from tdgeom.files.shards import Shard
from tdgeom.run.batch_stages import selections
from tdgeom.run.identity import pipeline_identity
from tdgeom.run.plan import Plan
from tdgeom.run.sealed_records import read_record, write_record

__all__ = ["STOPPED", "Checkpoint", "Kept", "checkpoints_kept"]

FORMAT = 2
STOPPED = ("end of data", "max_rows")  # why a stream ended
_WAITING: ContextVar[list[Path] | None] = ContextVar("checkpoints of ended runs", default=None)


@dataclass(frozen=True)
class Kept:
    """What a checkpoint holds for one rank.

    ``whole``: what holds for all ranks; ``first``: the place of the rank 0 of then; ``places``: those of the states that this
    rank takes up, one of each rank of then where there are as many; ``rows``: the rows of each that no stage has had; ``beside``:
    by name, further tensors of each; ``shared``: further tensors that all ranks get.
    """

    whole: Mapping[str, Any]
    first: Mapping[str, Any]
    places: Sequence[Mapping[str, Any]]
    rows: Sequence[dict[Key, Any]]
    beside: Sequence[Mapping[str, Tensor]]
    shared: Mapping[str, Tensor]


class Checkpoint:
    """Where a run keeps its state, and what the state must fit.

    Args:
        path: the file; its folder must exist, and be one that all ranks see. Those of further ranks lie beside it.
        every: batches between two writes.
        plan: the run's stages.
        settings: the run's own settings that change a number.

    What the state must fit is that, and for every stage up to the streaming ones its name, keys, settings, weights, and the
    model it runs (``tdgeom.run.identity``).

    Raises:
        ValueError: every below 1, or no folder.
    """

    def __init__(self, path: str | Path, every: int, plan: Plan, settings: Mapping[str, Any]) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(
                f"run: every counts batches between checkpoints, an int of at least 1, got {every!r}."
            )
        self.path, self.every = Path(path).absolute(), every
        if not self.path.parent.is_dir():
            raise ValueError(
                f"run: checkpoint={str(path)!r} lies in no folder that exists. Make {self.path.parent} first."
            )
        if self.path.is_dir():
            raise ValueError(
                f"run: checkpoint={str(path)!r} is a folder: name a file to keep the state in, such as {self.path / 'state'}."
            )
        self.rank, self.world = rank_and_world()
        self.plan, self.settings = plan, settings
        self.stages = [stage_of(unit) for unit in plan.stream]
        self.selects = selections(plan)
        self.row_keys = {"/".join(key_tuple(key)): key for key in (*plan.stream_keys, "row_id")}
        self.optional = {"/".join(key_tuple(key)) for key in plan.optional_stream_keys}
        self.fits: dict[str, Any] = {}  # known where it is read
        self._number = 0  # of the last write
        self._others: list[Path] = []  # the files of other ranks that the file names

    # ------------------------------------------------------------------------------------------------ writing

    def save(
        self,
        rows: Mapping[Key, Tensor | Words],
        place: Mapping[str, Any],
        whole: Mapping[str, Any],
        beside: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
    ) -> None:
        """Write the state of all stages, the rows not yet handed to them, and the place in the loader. Collective."""
        tensors: dict[str, Tensor] = {f"beside/{name}": value for name, value in beside.items()}
        for key, value in rows.items():
            name = "/".join(key_tuple(key))
            if isinstance(value, Words):
                tensors[f"words/{name}"] = text_tensor(json.dumps(value.tolist()))
            else:
                tensors[f"rows/{name}"] = value
        for number, stage in enumerate(self.stages):
            stage.settle()
            tensors |= {f"stage/{number}/{name}": value for name, value in stage.state().items()}
        for number, select in enumerate(self.selects):
            tensors[f"select/{number}"] = select.sequences
        self._number += 1
        record = {"format": FORMAT, "number": self._number, "rank": self.rank, "place": plain(dict(place))}
        told = ["", ""]
        if self.rank:
            path = self.path.with_name(f"{self.path.name}.{self._number}.rank-{self.rank}")
            told = [path.name, self._write(path, tensors, record)]
        others = [json.loads(text) for text in gather_texts(json.dumps(told))][1:] if self.world > 1 else []
        if self.rank == 0:
            self._refuse_unseen(others)
            tensors |= {f"shared/{name}": value for name, value in shared.items()}
            self._write(
                self.path, tensors, {**record, **self.fits, "whole": plain(dict(whole)), "others": others}
            )
            for path in self._others:
                path.unlink(missing_ok=True)
        self._others = [self.path.with_name(name) for name, _ in others]

    def _write(self, path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> str:
        try:
            return write_record(path, tensors, record)
        except StoreError as error:
            raise OSError(f"run could not write its checkpoint: {error}") from error

    def _refuse_unseen(self, others: Sequence[Sequence[str]]) -> None:
        unseen = [name for name, _ in others if not self.path.with_name(name).is_file()]
        if unseen:
            raise ValueError(
                f"run: checkpoint={str(self.path)!r}: the other ranks have written {unseen[:4]} into their folder of that name, "
                f"and rank 0 does not see them in its own. Take a folder on a file system that all ranks share."
            )

    # ------------------------------------------------------------------------------------------------ reading

    def load(self, device: torch.device | None) -> Kept | None:
        """Put the stages where the files say; the rest of what they hold. None where there is no file. Collective.

        Raises:
            ValueError: a damaged file, or one of another pipeline, other settings or another format: what differs is shown.
        """
        # on all ranks, before one of them reads: collective where they hold parts of one model
        self.fits = {
            "format": FORMAT,
            "settings": plain(dict(self.settings)),
            "stages": pipeline_identity(self.plan),
        }
        record, held = self._read(self.path) if self.rank == 0 and self.path.exists() else ({}, {})
        told = None
        if record:
            shared = {
                name.partition("/")[2]: held.pop(name) for name in list(held) if name.startswith("shared/")
            }
            told = [record["number"], record["whole"], record["place"], record["others"], shared]
        if self.rank == 0:
            self._remove_left_over([name for name, _ in record.get("others", ())])
        told = from_first_rank(told)
        if told is None:
            return None
        self._number, whole, first, others, shared = told
        self._others = [self.path.with_name(name) for name, _ in others]
        every = [(self.path, record.get("sha256")), *((self.path.with_name(n), seal) for n, seal in others)]
        places: list[Mapping[str, Any]] = []
        rows, beside = [], []
        for path, seal in every[self.rank :: self.world]:
            if path != self.path:
                record, held = self._read(path, seal)
            rows.append(self._taken_up(path, record["place"], held, device))
            beside.append(
                {name.partition("/")[2]: value for name, value in held.items() if name.startswith("beside/")}
            )
            places.append(record["place"])
            del held
        for stage in self.stages:
            stage.go_on()
        return Kept(whole, first, places, rows, beside, shared)

    def _read(self, path: Path, seal: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The record and the tensors of the file that was named, or (``seal``) of another rank's that it names."""
        try:
            record, held = read_record(Shard(path), self._refuse_other if seal is None else None)
            if seal is not None and (record["sha256"] != seal or not _is_place(record.get("place"))):
                raise StoreError(f"it is not the one that {self.path.name} names.")
        except StoreError as error:
            raise ValueError(
                f"the checkpoint {path} cannot be read: {error} Remove {'it' if seal is None else self.path} to start anew."
            ) from error
        return record, held

    def _taken_up(
        self, path: Path, place: Mapping[str, Any], held: dict[str, Tensor], device: torch.device | None
    ) -> dict[Key, Any]:
        """The state of one rank of then, added to what the stages hold; its rows, which no stage has had."""
        for number, stage in enumerate(self.stages):
            state = {name: held.pop(f"stage/{number}/{name}", None) for name in stage.state()}
            self._add(path, stage, state, device)
        for number, select in enumerate(self.selects):
            select.sequences.copy_(held.pop(f"select/{number}", torch.zeros((), dtype=torch.int64)))
        rows: dict[str, Any] = {}
        for name, value in held.items():
            kind, _, key = name.partition("/")
            if kind != "beside":
                rows[key] = (
                    Words(json.loads(tensor_text(value) or "[]"))
                    if kind == "words"
                    else value.to(device=device)
                )
        self._refuse_other_rows(path, rows, sum(count for _, count in place["origin"]))
        return {self.row_keys[name]: value for name, value in rows.items()}

    def _add(
        self,
        path: Path,
        stage: StreamingStage,
        state: Mapping[str, Tensor | None],
        device: torch.device | None,
    ) -> None:
        given: dict[str, Tensor] = {}
        for name, value in state.items():
            if value is None:
                raise ValueError(
                    f"the checkpoint {path} holds no fitting {name!r} for {type(stage).__name__}: it was changed. Remove it "
                    f"to start anew."
                )
            given[name] = value.to(device=device)
        if stage.is_empty:
            stage.set_state(given)
        else:
            stage.merge_(stage.with_state(given))

    def _refuse_other_rows(self, path: Path, rows: Mapping[str, Any], count: int) -> None:
        """Held rows are those of every key (optional ones may be absent), as many as the place says; none where it says none."""
        wanted = set(self.row_keys) if count else set()
        if not wanted - self.optional <= set(rows) <= wanted or any(
            value.shape[:1] != (count,) for value in rows.values()
        ):
            found = {name: tuple(value.shape) for name, value in rows.items()}
            raise ValueError(
                f"the checkpoint {path} should hold {count} rows of {sorted(wanted)}, it holds {found}: it was changed. "
                f"Remove it to start anew."
            )

    def _refuse_other(self, record: Any) -> None:
        if not isinstance(record, dict) or not _is_place(record.get("place")):
            raise ValueError(f"{self.path} is no checkpoint of tdgeom: it has no record of a run.")
        found = {name: record.get(name) for name in self.fits}
        if found["format"] != FORMAT:
            raise ValueError(
                f"the checkpoint {self.path} has format {found['format']!r}; this version reads {FORMAT}. Remove it."
            )
        differing = differences(found, self.fits)
        if differing:
            raise ValueError(
                f"the checkpoint {self.path} belongs to another run: {'; '.join(differing[:4])}"
                f"{' ...' if len(differing) > 4 else ''}. Call run as before, or remove the file to start anew."
            )
        if not _is_whole(record):
            raise ValueError(f"{self.path} is no checkpoint of tdgeom: it has no record of a run.")

    # ------------------------------------------------------------------------------------------------ removing

    def remove(self) -> None:
        """The run has ended: nothing is left to resume; inside ``checkpoints_kept`` that is so when the block ends."""
        if self.rank:  # rank 0 alone has the results
            return
        waiting = _WAITING.get()
        paths = [self.path, *self._others]  # the one that names the others first
        if waiting is None:
            _unlink(paths)
        else:
            waiting += paths

    def _remove_left_over(self, named: Sequence[str]) -> None:
        """Delete what processes left that were killed while they wrote, or before what they wrote was named."""
        own = re.escape(self.path.name)
        left_over = re.compile(rf"{own}\.\d+\.rank-\d+|\.{own}(\.\d+\.rank-\d+)?\.\d+\.draft")
        for path in self.path.parent.iterdir():
            if left_over.fullmatch(path.name) and path.name not in named:
                path.unlink(missing_ok=True)


@contextmanager
def checkpoints_kept() -> Iterator[None]:
    """Checkpoints of the runs inside stay until the block has ended well: until what they gave is safe.

    ``run(checkpoint=)`` removes its file when it returns, and what it returns is in memory only. An error inside the block leaves
    the file where it is. Of blocks inside one another the outermost decides; in ranks, rank 0 removes.

        >>> import tempfile, torch, tdgeom as tg
        >>> from pathlib import Path
        >>> file = Path(tempfile.mkdtemp()) / "state"
        >>> with tg.checkpoints_kept():
        ...     found = tg.run(tg.StreamingMean(), 5 * [{"tokens": torch.ones(4, 2)}], checkpoint=file, every=2)
        ...     torch.save(found["mean"].to_dict(), file.with_name("saved.pt"))
        >>> file.exists()
        False
    """
    if _WAITING.get() is not None:  # an outer block decides
        yield
        return
    paths: list[Path] = []
    token = _WAITING.set(paths)
    try:
        yield
    finally:
        _WAITING.reset(token)
    _unlink(paths)


def _unlink(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _is_place(place: Any) -> bool:
    """Whether a record's place has the form that ``run`` writes."""
    if not isinstance(place, dict):
        return False
    counts, seconds, origin = (place.get(name) for name in ("counts", "seconds", "origin"))
    if not (isinstance(counts, dict) and isinstance(seconds, dict) and isinstance(origin, list)):
        return False
    if not all(isinstance(one, list) and len(one) == 2 for one in origin):
        return False
    numbers = [place.get("batches"), *counts.values(), *(number for pair in origin for number in pair)]
    return (
        all(map(_is_natural, numbers))
        and all(isinstance(one, float | int) for one in seconds.values())
        and all(isinstance(place.get(name), str) for name in ("first_batch", "data"))
    )


def _is_whole(record: Mapping[str, Any]) -> bool:
    """Whether a record says of all ranks what ``run`` writes of them."""
    whole, others = record.get("whole"), record.get("others")
    if not (isinstance(whole, dict) and isinstance(others, list)):
        return False
    named = [
        isinstance(one, list) and len(one) == 2 and all(isinstance(n, str) for n in one) for one in others
    ]
    inside = all(named) and not any("/" in name or "\\" in name for name, _ in others)
    last = whole.get("last")
    return (
        inside
        and all(
            _is_natural(n) for n in (record.get("number"), *map(whole.get, ("claimed", "rounds", "ranks")))
        )
        and all(isinstance(whole.get(name), bool) for name in ("split", "ascending"))
        and isinstance(last, list)
        and all(one is None or type(one) is int for one in last)
        and whole.get("stopped", "") in (None, *STOPPED)
    )


def _is_natural(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**62
