"""``RowSample``: a uniform sample of the whole stream, the same rows at every site."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.numerics.hashing import hash_ids
from tdgeom.stream import reservoir
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
        super().__init__("sample", sites, also, in_keys=in_keys, out_keys=out_keys)
        self.size = size
        self.seed = seed
        self.add_state("hashes", torch.int64)

    def start(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Empty slots."""
        *rows, row_id = inputs
        return reservoir.empty_slots(self.size, {"ids": row_id.long(), **dict(zip(self.held, rows))})

    def accumulate(self, *inputs: Tensor) -> None:
        """Let each new row with a small enough hash take the slot of the row with the largest."""
        *rows, row_id = inputs
        self.check_rows(rows, row_id)
        ids = row_id.long()
        new = {"ids": ids, "hashes": hash_ids(ids, self.seed), **dict(zip(self.held, rows))}
        reservoir.offer(self.state(), new)

    def combine(self, other: RowSample) -> None:
        """Offer the other's rows to the own slots."""
        reservoir.offer(self.state(), {name: value.to(self.home) for name, value in other.state().items()})

    def result(self) -> list[Tensor]:
        """The sample in hash order."""
        held = reservoir.in_hash_order(self.state(), type(self).__name__)
        return [held[name] for name in (*self.held, "ids")]
