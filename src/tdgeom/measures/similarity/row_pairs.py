"""All pairs of rows in float64, block by block: what is measured on N x N numbers without holding them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tdgeom.numerics.copies import first_copies

__all__ = ["MEMORY", "Block", "PairSums", "RowPairs", "blocks", "pair_sums", "sampled_pairs"]

MEMORY = 2 * 2**30  # bytes, where the caller names none
_BLOCK = 1024  # rows: a block of float64 stays near the cache while it is worked on
_NEAR = 1e-2  # of the squared lengths: nearer than that, a difference of products loses digits that ties need
_AT_ONCE = 2**22  # numbers

Block = Callable[[slice, slice], Tensor]


class RowPairs:
    """Squared distances among the rows (N, D) of one data set.

    Args:
        rows: float64, about a common centre (of unit length, for what is a function of the angle).
        given: the same rows with all their digits, from which near pairs are taken again as sums of squared differences:
            each is then right to 1e-13 of itself, so that equal ones are known. Without it to 1e-15 of the rows' lengths.
        undefined: (N,) rows whose distances are NaN.

    Exact copies are at distance 0.
    """

    def __init__(self, rows: Tensor, given: Tensor | None = None, undefined: Tensor | None = None) -> None:
        self.rows, self.given = rows, given
        self.undefined = undefined if undefined is not None and bool(undefined.any()) else None
        self.norm2 = torch.linalg.vector_norm(rows, dim=-1).square()
        first = first_copies(rows)
        own = torch.arange(len(rows), device=rows.device)
        self.group = first if bool((first != own).any()) else None

    def __len__(self) -> int:
        return len(self.rows)

    def squares(self, i: slice, j: slice) -> Tensor:
        """(I, J), a tensor of the caller's own."""
        lengths = self.norm2[i, None] + self.norm2[None, j]
        block = torch.addmm(lengths, self.rows[i], self.rows[j].mT, alpha=-2).clamp_(min=0)
        if self.given is not None:
            at = (block < lengths.mul_(_NEAR)).nonzero(as_tuple=True)
            if len(at[0]):
                block[at] = self.between(at[0] + i.start, at[1] + j.start)
        if self.group is not None:
            block.masked_fill_(self.group[i, None] == self.group[None, j], 0)
        elif i.start == j.start:
            block.diagonal().zero_()
        if self.undefined is not None:
            block.masked_fill_(self.undefined[i, None] | self.undefined[None, j], torch.nan)
        return block

    def between(self, i: Tensor, j: Tensor) -> Tensor:
        """(M,) of the pairs (i, j), as sums of squared differences."""
        rows = self.rows if self.given is None else self.given
        step = max(1, _AT_ONCE // rows.shape[-1])
        parts = [(rows[a] - rows[b]).square_().sum(-1) for a, b in zip(i.split(step), j.split(step))]
        found = torch.cat(parts) if parts else rows.new_zeros(0)
        if self.undefined is not None:
            found.masked_fill_(self.undefined[i] | self.undefined[j], torch.nan)
        return found

    def condensed(self) -> Tensor:
        """(N(N-1)/2,), pair by pair in the order (0, 1), (0, 2), ..."""
        n = len(self)
        found = self.rows.new_empty(n * (n - 1) // 2)
        end = 0
        step = max(1, min(_BLOCK, _AT_ONCE // n))
        for s in range(0, n - 1, step):
            block = self.squares(slice(s, min(s + step, n)), slice(s, n))
            above = torch.ones_like(block, dtype=torch.bool).triu_(1)
            part = block[above]
            found[end : end + len(part)] = part
            end += len(part)
        return found


def blocks(n: int) -> Iterator[tuple[slice, slice]]:
    """The blocks on and above the diagonal."""
    parts = [slice(s, min(s + _BLOCK, n)) for s in range(0, n, _BLOCK)]
    for p, i in enumerate(parts):
        for j in parts[p:]:
            yield i, j


class PairSums(NamedTuple):
    """Sums over all (i, j) of two symmetric matrices less a constant each (their first blocks' means)."""

    ab: Tensor
    aa: Tensor
    bb: Tensor
    rows_a: Tensor  # (N,) sums of rows
    rows_b: Tensor
    shift_a: Tensor
    shift_b: Tensor

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """<HAH, HBH>, <HAH, HAH> and <HBH, HBH>."""
        n, a, b = len(self.rows_a), self.rows_a, self.rows_b
        ab, aa, bb = (
            whole - 2 / n * (p @ q) + p.sum() * q.sum() / n**2
            for whole, p, q in ((self.ab, a, b), (self.aa, a, a), (self.bb, b, b))
        )
        return ab, aa, bb


def pair_sums(a: Block, b: Block, n: int, *, diagonal: bool = True) -> PairSums:
    """One pass over the blocks of two symmetric N x N matrices, the diagonal counted or not."""
    shifts: list[Tensor] = []
    sums: list[Tensor] = []
    rows: list[Tensor] = []
    for i, j in blocks(n):
        k, m = a(i, j), b(i, j)
        if not shifts:
            shifts = [block.mean() for block in (k, m)]
            sums, rows = [k.new_zeros(()) for _ in range(3)], [k.new_zeros(n) for _ in range(2)]
        own = i.start == j.start
        for block, shift, row in ((k, shifts[0], rows[0]), (m, shifts[1], rows[1])):
            block.sub_(shift)
            if own and not diagonal:
                block.diagonal().zero_()
            row[i] += block.sum(1)
            if not own:
                row[j] += block.sum(0)
        p, q = k.reshape(-1), m.reshape(-1)
        for total, product in zip(sums, (p @ q, p @ p, q @ q)):
            total += product if own else 2 * product
    return PairSums(*sums, *rows, *shifts)


def sampled_pairs(n: int, count: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``count`` different pairs i < j of n rows, every pair alike likely; all of them where there are no more."""
    if count >= n * (n - 1) // 2:
        i, j = torch.triu_indices(n, n, 1, device=device)
        return i, j
    generator = torch.Generator().manual_seed(seed)
    codes = torch.zeros(0, dtype=torch.int64)
    while len(codes) < count:
        i = torch.randint(n, (2 * count,), generator=generator, device="cpu")
        j = torch.randint(n - 1, (2 * count,), generator=generator, device="cpu")
        j += j >= i
        codes = torch.cat((codes, torch.minimum(i, j) * n + torch.maximum(i, j))).unique()
    chosen = codes[torch.randperm(len(codes), generator=generator, device="cpu")[:count]].to(device)
    return chosen // n, chosen % n
