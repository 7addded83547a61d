"""``RowSample``: a uniform sample of the whole stream, the same rows at every site."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.numerics.hashing import hash_ids
from tdgeom.stream import reservoir
from tdgeom.stream.held_rows import HoldsWords, named_rows, row_keys

__all__ = ["RowSample"]


class RowSample(HoldsWords):
    """A uniform sample without replacement of all rows of the stream: those with the smallest hash of (seed, row id).

    Membership depends on a row's id alone, so the sample is the same for every batch split, order and number of shards,
    and holds the same rows at every site. Rows come in hash order: every prefix is itself a uniform sample. Memory
    ``size`` rows a site, in the rows' own dtype.

    Args:
        sites: the sites to sample, such as ``capture.sites``; None for one unnamed site (``"tokens"``).
        size: rows kept (all rows while fewer have been seen).
        seed: another seed, another sample.
        also: names carried by ``SelectTokens(also=...)`` that the sample keeps beside the sites: numbers, or words (text, None,
            lists), which come back as a list.

    Reads ``("tokens", site)``, ``("carried", name)`` and ``"row_id"`` (int64, unique in the stream); writes
    ``("sample", site)``, ``("sample_carried", name)`` and ``"sample_row_id"``.

    Raises:
        ValueError: a row id that came twice, inputs that are not the same rows, or a width that changed.

        >>> import torch, tdgeom as tg
        >>> rows = torch.arange(10.0)[:, None]
        >>> sample, row_id = tg.RowSample(size=3)(tokens=rows, row_id=torch.arange(10))
        >>> bool((sample[:, 0] == row_id).all()), len(row_id)
        (True, 3)
    """

    takes_complex = True  # rows are held as they come

    def __init__(
        self,
        sites: Iterable[Any] | None = None,
        *,
        size: int = 4096,
        seed: int = 0,
        also: Sequence[str] = (),
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"RowSample: size must be at least 1, got {size}.")
        reads, writes = row_keys("RowSample", "sample", sites, also)
        super().__init__(in_keys=in_keys, out_keys=out_keys, reads=reads, writes=writes)
        self.size = size
        self.seed = seed
        self.add_state("ids", torch.int64)
        for number in range(len(reads) - 1):
            self.add_state(f"rows_{number}", None)
        self.add_state("hashes", torch.int64)
        self.add_vocabulary()

    @property
    def _slots(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state().items() if name != "vocabulary"}

    def start(self, *inputs: Any) -> dict[str, Tensor]:
        """Empty slots."""
        return reservoir.empty_slots(self.size, named_rows(self, inputs))

    def accumulate(self, *inputs: Any) -> None:
        """Let each new row with a small enough hash take the slot of the row with the largest."""
        rows = named_rows(self, inputs)
        reservoir.offer(self._slots, {**rows, "hashes": hash_ids(rows["ids"], self.seed)})
        self.forget_words(self._slots)

    def combine(self, other: RowSample) -> None:
        """Offer the other's rows to the own slots."""
        theirs = self.agree_with(other)
        reservoir.offer(self._slots, theirs)

    def result(self) -> list[Any]:
        """The sample in hash order."""
        held = reservoir.in_hash_order(self._slots, "RowSample")
        ids, *rows, _ = self.with_words(held).values()
        return [*rows, ids]
