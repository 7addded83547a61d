"""Blocks of rows, looked at for NaN and Inf across all sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.core.row_ids import POSITION_BITS
from tdgeom.core.streaming_stage import rows_finite
from tdgeom.numerics.on_host import on_host, read_together

__all__ = ["FiniteRows"]

Block = dict[Key, Any]


class _Late(NamedTuple):
    """A block that was handed on before anybody had looked whether its sums are finite."""

    finite: list[Tensor]  # () a device
    ids: Key
    block: Block
    origin: Sequence[int]


class FiniteRows:
    """Rows that are finite at every site, and an error or a count for the others.

    What a device's rows are is read when the next batch is, together with it (``flags``, ``settle``): asking at once would make
    the host wait for every block. ``drop``: leave such rows out, which asks at once.
    """

    def __init__(self, drop: bool) -> None:
        self.drop = drop
        self._late: list[_Late] = []

    @property
    def flags(self) -> list[Tensor]:
        """What ``settle`` reads, for whoever reads several things at once."""
        return [flag for late in self._late for flag in late.finite]

    def settle(self) -> None:
        """Look at the blocks that were handed on; an error names the first row that is not finite."""
        late, self._late = self._late, []
        read_together(flag for one in late for flag in one.finite)
        for one in late:
            if not _all(one.finite):
                self._good(one.ids, one.block, one.origin)

    def of(self, ids: Key, block: Block, origin: Sequence[int]) -> tuple[Block, int]:
        """(the block's rows that are finite at every site, how many were left out); ``origin`` is each row's batch."""
        finite = _sums_finite(block)
        if not self.drop and any(flag.device.type != "cpu" for flag in finite):
            self._late.append(_Late(finite, ids, block, origin))
            return block, 0
        if _all(finite):
            return block, 0
        good = self._good(ids, block, origin)
        left = int(good.sum())
        if left == len(good):  # the sum of finite numbers is not always one
            return block, 0
        return {key: value[good.to(value.device)] for key, value in block.items()}, len(good) - left

    def _good(self, ids: Key, block: Block, origin: Sequence[int]) -> Tensor:
        row_id = block[ids]
        good = torch.ones(row_id.shape[0], dtype=torch.bool, device=row_id.device)
        for key, value in block.items():
            finite = rows_finite(value).to(good.device)
            if not self.drop and not bool(finite.all()):
                bad = int((~finite).nonzero()[0])
                where = int(row_id[bad])
                raise ValueError(
                    f"{key!r} holds NaN or Inf in {int((~finite).sum())} of {len(finite)} rows, first in batch {origin[bad]} "
                    f"(row id {where}: sequence {where >> POSITION_BITS}, position {where & ((1 << POSITION_BITS) - 1)}). "
                    f"Half precision that overflows is the usual cause; nonfinite='drop' (of run, analyze_model and compare; "
                    f"--nonfinite drop) leaves such rows out at all sites and counts them."
                )
            good &= finite
        return good


def _sums_finite(block: Mapping[Key, Any]) -> list[Tensor]:
    """For each device, whether the sums of all its rows' values are finite, (): one cheap pass."""
    found: dict[torch.device, list[Tensor]] = {}
    for value in block.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            found.setdefault(value.device, []).append(torch.isfinite(value.sum(dtype=torch.float32)))
    return [torch.stack(flags).all() for flags in found.values()]


def _all(flags: Sequence[Tensor]) -> bool:
    return all(bool(on_host(flag)) for flag in flags)
