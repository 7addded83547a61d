"""A bounded uniform sample of rows, in slots: those with the smallest hashes. Shapes never depend on the data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tdgeom.numerics.hashing import EMPTY

__all__: list[str] = []


def empty_slots(size: int, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Slots for ``size`` rows like these and their ``hashes``, by name, and one more that takes the rows not chosen."""
    home = next(iter(rows.values())).device
    slots = {
        name: torch.zeros((size + 1, *value.shape[1:]), dtype=value.dtype, device=home)
        for name, value in rows.items()
    }
    return {**slots, "hashes": torch.full((size + 1,), EMPTY, dtype=torch.int64, device=home)}


def offer(slots: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> None:
    """Let each row with a small enough hash take the slot of the row with the largest, in place; ``EMPTY`` marks no row."""
    own, hashes = slots["hashes"][:-1], rows["hashes"]
    size = own.shape[0]
    limit = torch.kthvalue(torch.cat((own, hashes)), size).values
    chosen = (hashes <= limit) & (hashes < EMPTY)
    # Only as many as there are slots can be chosen; hashes of different ids differ but for the limit's own ties.
    chosen = chosen & (chosen.cumsum(0) <= size)
    worst_first = torch.argsort(own, descending=True, stable=True)
    slot = worst_first[(chosen.cumsum(0) - 1).clamp(min=0)]
    slot = torch.where(chosen, slot, torch.full_like(slot, size))
    for name, held in slots.items():
        held.index_copy_(0, slot, rows[name].to(held.dtype))
    slots["hashes"][-1] = EMPTY


def in_hash_order(slots: Mapping[str, Tensor], owner: str) -> dict[str, Tensor]:
    """The rows in hash order, so that every prefix is a uniform sample; an id (slot ``ids``) that came twice is refused."""
    hashes, order = torch.sort(slots["hashes"][:-1], stable=True)
    count = int((hashes < EMPTY).sum())
    held = {name: value[order[:count]] for name, value in slots.items()}
    twice = held["hashes"][1:] == held["hashes"][:-1]
    if bool(twice.any()):
        raise ValueError(
            f"{owner} saw row id {int(held['ids'][1:][twice][0])} more than once: a stream with repeated ids has no uniform "
            f"sample. Give each batch its own 'sequence_id', or reset() before reading the same data again."
        )
    return held
