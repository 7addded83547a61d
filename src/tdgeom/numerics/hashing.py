"""Pseudo-random numbers that depend on an id and a seed alone."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["EMPTY", "hash_ids"]

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


def _mix(x: Tensor) -> Tensor:
    # Multipliers of splitmix64 as signed 64-bit numbers; int64 products wrap, shifts are made logical by the mask.
    x = x - 7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
