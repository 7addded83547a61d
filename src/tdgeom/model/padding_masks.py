"""Which tokens are attended, from every form of mask that a model is called with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import NonTensorData
from torch import Tensor

# what stands where a mask would, if there is one that nobody outside the model can see
UNSEEN = (
    "whether a position is padding is not known: the model's call has no mask that can be read (none among its arguments, "
    "or one of a form that does not say which tokens are padding)"
)
UNCOUNTED = "how many tokens the cache of the model's call holds is not known, and so no position's number"
_FORBIDDEN = -9e3  # what is subtracted is at least 10,000
_REMEDY = (
    "Remedy: the (B, T) 'attention_mask' among the model's arguments, or set in the calls that were recorded."
)


def unknown_mask(why: str) -> Any:
    """What is recorded instead of a mask, so that whoever needs one says why there is none.

    >>> unknown_mask(UNSEEN).data == UNSEEN
    True
    """
    return NonTensorData(why, batch_size=[])


def refuse_unknown(mask: Any, what: str) -> None:
    """Raise if a mask is one that is not known; ``what`` begins the sentence."""
    why = getattr(mask, "data", mask)
    if mask is not None and not isinstance(mask, Tensor) and isinstance(why, str):
        raise ValueError(f"{what}: {why}. {_REMEDY}")


def token_mask(mask: Any, batch: int, length: int, past: int | None = None) -> Tensor | None:
    """True at attended tokens, (B, past + T), from a mask beside T tokens; ``None`` from what does not tell.

    Args:
        mask: (B, S) with S >= T; or (B, 1, Tq, Tk), (B, Tq, Tk) that allow keys (true, or nothing subtracted) or forbid them;
            or a mapping of such masks, one for each kind of layer.
        past: tokens before these T, where known; columns behind all of them are room in a cache of fixed size.

    >>> token_mask(torch.tensor([[0, 1, 1, 1]]), 1, 1, past=2)
    tensor([[False,  True,  True]])
    >>> token_mask(torch.tensor([[[[0.0, 0.0, -1e4]]]]), 1, 3)
    tensor([[ True,  True, False]])
    """
    if isinstance(mask, Mapping):
        kinds = sorted(mask, key=lambda kind: "full" not in str(kind))
        found = (token_mask(mask[kind], batch, length, past) for kind in kinds if mask[kind] is not None)
        return next((one for one in found if one is not None), None)
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 3, 4) or mask.shape[0] not in (1, batch):
        return None
    if mask.ndim == 2:
        whole = mask.shape[1] if past is None else past + length
        if not length <= whole <= mask.shape[1] or (mask.is_floating_point() and not _ones_and_zeros(mask)):
            return None
        own = mask.bool() if whole == mask.shape[1] else mask[:, :whole].bool()
        return own if len(own) == batch else own.expand(batch, -1)
    if mask.is_floating_point() and float(mask.max()) > 0 and float(mask.min()) > _FORBIDDEN:
        return None  # zeros and ones: nothing says which of them allow
    allowed = _allowed(mask if mask.ndim == 4 else mask[:, None]).expand(batch, -1, -1)
    queries, keys = allowed.shape[1:]
    if queries == 1 and length > 1:  # the same keys for every query
        whole = length if past is None else past + length
        return allowed[:, 0] if keys == whole else None
    if queries != length:
        return None
    if past is None:
        past = _before(allowed)
    return None if keys < past + length else _seen(allowed[:, :, : past + length])


def _ones_and_zeros(mask: Tensor) -> bool:
    """Whether numbers of a (B, S) mask are its truth values: what is subtracted somewhere is no 1, and no text has no token."""
    return bool((((mask == 0) | (mask == 1)).all(1) & (mask == 1).any(1)).all())


def attended_keys(bias: Tensor, past: int) -> Tensor | None:
    """:func:`token_mask` of a bias (B, 1, Tq, Tk) beside as many tokens as it has queries.

    >>> bias = torch.tensor([[[[1, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 0]]]]).bool()  # left padding, a cache with room
    >>> attended_keys(bias, 0)
    tensor([[False,  True,  True]])
    """
    return token_mask(bias, bias.shape[0], bias.shape[2], past)


def _allowed(bias: Tensor) -> Tensor:
    """(B, Tq, Tk), true where any head may look; positions may have been written into an additive bias too."""
    if bias.is_floating_point():
        return (bias > _FORBIDDEN).any(1)
    return bias.bool().any(1)


def _before(allowed: Tensor) -> int:
    """How many tokens came before the queries, where behind the keys there may be room: a token sees itself and none later."""
    _, queries, keys = allowed.shape
    if queries == keys:
        return 0
    place = torch.arange(keys, device=allowed.device) - torch.arange(queries, device=allowed.device)[:, None]
    some = allowed & ~allowed.all(-1, keepdim=True)
    return int(torch.where(some, place, 0).max()) if bool(some.any()) else max(keys - queries, 0)


def _seen(allowed: Tensor) -> Tensor:
    """Tokens that a query sees: (B, Tq, S) -> (B, S).

    A row of a padding token may allow everything, since a softmax over nothing is no number: it counts where every row does, or
    where it is the last one and sees what all others together do.
    """
    open_rows = allowed.all(-1)
    seen = (allowed & ~open_rows[..., None]).any(1)
    seen[:, -1] |= open_rows[:, -1] & seen[:, :-1].all(-1)
    return seen | open_rows.all(1)[:, None]
