"""The tokens around a token: as windows that are carried to rows, and as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.row_ids import POSITION_BITS
from tdgeom.core.stage import Stage

__all__ = ["ContextWindow", "marked_text", "token_context"]


def marked_text(ids: Sequence[int], place: int, decode: Callable[[list[int]], str]) -> str:
    """The text of token ids, the token at ``place`` in double brackets; -1 stands for no token.

    >>> marked_text([-1, 5, 6, 7], 2, lambda ids: " ".join(map(str, ids)))
    '5 [[6]] 7'
    """
    parts = [[i for i in part if i != -1] for part in (ids[:place], ids[place : place + 1], ids[place + 1 :])]
    before, token, after = (decode(part).strip() if part else "" for part in parts)
    return " ".join(filter(None, (before, f"[[{token}]]", after)))


def token_context(
    row_id: int | Tensor,
    input_ids: Mapping[int, Sequence[int]] | Sequence[Sequence[int]],
    decode: Callable[[list[int]], str],
    *,
    window: int = 8,
) -> str:
    """The text around a row's token, the token in double brackets.

    Args:
        row_id: sequence << 20 | position, as ``SelectTokens`` numbers rows.
        input_ids: attended token ids by sequence (no padding).
        decode: token ids to text, such as ``tokenizer.decode``.
        window: tokens shown on each side.

    >>> token_context(1, [[5, 6, 7]], lambda ids: " ".join(map(str, ids)))
    '5 [[6]] 7'
    """
    sequence, position = int(row_id) >> POSITION_BITS, int(row_id) & ((1 << POSITION_BITS) - 1)
    ids = [int(i) for i in input_ids[sequence]]
    if position >= len(ids):
        raise ValueError(
            f"row id {int(row_id)} is position {position} of sequence {sequence}, which has {len(ids)} tokens: give the attended "
            f"tokens of each sequence, in the order of the run."
        )
    first = max(position - window, 0)
    return marked_text(ids[first : position + 1 + window], position - first, decode)


class ContextWindow(Stage):
    """The token ids around every token, (B, T) -> (B, T, before + 1 + after); -1 where there is no attended token.

    Reads ``"input_ids"`` and where present ``"attention_mask"``; writes ``"context"``. Put it before
    ``SelectTokens(..., also=["context"])``, which carries it to the rows.

    >>> ContextWindow(before=1, after=1)(input_ids=torch.tensor([[5, 6, 7]]))[0].tolist()
    [[-1, 5, 6], [5, 6, 7], [6, 7, -1]]
    """

    reads = ["input_ids", "attention_mask"]
    writes = ["context"]
    optional = frozenset({"attention_mask"})

    def __init__(self, *, before: int = 10, after: int = 5, **keys: Any) -> None:
        if before < 0 or after < 0:
            raise ValueError(f"ContextWindow: before and after are 0 or more, got {before} and {after}.")
        super().__init__(**keys)
        self.before, self.after = before, after

    def compute(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The windows."""
        ids = input_ids if mask is None else input_ids.masked_fill(~mask.bool(), -1)
        padded = torch.nn.functional.pad(ids, (self.before, self.after), value=-1)
        return padded.unfold(1, self.before + 1 + self.after, 1)
