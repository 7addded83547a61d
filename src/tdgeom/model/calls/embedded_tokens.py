"""Which tokens a part of a model is given that is called with embeddings: ids of a call around it, where they are these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tdgeom.model.calls.call_info import CallInfo

_LOOKED_AT = 64  # rows that are no embedding of their own token, compared with all tokens of the call
_ALIKE = 0.999  # cosine: a model may scale its embeddings


def ids_around(embeds: Tensor, around: Iterable[CallInfo], modules: Iterable[nn.Module]) -> Tensor | None:
    """The ids (B, S) behind ``embeds`` (B, T, D), known from a call around theirs; ``None`` where they cannot be told.

    The last T of S columns are those of ``embeds``; -1 stands for positions without a token (a prompt of vectors in front).

    Args:
        around: the calls around, the nearest first.
        modules: the modules whose embeddings are looked at (``get_input_embeddings``).
    """
    tables = list(dict.fromkeys(_tables(modules)))
    for info in around:
        for side in dict.fromkeys((info.side, "", "decoder_")):
            new = info.tensors.get(side + "input_ids")
            if not isinstance(new, Tensor) or new.ndim != 2 or new.is_floating_point():
                continue
            front = embeds.shape[1] - new.shape[1]
            if new.shape[0] != embeds.shape[0] or front < 0:
                continue
            if not any(are_embedded(new, embeds[:, front:], table) for table in tables):
                continue
            whole = info.history if side == info.side and info.history is not None else new
            return nn.functional.pad(whole, (front, 0), value=-1) if whole is new and front else whole
    return None


def are_embedded(ids: Tensor, embeds: Tensor, table: nn.Module) -> bool:
    """Whether ``embeds`` (B, T, D) are the embeddings of ``ids`` (B, T) in their order, some tokens replaced by others' vectors.

    Some rows are embeddings of their own token (up to scale), and those that are not (an image's) are of no other token of
    the call either.

    >>> table = nn.Embedding(9, 4)
    >>> ids = torch.tensor([[1, 2, 3, 4]])
    >>> are_embedded(ids, table(ids), table), are_embedded(ids, table(ids.flip(1)), table)
    (True, False)
    """
    count = getattr(table, "num_embeddings", None) or getattr(getattr(table, "weight", None), "shape", [0])[0]
    known = (ids >= 0) & (ids < count)
    if not bool(known.any()):
        return False
    with torch.no_grad():
        # its forward, and not a call of it: hooks on it are of the user's own calls
        rows = table.forward(torch.where(known, ids, ids[known][0]).to(_home(table, ids)))
        if not isinstance(rows, Tensor) or rows.shape != embeds.shape:
            return False
        rows, given = _unit(rows.to(embeds.device)), _unit(embeds.detach())
        known = known.to(embeds.device)
        own = ((rows * given).sum(-1) > _ALIKE) & known
        if not bool(own.any()):
            return False
        others = given[~own & (given.abs().amax(-1) > 0)]
        others = others[torch.linspace(0, len(others) - 1, min(_LOOKED_AT, len(others))).long()]
        return not bool((others @ rows[known].unique(dim=0).T > _ALIKE).any())


def _unit(rows: Tensor) -> Tensor:
    rows = rows.float()
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-30)


def _home(table: nn.Module, ids: Tensor) -> torch.device:
    weight: Any = getattr(table, "weight", None)
    return ids.device if not isinstance(weight, Tensor) or weight.is_meta else weight.device


def _tables(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    for module in modules:
        ask = getattr(module, "get_input_embeddings", None)
        try:
            found = ask() if callable(ask) else None
        except (NotImplementedError, AttributeError):
            continue
        if isinstance(found, nn.Module):
            yield found
