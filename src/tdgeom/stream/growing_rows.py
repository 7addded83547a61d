"""Every row of a stream, in buffers that double as they fill: a run then costs each row one copy or two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.streaming_stage import StreamingStage
from tdgeom.numerics.on_host import on_host, remember
from tdgeom.stream.held_rows import same_kind

__all__ = ["GrowingRows", "with_more"]


def with_more(buffer: Tensor, held: int, rows: Tensor) -> Tensor:
    """The buffer with rows behind the ``held`` first; written in place while there is room, else twice as large.

    >>> with_more(torch.tensor([1, 0]), 1, torch.tensor([2, 3])).tolist()
    [1, 2, 3, 0]
    """
    total = held + rows.shape[0]
    if total > buffer.shape[0]:
        grown = buffer.new_zeros((max(total, 2 * buffer.shape[0]), *buffer.shape[1:]))
        grown[:held] = buffer[:held]
        buffer = grown
    buffer[held:total] = rows
    return buffer


class GrowingRows(StreamingStage):
    """A streaming stage that keeps, of every block, what ``kept`` returns; ``rows`` are all of them."""

    count: Tensor

    def declare(self, **dtypes: torch.dtype | None) -> None:
        """The rows kept, by name, and their dtypes (None: as they come)."""
        self.add_state("count", torch.int64)
        for name, dtype in dtypes.items():
            self.add_state(name, dtype)

    def kept(self, *inputs: Any) -> dict[str, Tensor]:
        """What is kept of a block of rows, by name."""
        raise TypeError(f"{type(self).__name__} defines no kept(): return the rows to keep there, by name.")

    @property
    def held(self) -> int:
        """Rows kept so far."""
        return 0 if self.is_empty else int(on_host(self.count))

    def rows(self) -> dict[str, Tensor]:
        """The rows kept so far, as views of the state."""
        return {name: value[: self.held] for name, value in self.state().items() if name != "count"}

    def start(self, *inputs: Any) -> dict[str, Tensor]:
        """Room for the first rows."""
        rows = self.kept(*inputs)
        room = {name: torch.zeros_like(value) for name, value in rows.items()}
        return {"count": torch.zeros((), dtype=torch.int64, device=inputs[0].device), **room}

    def accumulate(self, *inputs: Any) -> None:
        """Append rows."""
        self.append(self.kept(*inputs))

    def append(self, rows: Mapping[str, Tensor]) -> None:
        """Put rows behind those held."""
        state, held = self.state(), self.held
        for name, value in rows.items():
            same_kind(self.__name__, name, state[name], value)
        more = {name: with_more(state[name], held, value) for name, value in rows.items()}
        count = held + next(iter(rows.values())).shape[0]
        self.set_state({**more, "count": torch.full_like(self.count, count)})
        remember(self.count, torch.tensor(count, device="cpu"))

    def fits(self, name: str, value: Tensor) -> bool:
        """Room may differ."""
        return value.shape[1:] == self.state()[name].shape[1:]

    def combine(self, other: GrowingRows) -> None:
        """Append another's rows."""
        self.append({name: value.to(self.home) for name, value in other.rows().items()})
