"""Rows of many batches, gathered into blocks: small batches then cost the streaming stages what large ones do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.core.words import Words
from tdgeom.numerics.on_host import known_to_host, remember

__all__ = ["BLOCK_ROWS", "GatheredRows"]

BLOCK_ROWS = 2048
Block = tuple[dict[Key, Any], list[int]]  # a tensor or words by key


class GatheredRows:
    """Rows of many batches, handed on in blocks of ``block_rows``; remembers which batch each row came from.

    Rows are copied as they arrive, so that a loader may fill its tensors again; only a block that lies whole in one batch is
    handed on as it is, before the next batch is read.
    """

    def __init__(self, block_rows: int) -> None:
        self.block_rows = block_rows
        self._block: dict[Key, Any] = {}
        self._known: dict[Key, list[Tensor | None]] = {}  # of what lies on a device, what the host knows
        self._origin: list[tuple[int, int]] = []
        self._held = 0

    def add(self, rows: Mapping[Key, Any], count: int, batch: int) -> Iterator[Block]:
        """Take rows in; yield every full block with the batch number of each of its rows."""
        start = 0
        while start < count:
            if not self._held and count - start >= self.block_rows:
                stop = start + self.block_rows
                yield _part(rows, start, stop), [batch] * self.block_rows
            else:
                stop = min(count, start + self.block_rows - self._held)
                self._copy(_part(rows, start, stop), stop - start)
                self._origin.append((batch, stop - start))
                if self._held == self.block_rows:
                    yield self._take()
            start = stop

    def flush(self) -> Iterator[Block]:
        """Yield what is left."""
        if self._held:
            yield self._take()

    def held(self) -> tuple[dict[Key, Any], list[tuple[int, int]]]:
        """The rows not yet handed on, and how many came from which batch."""
        return {key: block[: self._held] for key, block in self._block.items()}, list(self._origin)

    def _copy(self, rows: Mapping[Key, Any], count: int) -> None:
        if self._held and rows.keys() != self._block.keys():
            raise ValueError(
                f"run got {list(rows)} in one batch and {list(self._block)} in the batches before: an optional input is there in "
                f"every batch or in none."
            )
        for key, value in rows.items():
            block = self._block.get(key)
            if isinstance(value, Words) or isinstance(block, Words):
                self._block[key] = self._words(block, value)
                continue
            if block is None:
                block = value.new_empty((self.block_rows, *value.shape[1:]))
            elif block.shape[1:] != value.shape[1:]:
                raise ValueError(
                    f"run got rows of shape {tuple(value.shape)} at {key!r} after rows of shape (N, "
                    f"{', '.join(map(str, block.shape[1:]))}): every batch must give rows of one width."
                )
            elif block.dtype != value.dtype:
                block = block.to(torch.promote_types(block.dtype, value.dtype))
            block[self._held : self._held + count] = value.detach()
            self._block[key] = block
            if value.device.type != "cpu":
                self._known.setdefault(key, []).append(known_to_host(value))
        self._held += count

    def _words(self, block: Tensor | Words | None, value: Tensor | Words) -> Words:
        """Words behind those held; numbers are words too, where another batch has a None among them."""
        come = value if isinstance(value, Words) else Words(value.tolist())
        if block is None:
            return come
        return Words(block[: self._held].tolist()).together_with(come)

    def _take(self) -> Block:
        block = {key: value[: self._held] for key, value in self._block.items()}
        for key, parts in self._known.items():
            told = [part for part in parts if part is not None]
            if len(told) == len(parts):
                remember(block[key], torch.cat(told).to(block[key].dtype))
        origin = [batch for batch, count in self._origin for _ in range(count)]
        self._block, self._known, self._origin, self._held = {}, {}, [], 0
        return block, origin


def _part(rows: Mapping[Key, Any], start: int, stop: int) -> dict[Key, Any]:
    """Some of the rows; what the host knows of all it knows of these."""
    parts = {key: value[start:stop] for key, value in rows.items()}
    for key, value in rows.items():
        if (
            isinstance(value, Tensor)
            and value.device.type != "cpu"
            and (told := known_to_host(value)) is not None
        ):
            remember(parts[key], told[start:stop])
    return parts
