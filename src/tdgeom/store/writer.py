"""Rows into the shards of a run: gathered in buffers of fixed size, written when these are full, then entered."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from tdgeom.store.catalogue import Catalogue, ShardRecord
from tdgeom.store.dtypes import encode, rounding_error
from tdgeom.store.errors import StoreError
from tdgeom.store.files import explain
from tdgeom.store.layout import Entry, Layout
from tdgeom.store.locks import Lock
from tdgeom.store.shard_writing import write_shard

__all__ = ["RunLock", "RunWriter"]


class RunLock:
    """The right of one rank to write a run, and the run's folder."""

    def __init__(self, catalogue: Catalogue, run: str, rank: int = 0) -> None:
        self.catalogue, self.run, self.rank = catalogue, run, rank
        self.folder: Path = catalogue.folder / run
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise explain(error, f"making {self.folder}") from error
        self._lock = Lock(self.folder / f"rank-{rank:05d}.lock", f"run {run}")

    def release(self) -> None:
        """Let the next writer in."""
        self._lock.release()


class RunWriter:
    """Appends the rows of one rank to a run that the catalogue has.

    A shard belongs to the run once the catalogue has it, which is after its bytes and its name are on the disk. What is
    in the buffers when the process dies is lost, and nothing else.

    Args:
        lock: the right to write.
        layout: what a shard holds.
        shard_bytes: a shard's size, and so the size of the buffers.
    """

    def __init__(self, lock: RunLock, layout: Layout, shard_bytes: int) -> None:
        self._lock, self._entries = lock, layout.entries
        self._held = 0
        self._capacity = max(1, shard_bytes // sum(map(_row_bytes, layout.entries)))
        self._buffers: dict[str, Tensor] = {}
        for entry in layout.entries:
            self._buffers[entry.name] = torch.empty((self._capacity, *entry.shape), dtype=entry.stored)
            if entry.scale is not None:
                self._buffers[entry.scale] = torch.empty(self._capacity)
        self._rounding = self._no_rounding()
        finished = [shard.number for shard in lock.catalogue.shards(lock.run) if shard.rank == lock.rank]
        self._next = max(finished, default=-1) + 1
        self._remove_leftovers(len(finished))

    @property
    def run(self) -> str:
        """The run's id."""
        return self._lock.run

    def append(self, values: Sequence[Tensor]) -> None:
        """Rows of every entry, in the order of the layout; full shards are written.

        Raises:
            StoreError: a value beyond the stored dtype's range, or the disk refused (the run is then marked as failed).
        """
        count = values[0].shape[0]
        encoded = [encode(value, entry.stored) for value, entry in zip(values, self._entries)]
        for entry, value, (stored, scale) in zip(self._entries, values, encoded):
            self._rounding[entry.name] = _add(
                self._rounding[entry.name], rounding_error(value, stored, scale)
            )
        begin = 0
        while begin < count:
            end = min(count, begin + self._capacity - self._held)
            for entry, (stored, scale) in zip(self._entries, encoded):
                self._fill(entry.name, stored[begin:end])
                if entry.scale is not None:
                    self._fill(entry.scale, scale[begin:end])
            self._held += end - begin
            begin = end
            if self._held == self._capacity:
                self.flush()

    def flush(self) -> None:
        """Write what is held as a shard, smaller than the others."""
        if not self._held:
            return
        try:
            self._write_shard()
        except BaseException as error:
            self.fail(f"{type(error).__name__}: {error}")
            raise
        self._held = 0
        self._rounding = self._no_rounding()
        self._next += 1

    def complete(self) -> None:
        """Write what is held and mark the run as complete."""
        self.flush()
        self._lock.catalogue.set_state(self.run, "complete")
        self.release()

    def fail(self, reason: str) -> None:
        """Mark the run as failed; what is held is dropped."""
        with suppress(StoreError):  # a run that nobody writes counts as failed without the mark
            self._lock.catalogue.set_state(self.run, "failed", reason[:1000])
        self.release()

    def release(self) -> None:
        """Let the next writer in."""
        self._lock.release()

    def _write_shard(self) -> None:
        shard = ShardRecord(self._lock.rank, self._next, self._held, 0, "", {})
        tensors = {name: buffer[: self._held] for name, buffer in self._buffers.items()}
        size, digest = write_shard(self._lock.folder / shard.name, tensors)
        rounding = {name: part.tolist() for name, part in self._rounding.items() if part.any()}
        shard = ShardRecord(self._lock.rank, self._next, self._held, size, digest, rounding)
        self._lock.catalogue.add_shard(self.run, shard)

    def _fill(self, name: str, rows: Tensor) -> None:
        self._buffers[name][self._held : self._held + rows.shape[0]] = rows

    def _no_rounding(self) -> dict[str, Tensor]:
        return {entry.name: torch.zeros(3, dtype=torch.float64) for entry in self._entries}

    def _remove_leftovers(self, finished: int) -> None:
        """Files of this rank that a killed writer left before the catalogue had them."""
        known = {shard.name for shard in self._lock.catalogue.shards(self.run)}
        mine = f"rank-{self._lock.rank:05d}-"
        for path in self._lock.folder.iterdir():
            if path.name.lstrip(".").startswith(mine) and path.name not in known:
                path.unlink()


def _row_bytes(entry: Entry) -> int:
    return torch.Size(entry.shape).numel() * entry.stored.itemsize + (4 if entry.scale is not None else 0)


def _add(a: Tensor, b: Tensor) -> Tensor:
    """Two parts of a run: sums add up, the largest is the larger."""
    b = b.to(a.device)
    return torch.cat([a[:2] + b[:2], torch.maximum(a[2:], b[2:])])
