"""``RowSample``: a uniform sample of the whole stream, the same rows at every site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.numerics.hashing import EMPTY, hash_ids
from tdgeom.stream.held_rows import RowsStage

__all__ = ["RowSample"]


class RowSample(RowsStage):
    """A uniform sample without replacement of all rows of the stream: those with the smallest hash of (seed, row id).

    Membership depends on a row's id alone, so the sample is the same for every batch split, order and number of shards,
    and holds the same rows at every site. Rows come in hash order: every prefix is itself a uniform sample. Memory
    ``size`` rows a site, in the rows' own dtype.

    Args:
        sites: the sites to sample, such as ``capture.sites``; None for one unnamed site (``"tokens"``).
        size: rows kept (all rows while fewer have been seen).
        seed: another seed, another sample.
        also: names carried by ``SelectTokens(also=...)`` that the sample keeps beside the sites.

    Reads ``("tokens", site)``, ``("tokens", name)`` and ``"row_id"`` (int64, unique in the stream); writes
    ``("sample", site)``, ``("sample", name)`` and ``"sample_row_id"``.

    Raises:
        ValueError: a row id that came twice, inputs that are not the same rows, or a width that changed.

        >>> import torch, tdgeom as tg
        >>> rows = torch.arange(10.0)[:, None]
        >>> sample, row_id = tg.RowSample(size=3)(tokens=rows, row_id=torch.arange(10))
        >>> bool((sample[:, 0] == row_id).all()), len(row_id)
        (True, 3)
    """

    def __init__(
        self,
        sites: Sequence[str] | None = None,
        *,
        size: int = 4096,
        seed: int = 0,
        also: Sequence[str] = (),
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"RowSample: size must be at least 1, got {size}.")
        super().__init__("sample", sites, also, in_keys=in_keys, out_keys=out_keys)
        self.size = size
        self.seed = seed
        self.add_state("hashes", torch.int64)

    def settings(self) -> dict[str, Any]:
        """Samples merge only under one size and seed, and for the same sites."""
        return {"size": self.size, "seed": self.seed, **super().settings()}

    def start(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Empty slots, and one more that takes the rows not chosen (so that shapes never depend on the data)."""
        state = self.blank(inputs[:-1], self.size + 1)
        return {
            **state,
            "hashes": torch.full((self.size + 1,), EMPTY, dtype=torch.int64, device=inputs[0].device),
        }

    def accumulate(self, *inputs: Tensor) -> None:
        """Let each new row with a small enough hash take the slot of the row with the largest."""
        *rows, row_id = inputs
        self.check_rows(rows, row_id)
        self._insert(rows, row_id, hash_ids(row_id.long(), self.seed))

    def combine(self, other: RowSample) -> None:
        """Offer the other's rows to the own slots."""
        home = self.hashes.device
        filled = other.hashes < EMPTY
        rows = [other._buffers[name][filled].to(home) for name in self.held]
        self._insert(rows, other.ids[filled].to(home), other.hashes[filled].to(home))

    def _insert(self, rows: Sequence[Tensor], row_id: Tensor, hashes: Tensor) -> None:
        own = self.hashes[:-1]
        limit = torch.kthvalue(torch.cat((own, hashes)), self.size).values
        chosen = hashes <= limit
        # Only as many as there are slots can be chosen; hashes of different ids differ but for the limit's own ties.
        chosen = chosen & (chosen.cumsum(0) <= self.size)
        worst_first = torch.argsort(own, descending=True, stable=True)
        slot = worst_first[(chosen.cumsum(0) - 1).clamp(min=0)]
        slot = torch.where(chosen, slot, torch.full_like(slot, self.size))
        self.hashes.index_copy_(0, slot, hashes)
        self.ids.index_copy_(0, slot, row_id.long())
        for name, value in zip(self.held, rows):
            self._buffers[name].index_copy_(0, slot, value.to(self._buffers[name].dtype))
        self.hashes[-1] = EMPTY

    def result(self) -> Mapping[str, Tensor]:
        """The sample in hash order."""
        hashes, order = torch.sort(self.hashes[:-1], stable=True)
        order = order[: int((hashes < EMPTY).sum())]
        ids = self.ids[order]
        if bool((hashes[: len(order) - 1] == hashes[1 : len(order)]).any()):
            twice = ids[:-1][hashes[: len(order) - 1] == hashes[1 : len(order)]][0]
            raise ValueError(
                f"RowSample saw row id {int(twice)} more than once: a stream with repeated ids has no uniform sample. Give "
                f"each batch its own 'sequence_id', or reset() before reading the same data again."
            )
        outputs = {name: self._buffers[held][order] for name, held in zip(self._names, self.held)}
        return {**outputs, self._names[-1]: ids}
