"""Pseudo-random numbers that depend on an id and a seed alone, and the fingerprint of a block of rows."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["EMPTY", "fingerprint", "hash_ids"]

EMPTY = torch.iinfo(torch.int64).max  # above every hash but one: the mark of a slot without a row


def hash_ids(row_id: Tensor, seed: int) -> Tensor:
    """A pseudo-random int64 >= 0 for each id, from (id, seed) alone: int64 (N,) -> int64 (N,).

    The finaliser of splitmix64 with its top bit dropped (Steele, Lea and Flood 2014, Fast splittable pseudorandom
    number generators).

    >>> hash_ids(torch.tensor([0, 1]), 0).tolist() == hash_ids(torch.tensor([1, 0]), 0).flip(0).tolist()
    True
    """
    x = row_id ^ _mix(torch.full((), seed, dtype=torch.int64, device=row_id.device))
    return _mix(x) & EMPTY


def fingerprint(rows: Tensor, kept: Tensor | None = None) -> Tensor:
    """An int64 for each block of rows, (*B, N, D) -> (*B,), that a block which differs anywhere has by chance only.

    Of the bits, and in whole numbers: the same for the same rows, whatever device or number of threads sums them. ``kept``
    (*B, N) leaves out the other rows of each block, as if they were not there.

    >>> rows = torch.arange(6.0).reshape(3, 2)
    >>> bool(fingerprint(rows) == fingerprint(rows.clone())), bool(fingerprint(rows) == fingerprint(rows.flip(0)))
    (True, False)
    """
    n, width = rows.shape[-2:]
    ids = torch.arange(max(n, width), dtype=torch.int64, device=rows.device)
    bits = rows.detach().view(_WHOLE[rows.element_size()])
    bits = bits.to(torch.int32) if rows.element_size() < 4 else bits
    weights = (
        hash_ids(ids[:width], 0).to(torch.int32) | 1
    )  # odd: no bit of a value is lost in the product, which wraps
    codes = (bits * weights).sum(-1, dtype=torch.int64)
    if kept is None:
        return _mix(codes ^ hash_ids(ids[:n], 1)).sum(-1)
    places = hash_ids((kept.cumsum(-1) - 1).clamp(min=0), 1)
    return torch.where(kept, _mix(codes ^ places), 0).sum(-1)


_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _mix(x: Tensor) -> Tensor:
    # Multipliers of splitmix64 as signed 64-bit numbers; int64 products wrap, shifts are made logical by the mask.
    x = x - 7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
