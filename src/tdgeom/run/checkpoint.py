"""Checkpoints of a run: streaming state and the place in the loader, in one file that is written whole or not at all.

The file is in the safetensors format: tensors and one JSON record, read by a parser that checks everything and runs
nothing. A run started again with the same call goes on where the file stands.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key, key_tuple
from tdgeom.core.renamed import stage_of
from tdgeom.core.stage_settings import differences
from tdgeom.core.streaming_stage import StreamingStage, tensor_text, text_tensor
from tdgeom.core.words import Words
from tdgeom.files.errors import StoreError
from tdgeom.files.json_text import canonical_json, plain, read_json
from tdgeom.files.shard_writing import bytes_of, write_shard
from tdgeom.files.shards import Shard
from tdgeom.run.batch_stages import selections
from tdgeom.run.identity import pipeline_identity
from tdgeom.run.plan import Plan

__all__ = ["STOPPED", "Checkpoint", "checkpoints_kept", "read_record", "sealed"]

FORMAT = 1
RECORD = "record"
STOPPED = ("end of data", "max_rows")  # why a stream ended
_LARGEST_RECORD = 16 * 2**20
_WAITING: ContextVar[list[Path] | None] = ContextVar("checkpoints of ended runs", default=None)


class Checkpoint:
    """Where a run keeps its state, and what the state must fit.

    Args:
        path: the file; its folder must exist.
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
        self.stages = [stage_of(unit) for unit in plan.stream]
        self.selects = selections(plan)
        self.row_keys = {"/".join(key_tuple(key)): key for key in (*plan.stream_keys, "row_id")}
        self.optional = {"/".join(key_tuple(key)) for key in plan.optional_stream_keys}
        self.fits = {"format": FORMAT, "settings": plain(dict(settings)), "stages": pipeline_identity(plan)}

    def save(self, rows: Mapping[Key, Tensor | Words], place: Mapping[str, Any]) -> None:
        """Write the state of all stages, the rows not yet handed to them, and the place in the loader."""
        tensors: dict[str, Tensor] = {}
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
        record = {**self.fits, "place": plain(dict(place))}
        tensors[RECORD] = sealed(tensors, record)
        try:
            write_shard(self.path, tensors)
        except StoreError as error:
            raise OSError(f"run could not write its checkpoint: {error}") from error

    def load(self, device: torch.device | None) -> tuple[dict[Key, Any], dict[str, Any]] | None:
        """Put the stages where the file says; (rows not yet handed on, the place). None where there is no file.

        Raises:
            ValueError: a damaged file, or one of another pipeline, other settings or another format: what differs is shown.
        """
        self._remove_drafts()
        if not self.path.exists():
            return None
        try:
            record, held = read_record(Shard(self.path), self._refuse_other)
        except StoreError as error:
            raise ValueError(
                f"the checkpoint {self.path} cannot be read: {error} Remove it to start anew."
            ) from error
        for number, stage in enumerate(self.stages):
            self._put(stage, {n: held.pop(f"stage/{number}/{n}", None) for n in stage.state()}, device)
            stage.go_on()
        for number, select in enumerate(self.selects):
            select.sequences.copy_(held.pop(f"select/{number}", torch.zeros((), dtype=torch.int64)))
        rows: dict[str, Any] = {}
        for name, value in held.items():
            kind, _, key = name.partition("/")
            rows[key] = (
                Words(json.loads(tensor_text(value) or "[]")) if kind == "words" else value.to(device=device)
            )
        self._refuse_other_rows(rows, sum(count for _, count in record["place"]["origin"]))
        return {self.row_keys[name]: value for name, value in rows.items()}, record["place"]

    def remove(self) -> None:
        """The run has ended: nothing is left to resume; inside ``checkpoints_kept`` that is so when the block ends."""
        waiting = _WAITING.get()
        if waiting is None:
            self.path.unlink(missing_ok=True)
        else:
            waiting.append(self.path)

    def _remove_drafts(self) -> None:
        """Delete what a process left that was killed while it wrote."""
        for path in self.path.parent.glob(f".{glob.escape(self.path.name)}.*.draft"):
            path.unlink(missing_ok=True)

    def _put(
        self, stage: StreamingStage, state: Mapping[str, Tensor | None], device: torch.device | None
    ) -> None:
        for name, value in state.items():
            if value is None:
                raise ValueError(
                    f"the checkpoint {self.path} holds no fitting {name!r} for {type(stage).__name__}: it was changed. Remove it "
                    f"to start anew."
                )
            stage.set_state({name: value.to(device=device)})

    def _refuse_other_rows(self, rows: Mapping[str, Any], count: int) -> None:
        """Held rows are those of every key (optional ones may be absent), as many as the place says; none where it says none."""
        wanted = set(self.row_keys) if count else set()
        if not wanted - self.optional <= set(rows) <= wanted or any(
            value.shape[:1] != (count,) for value in rows.values()
        ):
            found = {name: tuple(value.shape) for name, value in rows.items()}
            raise ValueError(
                f"the checkpoint {self.path} should hold {count} rows of {sorted(wanted)}, it holds {found}: it was changed. "
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


def sealed(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Tensor:
    """A record with the SHA-256 of itself and the tensors beside it, as bytes."""
    text = json.dumps({**record, "sha256": _sha256(tensors, record)}, allow_nan=False).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def read_record(
    file: Shard, check: Callable[[Any], None] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A file's record and its other tensors, as they were written; ``check`` sees the record before anything else is read.

    Raises:
        StoreError: a damaged or changed file.
    """
    record = read_json(
        bytes(file.whole(RECORD).view(torch.uint8).numpy()), f"the record of {file.path}", _LARGEST_RECORD
    )
    if check is not None:
        check(record)
    held = {name: file.whole(name) for name in file.tensors if name != RECORD}
    if not isinstance(record, dict) or record.pop("sha256", None) != _sha256(held, record):
        raise StoreError("its SHA-256 is not the one that was written: it was damaged or changed.")
    return record, held


@contextmanager
def checkpoints_kept() -> Iterator[None]:
    """Checkpoints of the runs inside stay until the block has ended well: until what they gave is safe."""
    if _WAITING.get() is not None:  # an outer block decides
        yield
        return
    paths: list[Path] = []
    token = _WAITING.set(paths)
    try:
        yield
    finally:
        _WAITING.reset(token)
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
    naturals = [place.get(name) for name in ("batches", "claimed", "sequences")]
    naturals += [*counts.values(), *(number for pair in origin for number in pair)]
    return (
        all(type(one) is int and 0 <= one < 2**62 for one in naturals)
        and all(isinstance(one, float | int) for one in seconds.values())
        and isinstance(place.get("first_batch"), str)
        and place.get("stopped", "") in (None, "", *STOPPED)
    )


def _sha256(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> str:
    """SHA-256 over the record and every tensor: a flipped bit would else become a wrong number."""
    digest = hashlib.sha256(canonical_json(record).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(canonical_json([name, list(value.shape), str(value.dtype)]).encode())
        digest.update(bytes_of(value))
    return digest.hexdigest()
