"""``Collect``: keep rows as they are, up to a limit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.stream.held_rows import RowsStage

__all__ = ["Collect"]


class Collect(RowsStage):
    """Every row of the stream, in the order of its row id, up to a stated limit.

    For what must be kept whole (a small model's activations, a per-row score); buffers double as they fill, so a run
    costs each row one copy or two. Beyond ``limit`` rows it raises rather than drop rows silently.

    Args:
        sites: the sites to keep, such as ``capture.sites``; None for one unnamed site (``"tokens"``).
        limit: the most rows it may hold.
        also: names carried by ``SelectTokens(also=...)`` kept beside the sites.

    Reads ``("tokens", site)``, ``("carried", name)`` and ``"row_id"``; writes ``("collected", site)``,
    ``("collected_carried", name)`` and ``"collected_row_id"``.

    Raises:
        ValueError: more rows than ``limit``, or inputs that are not the same rows.

        >>> import torch, tdgeom as tg
        >>> stage = tg.Collect()
        >>> _ = stage(tokens=torch.ones(2, 1), row_id=torch.tensor([2, 3]))
        >>> stage(tokens=torch.zeros(2, 1), row_id=torch.tensor([0, 1]))[0].flatten()
        tensor([0., 0., 1., 1.])
    """

    publishing = frozenset({"limit"})
    count: Tensor
    ids: Tensor

    def __init__(
        self,
        sites: Iterable[Any] | None = None,
        *,
        limit: int = 100_000,
        also: Sequence[str] = (),
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        if limit < 1:
            raise ValueError(f"Collect: limit must be at least 1, got {limit}.")
        super().__init__("collected", sites, also, in_keys=in_keys, out_keys=out_keys)
        self.limit = limit
        self.add_state("count", torch.int64)

    def start(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Room for the first rows."""
        state = self.blank(inputs[:-1], max(len(inputs[-1]), 1))
        return {**state, "count": torch.zeros((), dtype=torch.int64)}

    def accumulate(self, *inputs: Tensor) -> None:
        """Append rows."""
        *rows, row_id = inputs
        self.check_rows(rows, row_id)
        self._append(rows, row_id.long())

    def combine(self, other: Collect) -> None:
        """Append another's rows."""
        held, home = int(other.count), self.ids.device
        self._append([other.state()[name][:held].to(home) for name in self.held], other.ids[:held].to(home))

    def _append(self, rows: Sequence[Tensor], row_id: Tensor) -> None:
        held = int(self.count)
        total = held + row_id.shape[0]
        if total > self.limit:
            raise ValueError(
                f"Collect holds {held} rows and gets {row_id.shape[0]} more, which is above limit={self.limit}. Raise the "
                f"limit, lower run's max_rows, or keep a uniform sample with RowSample."
            )
        for name, value in (("ids", row_id), *zip(self.held, rows)):
            buffer = self.state()[name]
            if total > buffer.shape[0]:
                grown = buffer.new_zeros((max(total, 2 * buffer.shape[0]), *buffer.shape[1:]))
                grown[:held] = buffer[:held]
                setattr(self, name, grown)
            self.state()[name][held:total] = value
        self.count += row_id.shape[0]

    def fits(self, name: str, value: Tensor) -> bool:
        """Capacities may differ."""
        return value.shape[1:] == self.state()[name].shape[1:]

    def result(self) -> list[Tensor]:
        """The rows in the order of their ids."""
        held = int(self.count)
        ids, order = torch.sort(self.ids[:held], stable=True)
        return [*(self.state()[name][:held][order] for name in self.held), ids]
