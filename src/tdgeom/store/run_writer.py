"""Rows into the shards of a run: gathered in buffers of fixed size, written when these are full, then entered."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tdgeom.core.words import Vocabulary
from tdgeom.files.atomic import explained, sync_folder
from tdgeom.files.errors import StoreBusyError, StoreError
from tdgeom.files.shard_writing import write_shard
from tdgeom.store.catalogue import Catalogue
from tdgeom.store.run_records import ShardRecord
from tdgeom.store.shard_layout import WORDS, ShardLayout
from tdgeom.store.stored_dtypes import encode, rounding_error
from tdgeom.store.write_lock import Lock

__all__ = ["RunLock", "RunWriter", "reason_of"]

_LONGEST_REASON = 1000


def reason_of(error: BaseException) -> str:
    """Why a run failed, for the catalogue."""
    return f"{type(error).__name__}: {error}"[:_LONGEST_REASON]


class RunLock(Lock):
    """The right of one rank to write a run, and the run's folder.

    Raises:
        StoreBusyError: another process has it.
    """

    def __init__(self, catalogue: Catalogue, run: str, rank: int = 0) -> None:
        self.catalogue, self.run, self.rank = catalogue, run, rank
        self.folder: Path = catalogue.folder_of(run)
        with explained(f"making {self.folder}"):
            self.folder.mkdir(exist_ok=True)
            sync_folder(catalogue.folder)
        super().__init__(self.folder / f"rank-{rank:05d}.lock", f"run {run}")

    def clear(self, every_rank: bool = True) -> None:
        """Delete files, of every rank or this one's, that a killed writer left before the catalogue had them."""
        known = {shard.name for shard in self.catalogue.shards(self.run)}
        beginning = "" if every_rank else f"rank-{self.rank:05d}-"
        for path in self.folder.iterdir():
            is_named_so = path.name.lstrip(".").startswith(beginning)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif is_named_so and path.suffix != ".lock" and path.name not in known:
                path.unlink()


class RunWriter:
    """Appends the rows of one rank to a run that the catalogue has.

    A shard belongs to the run once the catalogue has it, which is after its bytes and its name are on the disk. What is
    in the buffers when the process dies is lost, and nothing else.

    Args:
        lock: the right to write; released by ``stop`` and where writing fails.
        layout: what a shard holds.
        shard_bytes: a shard's size, and so the size of the buffers.
        known: ids of rows that the run has already; such rows are passed over (8 bytes a row in memory).
    """

    def __init__(self, lock: RunLock, layout: ShardLayout, shard_bytes: int, known: np.ndarray) -> None:
        self.run, self._lock = lock.run, lock
        self._entries, self._known = layout.entries, np.sort(known)
        self._codes = [entry.name for entry in layout.entries if entry.key in layout.words]
        self._vocabulary = self._coming = Vocabulary()
        self._capacity = max(1, shard_bytes // layout.row_bytes)
        self._held = 0
        self._buffers = {
            name: torch.empty((self._capacity, *shape), dtype=dtype)
            for entry in layout.entries
            for name, (dtype, shape) in entry.parts.items()
        }
        self._rounding: dict[str, Tensor] = {}
        mine = [shard.number for shard in lock.catalogue.shards(lock.run) if shard.rank == lock.rank]
        self._number = max(mine, default=-1) + 1
        self._failure: str | None = None

    def append(self, values: Sequence[Tensor], vocabulary: Vocabulary | None = None) -> None:
        """Copy rows of every entry, in the order of the layout (``row_id`` last); full shards are written.

        Words come as their codes, with the vocabulary that spells them out.

        Raises:
            StoreError: a value beyond the stored dtype's range, or the disk refused (the run is then marked as failed).
        """
        if vocabulary is not None:
            self._vocabulary.update(vocabulary)
            self._coming = vocabulary  # of whose rows some may go into the next shard
        if len(self._known):
            row_id = values[-1].cpu().numpy()
            nearest = np.searchsorted(self._known, row_id).clip(max=len(self._known) - 1)
            is_new = torch.from_numpy(self._known[nearest] != row_id).to(values[-1].device)
            values = [value[is_new] for value in values]
        encoded = [encode(value, entry.stored) for value, entry in zip(values, self._entries)]
        begin, count = 0, values[0].shape[0]
        while begin < count:
            end = min(count, begin + self._capacity - self._held)
            for entry, value, (stored, scale) in zip(self._entries, values, encoded):
                part, place = slice(begin, end), slice(self._held, self._held + end - begin)
                self._buffers[entry.name][place] = stored[part]
                scales = None if scale is None else scale[part]
                if scales is not None and entry.scale is not None:
                    self._buffers[entry.scale][place] = scales
                if stored is not value:
                    self._add_rounding(entry.name, rounding_error(value[part], stored[part], scales))
            self._held += end - begin
            begin = end
            if self._held == self._capacity:
                self.flush()

    def flush(self) -> None:
        """Write what is held as a shard, smaller than the others."""
        if self._failure is not None:
            raise StoreError(
                f"run {self.run} could not be written ({self._failure}). Begin a new run with reset(), or go on with this one "
                f"in a new stage, StoreActivations(..., resume={self.run!r})."
            )
        if not self._held:
            return
        if not self._lock.is_held:
            raise StoreBusyError(
                f"run {self.run} is written by the process that this one was forked from: reset() the stage here, and write a "
                f"run of its own."
            )
        try:
            self._write_shard()
        except BaseException as error:
            self._failure = reason_of(error)
            with suppress(StoreError):  # a run that nobody writes counts as failed without the mark
                self._lock.catalogue.set_state(self.run, "failed", self._failure)
            self._lock.release()
            raise
        self._held, self._rounding, self._vocabulary = 0, {}, self._coming.copy()
        self._number += 1

    def stop(self) -> None:
        """Write what is held and let the next writer in; a run that failed stays as it is."""
        if self._failure is None and self._lock.is_held:
            self.flush()
        self._lock.release()

    def _write_shard(self) -> None:
        name = ShardRecord(self._lock.rank, self._number, 0, 0, "", {}).name
        tensors = {name: buffer[: self._held] for name, buffer in self._buffers.items()}
        if self._codes:
            own = self._vocabulary.copy()
            own.keep(code for name in self._codes for code in torch.unique(tensors[name]).tolist())
            tensors[WORDS] = own.tensor()
        size, digest = write_shard(self._lock.folder / name, tensors)
        rounding = {name: part.tolist() for name, part in self._rounding.items()}
        record = ShardRecord(self._lock.rank, self._number, self._held, size, digest, rounding)
        self._lock.catalogue.add_shard(self.run, record)

    def _add_rounding(self, name: str, error: Tensor) -> None:
        before = self._rounding.get(name)
        if before is not None:
            error = torch.cat([before[:2] + error[:2], torch.maximum(before[2:], error[2:])])
        self._rounding[name] = error
