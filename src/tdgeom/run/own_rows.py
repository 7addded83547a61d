"""The rows of one rank's batch, by what of it counts by itself: its sequences, its rows, or the batch as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.core.row_ids import POSITION_BITS

__all__ = ["OwnRows", "Units", "first_of_each"]


@dataclass(frozen=True)
class Units:
    """What of a batch counts by itself: sequences, or rows (``by_row``), by their ids; without ids the batch as a whole.

    ``order``: where they stand in the order of the whole; ``again``: which of them a sampler has repeated.
    """

    ids: Sequence[int] = ()
    order: Sequence[int] = ()
    by_row: bool = False
    again: np.ndarray | None = None

    def of_rows(self, row_ids: np.ndarray) -> np.ndarray:
        """The number of each row's unit.

        >>> Units([5, 3]).of_rows(np.array([3 << 20, 5 << 20, (5 << 20) + 1])).tolist()
        [1, 0, 0]
        """
        ids = np.asarray(self.ids, dtype=np.int64)
        if self.by_row and len(row_ids) == len(ids):
            return np.arange(len(ids))
        wanted = row_ids if self.by_row else row_ids >> POSITION_BITS
        sorting = np.argsort(ids, kind="stable")
        at = np.searchsorted(ids[sorting], wanted).clip(max=max(len(ids) - 1, 0))
        unit = sorting[at] if len(ids) else at
        if len(wanted) and (not len(ids) or bool((ids[unit] != wanted).any())):
            raise ValueError(
                f"run: each rank has a part of the data, whose rows are told apart by their sequence, but row ids "
                f"{row_ids[:3].tolist()} belong to none of the batch's sequences {ids[:3].tolist()}. A row id is sequence_id << "
                f"{POSITION_BITS} | position (SelectTokens writes it)."
            )
        return unit


@dataclass
class OwnRows:
    """Rows by selection and key; the unit of each row of the main selection, how many rows each unit has, and of the batch
    that they are from the attended positions and those of padding."""

    rows: dict[Key, dict[Key, Any]]
    unit: np.ndarray
    counts: np.ndarray
    read: tuple[int, int]

    def kept(self, main: Key, keep: np.ndarray) -> OwnRows:
        """The rows where ``keep`` is true."""
        if keep.all():
            return self
        chosen = torch.from_numpy(keep)
        rows = {
            key: value[chosen.to(value.device)] if isinstance(value, Tensor) else value[chosen]
            for key, value in self.rows[main].items()
        }
        unit = self.unit[keep]
        counts = np.bincount(unit, minlength=len(self.counts))
        return OwnRows({**self.rows, main: rows}, unit, counts, self.read)

    def cut(self, main: Key, allowed: np.ndarray) -> OwnRows:
        """The first ``allowed`` rows of each unit."""
        if (allowed >= self.counts).all():
            return self
        sorting = np.argsort(self.unit, kind="stable")
        within = np.empty_like(self.unit)
        starts = np.cumsum(self.counts) - self.counts
        within[sorting] = np.arange(len(self.unit)) - starts[self.unit[sorting]]
        return self.kept(main, within < allowed[self.unit])


def first_of_each(row_ids: np.ndarray) -> np.ndarray:
    """Whether each row is the first of its id.

    >>> first_of_each(np.array([4, 7, 4])).tolist()
    [True, True, False]
    """
    first = np.zeros(len(row_ids), dtype=bool)
    first[np.unique(row_ids, return_index=True)[1]] = True
    return first
