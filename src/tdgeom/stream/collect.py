"""``Collect``: keep rows as they are, up to a limit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.stream.growing_rows import GrowingRows
from tdgeom.stream.held_rows import named_rows, row_keys

__all__ = ["Collect"]


class Collect(GrowingRows):
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

    takes_complex = True  # rows are held as they come
    publishing = frozenset({"limit"})

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
        reads, writes = row_keys("Collect", "collected", sites, also)
        super().__init__(in_keys=in_keys, out_keys=out_keys, reads=reads, writes=writes)
        self.limit = limit
        self.declare(ids=torch.int64, **{f"rows_{i}": None for i in range(len(reads) - 1)})

    def kept(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Rows and their ids, all of them."""
        return named_rows(self, inputs)

    def append(self, rows: Mapping[str, Tensor]) -> None:
        """Put rows behind those held, up to the limit."""
        if self.held + len(rows["ids"]) > self.limit:
            raise ValueError(
                f"Collect holds {self.held} rows and gets {len(rows['ids'])} more, which is above limit={self.limit}. Raise the "
                f"limit, lower run's max_rows, or keep a uniform sample with RowSample."
            )
        super().append(rows)

    def result(self) -> list[Tensor]:
        """The rows in the order of their ids."""
        ids, *rows = self.rows().values()
        ids, order = torch.sort(ids, stable=True)
        return [*(value[order] for value in rows), ids]
