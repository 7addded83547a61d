"""Another run's activations laid out as those of the run to edit: positions matched by rank among attended tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdgeom.model.positions import positions_second
from tdgeom.model.sites import token_side

# a run as Capture gives it: a TensorDict, the list of calls of a context, or one site's tensor
Donor = TensorDictBase | Tensor | Sequence[TensorDictBase]


def is_donor(given: Any) -> bool:
    """Whether something is activations rather than a model's inputs."""
    if isinstance(given, list | tuple):
        return all(isinstance(call, TensorDictBase) for call in given) and not isinstance(given, tuple)
    return isinstance(given, Tensor) or (isinstance(given, TensorDictBase) and "acts" in given.keys())


def one_run(source: Donor, owner: str) -> TensorDictBase | Tensor:
    """The one call that a list of them holds; anything else as it is."""
    if isinstance(source, Tensor | TensorDictBase):
        return source
    if isinstance(source, Sequence) and len(source) == 1:
        return one_run(source[0], owner)
    held = (
        f"{len(source)} calls"
        if isinstance(source, Sequence) and not isinstance(source, str)
        else type(source).__name__
    )
    raise ValueError(
        f"{owner} takes activations from one call of the model, a TensorDict of Capture or a list with one, got {held}. Remedy: "
        "say which, such as calls[0]."
    )


def find_acts(source: Donor, site: str | None, owner: str) -> tuple[Tensor, Tensor | None]:
    """The activations of a site in another run, positions second, and the attention mask that was beside them."""
    source = one_run(source, owner)
    if isinstance(source, Tensor):
        return positions_second(source, site), None
    acts = None if site is None else source.get(("acts", site), None)
    if acts is None:
        have = sorted(map(str, source.get("acts", source).keys()))
        raise KeyError(
            f"{owner} needs ('acts', {site!r}) in the other run, which has {have[:12]}. Remedy: capture that site."
        )
    acts, mask = positions_second(acts, site), source.get(token_side(site) + "attention_mask", None)
    fits = mask is not None and acts.ndim >= 3 and mask.shape == acts.shape[:2]
    return acts, mask if fits else None


def whole_heads(
    other: Tensor, count: int, heads: Sequence[int], groups: int, owner: str, site: str | None
) -> Tensor:
    """Captured heads (B, T, h, ...) at their places among all ``count`` (B, T, H, ...); zeros at the others.

    A donor holds all heads, or, in their order, those that the edit names (query heads, of which ``groups`` share one).
    Raises ``ValueError`` where it could be both and they differ.

    >>> whole_heads(torch.ones(1, 1, 1, 2), 3, [-1], 1, "Patch", None)[0, 0]
    tensor([[0., 0.],
            [0., 0.],
            [1., 1.]])
    """
    total = count * groups
    own = [head % total // groups for head in heads if -total <= head < total]
    if len(own) < len(heads) or other.shape[2] != len(own) or own == list(range(count)):
        return other  # all of them, or what is refused further on
    if other.shape[2] == count:
        raise ValueError(
            f"{owner} at {site!r}: the other run holds {count} heads, which are all of them, or those of heads={list(heads)} in "
            "this order. Remedy: capture it without heads=, or name them in ascending order, each once."
        )
    return other.new_zeros(*other.shape[:2], count, *other.shape[3:]).index_copy(
        2, torch.tensor(own, device=other.device), other
    )


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
