"""The median distance among rows, exact, in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

from tdgeom.measures.similarity.row_pairs import RowPairs, blocks

__all__ = ["middle_distance"]

_SAMPLE = 2048  # rows whose distances say where the median lies
_BINS = 4096


def middle_distance(pairs: RowPairs, memory: int) -> Tensor:
    """The median () of all distances between different rows: of an even number the mean of the middle two.

    Held at once where a quarter of ``memory`` holds them. Beyond, those of a sample of rows bracket it, and a pass over all
    counts what lies below and keeps what lies within.
    """
    n = len(pairs)
    m = n * (n - 1) // 2
    ranks = (m - 1) // 2, m // 2
    room = max(memory // 32, 2**16)
    if m <= room:
        low, high = _at(pairs.condensed(), *ranks)
    else:
        low, high = _within_brackets(pairs, ranks, room)
    return (low.sqrt() + high.sqrt()) / 2


def _at(values: Tensor, first: int, second: int) -> tuple[Tensor, Tensor]:
    """The values at two neighbouring places of the sorted order; ``values`` are put in another order."""
    if values.device.type == "cpu":
        values.numpy().partition((first, second))  # in place, where kthvalue makes two copies
        return values[first], values[second]
    return values.kthvalue(first + 1).values, values.kthvalue(second + 1).values


def _within_brackets(pairs: RowPairs, ranks: tuple[int, int], room: int) -> tuple[Tensor, Tensor]:
    low, high = _bracket(pairs, room)
    least = 1e-15 * float(pairs.norm2.max())
    while True:
        below, kept, values = _inside(pairs, low, high, room)
        if below <= ranks[0] and ranks[1] < below + kept:
            if values is not None:
                return _at(values, ranks[0] - below, ranks[1] - below)
            if high - low <= 1e-15 * high:  # as equal as their rounding lets them be
                middle = pairs.rows.new_tensor((low + high) / 2)
                return middle, middle
            low, high = _narrower(pairs, low, high, below, ranks)
            continue
        width = 4 * max(high - low, 1e-12 * high, least)
        if ranks[0] < below:
            low, high = max(0.0, low - width), (high if ranks[1] >= below else low)
        else:
            low, high = (low if ranks[0] < below + kept else high), high + width


def _bracket(pairs: RowPairs, room: int) -> tuple[float, float]:
    """Squared distances between which the median very likely lies, and a good deal less than ``room`` of all."""
    n = len(pairs)
    some = torch.randperm(n, generator=torch.Generator().manual_seed(0), device="cpu")[: 2 * _SAMPLE]
    half = len(some) // 2
    i, j = some[:half].sort().values.to(pairs.rows.device), some[half : 2 * half].to(pairs.rows.device)
    lengths = pairs.norm2[i, None] + pairs.norm2[None, j]
    values = torch.addmm(lengths, pairs.rows[i], pairs.rows[j].mT, alpha=-2).clamp_(min=0).flatten()
    share = min(0.05, 0.3 * room / (n * (n - 1) / 2))
    places = [round(q * (len(values) - 1)) + 1 for q in (0.5 - share, 0.5 + share)]
    low, high = (float(values.kthvalue(place).values) for place in places)
    return low, high


def _inside(pairs: RowPairs, low: float, high: float, room: int) -> tuple[int, int, Tensor | None]:
    """How many lie below ``low``, how many from there to ``high``, and these, unless they are more than ``room``."""
    below, kept, parts = 0, 0, []
    for i, j in blocks(len(pairs)):
        block = _above(pairs, i, j)
        below += int((block < low).sum())
        part = block[(block >= low) & (block <= high)]
        kept += len(part)
        if kept <= room:
            parts.append(part)
    return below, kept, (torch.cat(parts) if kept <= room else None)


def _above(pairs: RowPairs, i: slice, j: slice) -> Tensor:
    """A block with every pair once: infinite on and below the diagonal."""
    block = pairs.squares(i, j)
    if i.start == j.start:
        block.masked_fill_(torch.ones_like(block, dtype=torch.bool).tril_(), torch.inf)
    return block


def _narrower(
    pairs: RowPairs, low: float, high: float, below: int, ranks: tuple[int, int]
) -> tuple[float, float]:
    counts = torch.zeros(_BINS, dtype=torch.float64, device=pairs.rows.device)
    for i, j in blocks(len(pairs)):
        counts += torch.histc(_above(pairs, i, j), bins=_BINS, min=low, max=high)
    upto = below + counts.cumsum(0)
    first, last = (int((upto <= rank).sum()) for rank in ranks)
    edge = (high - low) / _BINS
    return low + edge * max(0, first - 1e-6), min(high, low + edge * (last + 1 + 1e-6))
