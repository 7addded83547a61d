"""A bounded uniform sample of rows in a stage's buffers: the rows with the smallest hashes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tdgeom.numerics.hashing import EMPTY

__all__: list[str] = []


def blank(size: int, rows: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Empty slots for rows like these, by buffer name, and their hashes."""
    home = next(iter(rows.values())).device
    state = {
        prefix + name: torch.zeros((size, *value.shape[1:]), dtype=value.dtype, device=home)
        for name, value in rows.items()
    }
    return {**state, prefix + "hash": torch.full((size,), EMPTY, dtype=torch.int64, device=home)}


def insert(state: Mapping[str, Tensor], prefix: str, rows: Mapping[str, Tensor], hashes: Tensor) -> None:
    """Offer rows to the slots in place; those with the smallest hashes stay. Rows already held (same hash) do not count twice."""
    own = state[prefix + "hash"]
    candidates = ((hashes < own.max()) & ~torch.isin(hashes, own)).nonzero().flatten()
    if not len(candidates):
        return
    order = candidates[torch.argsort(hashes[candidates])][: own.shape[0]]
    # The i-th smallest newcomer against the i-th largest held: the exchange ends where it would make things worse.
    slots = torch.argsort(own, descending=True)[: len(order)]
    better = hashes[order] < own[slots]
    order, slots = order[better], slots[better]
    for name, value in rows.items():
        state[prefix + name][slots] = value[order].to(state[prefix + name].dtype)
    own[slots] = hashes[order]


def held(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The rows in hash order (every prefix a uniform sample), by name without the prefix."""
    hashes, order = torch.sort(state[prefix + "hash"])
    order = order[: int((hashes < EMPTY).sum())]
    return {
        name.removeprefix(prefix): value[order] for name, value in state.items() if name.startswith(prefix)
    }
