"""``Collect``: keep rows as they are, up to a limit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.stream.growing_rows import GrowingRows
from tdgeom.stream.held_rows import HoldsWords, named_rows, row_keys

__all__ = ["Collect"]


class Collect(HoldsWords, GrowingRows):
    """Every row of the stream, in the order of its row id, up to a stated limit.

    For what must be kept whole (a small model's activations, a per-row score); buffers double as they fill, so a run
    costs each row one copy or two. Beyond ``limit`` rows it raises rather than drop rows silently.

    Args:
        sites: the sites to keep, such as ``capture.sites``; None for one unnamed site (``"tokens"``).
        limit: the most rows it may hold.
        also: names carried by ``SelectTokens(also=...)`` kept beside the sites: numbers, or words (text, None, lists), which come
            back as a list.

    Reads ``("tokens", site)``, ``("carried", name)`` and ``"row_id"``; writes ``("collected", site)``,
    ``("collected_carried", name)``, ``"collected_row_id"``, and each carried value once more beside the sites, ``("collected",
    name)``.

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
        carried = [("collected", str(name)) for name in also]
        beside = [key for key in carried if key not in writes and not isinstance(out_keys, list)]
        super().__init__(in_keys=in_keys, out_keys=out_keys, reads=reads, writes=[*writes, *beside])
        self._beside = [len(reads) - 1 - len(carried) + carried.index(key) for key in beside]
        self.limit = limit
        self.declare(ids=torch.int64, **{f"rows_{i}": None for i in range(len(reads) - 1)})
        self.add_vocabulary()

    def kept(self, *inputs: Any) -> dict[str, Tensor]:
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

    def rows(self) -> dict[str, Tensor]:
        """The rows kept so far, as views of the state."""
        return {name: value for name, value in super().rows().items() if name != "vocabulary"}

    def combine(self, other: Any) -> None:
        """Append another's rows."""
        theirs = self.agree_with(other)
        self.append({name: theirs[name][: other.held] for name in self.rows()})

    def result(self) -> list[Any]:
        """The rows in the order of their ids."""
        ids, *rows = self.with_words(self.rows()).values()
        ids, order = torch.sort(ids, stable=True)
        ordered = [value[order] for value in rows]
        return [*ordered, ids, *(ordered[place] for place in self._beside)]
