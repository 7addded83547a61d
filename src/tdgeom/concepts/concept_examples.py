"""The rows that a concept marks most, and the tokens around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from tdgeom.core.row_ids import POSITION_BITS

__all__ = ["token_context", "top_activating"]


def top_activating(coordinates: Tensor, row_id: Tensor, k: int = 10) -> tuple[Tensor, Tensor]:
    """The k rows with the largest coordinate on each concept: (N, n), (N,) -> values (n, k) and row ids (n, k).

    >>> import torch
    >>> top_activating(torch.tensor([[1.0], [3.0], [2.0]]), torch.tensor([10, 11, 12]), 2)
    (tensor([[3., 2.]]), tensor([[11, 12]]))
    """
    values, index = coordinates.mT.topk(min(k, coordinates.shape[0]), dim=-1)
    return values, row_id.to(index.device)[index]


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
    before, after = ids[max(position - window, 0) : position], ids[position + 1 : position + 1 + window]
    parts = [
        decode(before) if before else "",
        f"[[{decode([ids[position]]).strip()}]]",
        decode(after) if after else "",
    ]
    return " ".join(part.strip() for part in parts if part.strip())
