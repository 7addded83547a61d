"""Another run's activations laid out as those of the run to edit: positions matched by rank among attended tokens."""

from __future__ import annotations

import torch
from torch import Tensor

__all__: list[str] = []


def attended(mask: Tensor | None, value: Tensor) -> Tensor:
    """The mask as booleans beside ``value`` (B, T, ...); everything is attended where there is none."""
    if mask is None:
        return torch.ones(value.shape[:2], dtype=torch.bool, device=value.device)
    return mask.bool().to(value.device)


def attended_keys(bias: Tensor, past: int) -> Tensor:
    """Which tokens are attended, (B, past + Tq), from an attention bias (B, 1, Tq, Tk) that allows or forbids keys.

    Those that the newest token sees, and what these see in turn (an attention window hides the first ones from the last).

    >>> bias = torch.tensor([[[[1, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 0]]]]).bool()  # left padding, a cache with room
    >>> attended_keys(bias, 0)
    tensor([[False,  True,  True]])
    """
    allowed = bias if bias.dtype == torch.bool else bias > torch.finfo(bias.dtype).min / 2
    allowed = allowed.any(1)[:, :, : past + bias.shape[2]]
    seen = allowed[:, -1]
    while True:
        more = seen | (allowed & seen[:, past:, None]).any(1)
        if torch.equal(more, seen):
            return seen
        seen = more


def take_ranks(other: Tensor, where: Tensor, rank: Tensor) -> Tensor:
    """The ``rank``-th position of those true in ``where``, sequence by sequence: (B, S, ...), (B, S), (B, T) -> (B, T, ...).

    >>> take_ranks(torch.tensor([[[9.0], [5.0], [6.0]]]), torch.tensor([[False, True, True]]), torch.tensor([[1, 0]]))
    tensor([[[6.],
             [5.]]])
    """
    columns = (~where).long().argsort(dim=1, stable=True)  # the true ones first, in their order
    index = columns.gather(1, rank.clamp(min=0, max=columns.shape[1] - 1))
    index = index.reshape(*index.shape, *[1] * (other.ndim - 2)).expand(*index.shape, *other.shape[2:])
    return other.gather(1, index)


def match_keys(
    other: Tensor, other_mask: Tensor, mask: Tensor, size: int, rows: Tensor, *, scores: bool, owner: str
) -> Tensor:
    """Another run's attention, (B, Tq', H, Tk'), with the keys of the own run: (B, Tq', H, ``size``).

    Keys are matched by rank. Those that the other run does not have get no attention; those that only the other run has must
    get none from its ``rows`` (B, Tq'), else a ValueError. ``scores`` says that the numbers are those before the softmax.
    Columns behind the masks (attention sinks) are kept in order.

    >>> other, mask = torch.tensor([[[[0.2, 0.8, 0.0]]]]), torch.tensor([[True, True, False]])
    >>> match_keys(other, mask, mask.flip(1), 3, torch.ones(1, 1).bool(), scores=False, owner="Patch")
    tensor([[[[0.0000, 0.2000, 0.8000]]]])
    """
    extra = max(size - mask.shape[1], 0)
    own, theirs = size - extra, other.shape[-1] - extra
    keys, sinks = other[..., :theirs], other[..., theirs:]
    none = torch.finfo(other.dtype).min if scores else 0.0
    # a cache with a window holds the newest keys only
    rank = (mask.cumsum(1) - 1).masked_fill(~mask, -1)[:, -own:]
    other_rank = (other_mask.cumsum(1) - 1).masked_fill(~other_mask, -1)[:, -theirs:]
    same = (rank[:, :, None] == other_rank[:, None, :]) & (rank >= 0)[:, :, None]  # (B, own, theirs)
    lost = ((other_rank >= 0) & ~same.any(1))[:, None, None, :] & rows[:, :, None, None]
    if bool((lost & (keys > (none / 2 if scores else 1e-6))).any()):
        raise ValueError(
            f"{owner}: the other run attends to positions that this run does not have. Remedy: runs of one length, or "
            "positions= whose attention stays among those that both have."
        )
    index = same.int().argmax(-1)[:, None, None, :].expand(*keys.shape[:-1], own)
    matched = torch.where(
        same.any(-1)[:, None, None, :], keys.gather(-1, index), torch.full_like(keys[..., :1], none)
    )
    return torch.cat([matched, sinks], -1)
