"""Copies among rows, exact or up to rounding: found without comparing all pairs, brought back into a table afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from tdgeom.numerics.centring import warn_undefined
from tdgeom.numerics.near_copies import near_copies
from tdgeom.numerics.opaque import opaque

__all__ = [
    "SAME",
    "all_alike",
    "expand_table",
    "first_alike",
    "first_copies",
    "standing",
    "undefined_where_alike",
]

SAME = 1 + 1e-12  # distances whose quotient lies below it are equal


def all_alike(x: Tensor) -> Tensor:
    """(*B,): whether every row of (*B, N, D) equals the first. Such rows have neighbours by their order alone."""
    return (x == x[..., :1, :]).all(-1).all(-1)


def undefined_where_alike(value: Tensor, alike: Tensor, measure: str) -> Tensor:
    """NaN, with a warning, where rows are all alike."""
    value = torch.where(alike, torch.nan, value)
    return warn_undefined(value, measure, "the rows of one side are all alike.")


@opaque(lambda x: x.new_empty(x.shape[:-1], dtype=torch.int64))
def first_copies(x: Tensor) -> Tensor:
    """(*B, N): for every row of ``x`` (*B, N, D) the smallest index of a row equal to it. -0.0 equals 0.0."""
    own = torch.arange(x.shape[-2], device=x.device).expand(x.shape[:-1])
    first = own.clone()
    code, order = _codes(x).sort(dim=-1, stable=True)
    repeats = code[..., 1:] == code[..., :-1]
    if not bool(repeats.any()):
        return first
    # Equal codes stand together, smallest index first: each takes the index at which its run of codes began.
    begins = torch.cat((torch.ones_like(repeats[..., :1]), ~repeats), -1)
    start = torch.where(begins, own, 0).cummax(-1).values
    first.scatter_(-1, order, order.gather(-1, start))
    *item, row = (first != own).nonzero(as_tuple=True)
    copy = (*item, row)
    original = (*item, first[copy])
    if not bool((x[copy] == x[original]).all()):  # two rows of one code that differ
        flat = x.reshape(-1, *x.shape[-2:])
        return torch.stack([_first_copies_by_sorting(rows) for rows in flat]).view(first.shape)
    return first


def _codes(x: Tensor) -> Tensor:
    """A 64-bit code of every row, equal for equal rows: a random linear form of the bits, modulo 2^64."""
    n, width = x.shape[-2:]
    generator = torch.Generator().manual_seed(1)
    weights = (
        torch.randint(-(2**62), 2**62, (width,), generator=generator, device="cpu")
        .mul_(2)
        .add_(1)
        .to(x.device)
    )
    codes = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    step = max(1, 2**20 * n // max(1, x.numel()))
    for s in range(0, n, step):
        bits = (x[..., s : s + step, :] + 0.0).contiguous()  # + 0.0 makes -0.0 positive
        bits = bits.view(torch.int64) if x.dtype == torch.float64 else bits.view(torch.int32).to(torch.int64)
        # Two flipped sign bits of 2^63 would cancel: spread the upper bits downwards first.
        codes[..., s : s + step] = (bits.bitwise_xor(bits >> 29) * weights).sum(-1)
    return codes


def _first_copies_by_sorting(rows: Tensor) -> Tensor:
    groups, inverse = torch.unique(rows + 0.0, dim=0, return_inverse=True)
    own = torch.arange(len(rows), device=rows.device)
    first = own.new_full((len(groups),), len(rows)).scatter_reduce(0, inverse, own, "amin")
    return first[inverse]


@opaque(lambda x, radius: x.new_empty(x.shape[:-1], dtype=torch.int64))
def first_alike(x: Tensor, radius: float) -> Tensor:
    """As ``first_copies``, with copies up to rounding: (*B, N) the rows that stand for each, see ``near_copies``."""
    flat = x.reshape(-1, *x.shape[-2:])
    return standing(flat, first_copies(flat), radius).view(x.shape[:-1])


def standing(x: Tensor, first: Tensor, radius: float) -> Tensor:
    """(b, n): the rows of ``x`` (b, n, D) that stand for each, from those that do among exact copies."""
    found, own = first.clone(), torch.arange(x.shape[-2], device=x.device)
    for item, rows in enumerate(x if radius else ()):
        kept = (first[item] == own).nonzero().flatten()
        place = torch.empty_like(own)
        place[kept] = kept[near_copies(rows if len(kept) == len(own) else rows[kept], radius)]
        found[item] = place[first[item]]
    return found


def expand_table(
    first: Tensor, distance: Tensor, index: Tensor, tied: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The table over all N rows from the table over distinct rows.

    ``first`` (N,) from ``first_copies``; ``distance``, ``index`` (n, min(k, n-1)) over the distinct rows in
    the order of their first occurrence, and ``tied`` (n,), whether another lies at the last distance. Each neighbour stands
    for all its copies, and a row's own copies come first, at distance 0. Returns (N, k) distances and row indices, self
    excluded by index, and (N,) whether another row lies at the last distance.
    """
    n_rows = len(first)
    distinct, group = first.unique(return_inverse=True)
    size = torch.bincount(group)
    members = group.argsort(stable=True)  # rows group by group, ascending within a group
    offset = size.cumsum(0) - size
    own = torch.arange(len(distinct), device=first.device).unsqueeze(-1)
    groups = torch.cat((own, index), -1)
    apart = torch.cat((distance.new_zeros(len(distinct), 1), distance), -1)
    # The t-th entry, t = 0..k+1 (self is among them, and one more tells of ties), lies in the group whose running size
    # passes t.
    running = size[groups].cumsum(-1)
    t = torch.arange(k + 2, device=first.device).expand(len(distinct), -1).contiguous()
    slot = torch.searchsorted(running, t, right=True).clamp(max=groups.shape[-1] - 1)
    inside = t - running.gather(-1, slot) + size[groups].gather(-1, slot)
    there = t < running[:, -1:]
    entry = members[torch.where(there, offset[groups.gather(-1, slot)] + inside, 0)]
    far = torch.where(there, apart.gather(-1, slot), torch.inf)
    entry, far = entry[group], far[group]
    is_self = entry == torch.arange(n_rows, device=first.device).unsqueeze(-1)
    keep = (is_self & there[group]).to(torch.int8).argsort(dim=-1, stable=True)[:, : k + 1]
    far, entry = far.gather(-1, keep), entry.gather(-1, keep)
    beyond = torch.where(torch.isfinite(far[:, k]), far[:, k] <= SAME * far[:, k - 1], tied[group])
    return far[:, :k], entry[:, :k], beyond
