"""Columns of a grid of patches: which positions of each example one cell takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdgeom.model.positions import Positions, check_positions, position_groups, position_mask


@dataclass(frozen=True)
class Columns:
    """``masks`` (C, B, T), true at the positions of each column; what columns are called; ``ranks`` (C, B), -1 where none."""

    masks: Tensor
    labels: list[int]
    ranks: Tensor


def position_columns(
    mask: Tensor,
    positions: Any,
    *,
    input_ids: Tensor | None = None,
    special: Tensor | None = None,
    image: Any = None,
) -> Columns:
    """A column for each position that is meant, counted over the attended tokens of a mask (B, T).

    A list of numbers has a column each, in its order; other words of the vocabulary one for the first, second, ... of the
    positions that they mean in an example. A list or mapping of several positions has a column for each of them, patched
    together. Columns are called by their position where all examples agree, else by the number that was given, or 0, 1, ...

    Raises ``ValueError`` for positions that no example has.

    >>> mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    >>> found = position_columns(mask, [0, -1])
    >>> found.labels, found.ranks.tolist()
    ([0, -1], [[0, 0], [2, 1]])
    """
    told: dict[str, Any] = {"input_ids": input_ids, "special": special, "image": image}
    groups = position_groups(positions)
    numbers = _listed(positions)
    parts: list[Positions] = list(groups) if groups is not None else list(numbers or ())
    if parts:
        masks = torch.stack([position_mask(mask, one, **told)[0] for one in parts])
        for one, own in zip(parts, masks):
            _refuse_none(own, one, mask)
    else:
        keep, _ = position_mask(mask, check_positions(positions), **told)
        _refuse_none(keep, positions, mask)
        order = keep.cumsum(1) - 1
        most = int(keep.sum(1).max())
        masks = keep & (order == torch.arange(most, device=mask.device)[:, None, None])
    rank = mask.bool().cumsum(1) - 1
    ranks = torch.where(masks, rank, -1).amax(-1)
    if groups is not None:
        return Columns(masks, list(range(len(masks))), torch.where(masks.sum(-1) == 1, ranks, -1))
    alike = [set(row) - {-1} for row in ranks.tolist()]
    if all(len(row) == 1 for row in alike):
        return Columns(masks, [row.pop() for row in alike], ranks)
    return Columns(masks, numbers or list(range(len(masks))), ranks)


def _listed(positions: Any) -> list[int] | None:
    if isinstance(positions, int) and not isinstance(positions, bool):
        return [positions]
    numbers = isinstance(positions, list | tuple | range) and all(type(one) is int for one in positions)
    return list(positions) if numbers and len(positions) else None


def _refuse_none(keep: Tensor, positions: Any, mask: Tensor) -> None:
    if not bool(keep.any()):
        raise ValueError(
            f"activation patching: no example has the positions {positions!r}; their lengths are {mask.sum(1).tolist()[:12]}. "
            "Positions are counted over attended tokens of the run that is patched."
        )
