"""Rows of many batches, gathered into blocks: small batches then cost the streaming stages what large ones do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tdgeom.core.keys import Key

__all__ = ["Buffer"]


class Buffer:
    """Rows of many batches, handed on in blocks of ``block_rows``; remembers which batch each row came from."""

    def __init__(self, keys: Sequence[Key], block_rows: int) -> None:
        self.keys = list(keys)
        self.block_rows = block_rows
        self._pieces: dict[Key, list[Tensor]] = {key: [] for key in self.keys}
        self._origin: list[tuple[int, int]] = []
        self._held = 0

    def add(
        self, rows: Mapping[Key, Tensor], count: int, batch: int
    ) -> Iterator[tuple[dict[Key, Tensor], list[int]]]:
        """Take rows in; yield every full block with the batch number of each of its rows."""
        if count:
            for key, value in rows.items():
                self._pieces[key].append(value)
            self._origin.append((batch, count))
            self._held += count
        while self._held >= self.block_rows:
            yield self._take(self.block_rows)

    def flush(self) -> Iterator[tuple[dict[Key, Tensor], list[int]]]:
        """Yield what is left."""
        if self._held:
            yield self._take(self._held)

    def held(self) -> tuple[dict[Key, Tensor], list[tuple[int, int]]]:
        """The rows not yet handed on, and how many came from which batch."""
        return {key: torch.cat(pieces) for key, pieces in self._pieces.items() if pieces}, list(self._origin)

    def restore(self, rows: Mapping[Key, Tensor], origin: Sequence[tuple[int, int]]) -> None:
        """Hold these rows, as ``held`` gave them."""
        self._pieces = {key: [rows[key]] if key in rows else [] for key in self.keys}
        self._origin = [(int(batch), int(count)) for batch, count in origin]
        self._held = sum(count for _, count in self._origin)

    def _take(self, count: int) -> tuple[dict[Key, Tensor], list[int]]:
        block = {}
        for key, pieces in self._pieces.items():
            whole = (
                pieces[0] if len(pieces) == 1 else torch.cat([piece.to(pieces[0].device) for piece in pieces])
            )
            block[key], rest = whole[:count], whole[count:]
            self._pieces[key] = [rest] if rest.shape[0] else []
        origin: list[int] = []
        left = []
        for batch, rows in self._origin:
            taken = min(rows, count - len(origin))
            origin += [batch] * taken
            if taken < rows:
                left.append((batch, rows - taken))
        self._origin = left
        self._held -= count
        return block, origin
