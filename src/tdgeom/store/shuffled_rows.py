"""The rows of a stored run in a random order, batch by batch: what a training loop reads, with workers and on several ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from tdgeom.core.process_groups import rank_and_world

__all__ = ["ShuffledRows"]

CHUNK_ROWS = 4096
MIXED_CHUNKS = 16


class Rows(Protocol):
    """Rows by their number: what ``store.rows(run)`` gives."""

    rows: int
    batch_rows: int

    def __getitem__(self, rows: np.ndarray, /) -> Any:
        """These rows, in this order."""


class ShuffledRows(IterableDataset[dict[str, Any]]):
    """Batches of a run's rows in a random order, each row once an epoch: for ``DataLoader(rows.shuffled(), batch_size=None)``.

    A batch is a nested dict of tensors (``batch["tokens"]["residual_output.3"]``), which torch's loaders hand on as it is.

    The run is cut into chunks of neighbouring rows. Their order is random; so is that of the rows of
    ``mixed_chunks`` chunks at a time, which is what is held of the disk's order. Chunks are dealt to the ranks of a process
    group and to the workers of a ``DataLoader``, so that each row comes once over all of them; the last batch of each may be
    smaller, and ranks may get batches in different numbers (up to the rows of a chunk apart).

    Args:
        source: ``store.rows(run)``; its ``batch_rows`` are those of a batch.
        seed: with the epoch it decides the order.
        chunk_rows: neighbouring rows read together.
        mixed_chunks: chunks whose rows are mixed.

    Raises:
        ValueError: a number below 1.
    """

    split_by_rank = True  # run need not share it out

    def __init__(
        self,
        source: Rows,
        *,
        seed: int = 0,
        chunk_rows: int = CHUNK_ROWS,
        mixed_chunks: int = MIXED_CHUNKS,
    ) -> None:
        if min(chunk_rows, mixed_chunks) < 1:
            raise ValueError(
                f"shuffled: chunk_rows and mixed_chunks are at least 1, got {chunk_rows} and {mixed_chunks}."
            )
        self.source, self.seed, self.epoch = source, seed, 0
        self.chunk_rows, self.mixed_chunks = chunk_rows, mixed_chunks

    def __repr__(self) -> str:
        return f"ShuffledRows({self.source!r}, seed={self.seed}, epoch={self.epoch})"

    def set_epoch(self, epoch: int) -> None:
        """The order of this epoch from now on; call it between epochs, as for ``DistributedSampler``."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        chunks = self._chunks()
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(chunks))
        part, parts = self._share()
        mine = [chunks[number] for number in order[part::parts]]
        random = np.random.default_rng([self.seed, self.epoch, part, parts])
        left, size = np.zeros(0, dtype=np.int64), self.source.batch_rows
        for first in range(0, len(mine), self.mixed_chunks):
            group = mine[first : first + self.mixed_chunks]
            rows = np.concatenate([left, random.permutation(np.concatenate(group))])
            whole = len(rows) - len(rows) % size
            for begin in range(0, whole, size):
                yield self.source[rows[begin : begin + size]].to_dict()
            left = rows[whole:]
        if len(left):
            yield self.source[left].to_dict()

    def _chunks(self) -> list[np.ndarray]:
        rows = self.source.rows
        return [
            np.arange(begin, min(begin + self.chunk_rows, rows)) for begin in range(0, rows, self.chunk_rows)
        ]

    def _share(self) -> tuple[int, int]:
        """Which part of the chunks is read here, and of how many parts."""
        worker, (rank, world) = get_worker_info(), rank_and_world()
        if worker is None:
            return rank, world
        return rank * worker.num_workers + worker.id, world * worker.num_workers
