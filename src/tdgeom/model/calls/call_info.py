"""What an edit may know of the running call: mask, ids, and how many tokens are cached."""

from __future__ import annotations

import torch
from torch import Tensor


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


class CallInfo:
    """What the running call of a (part of a) model was given: mask, ids and how many tokens are cached."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.past = 0
        self.history: Tensor | None = None
        self.attended: Tensor | None = None

    def begin(self, tensors: dict[str, Tensor], past: int) -> None:
        """A call starts."""
        self.tensors, self.past = tensors, past
        ids = tensors.get("input_ids")
        if ids is None or not past:
            self.history = ids
        elif self.history is not None and self.history.shape == (ids.shape[0], past):
            self.history = torch.cat([self.history, ids], 1)  # pivots may lie in cached tokens
        else:
            self.history = ids
        bias = tensors.get("attention_mask")
        self.attended = None if bias is None or bias.ndim != 4 else self._attended(bias, past)

    def _attended(self, bias: Tensor, past: int) -> Tensor | None:
        """The padding mask behind a (B, 1, Tq, Tk) bias, which generate makes itself for caches of fixed size."""
        known, (batch, length) = self.attended, (bias.shape[0], bias.shape[2])
        if past and known is not None and known.shape == (batch, past):
            return torch.cat([known, known.new_ones(batch, length)], 1)
        return attended_keys(bias, past) if bias.shape[3] >= past + length else None

    def mask(self, value: Tensor, length: int) -> Tensor | None:
        """(B, past + length) attention mask of an activation with ``length`` positions; ``None`` without padding."""
        mask = self.tensors.get("attention_mask")
        whole = self.past + length
        if mask is not None and mask.ndim == 2 and mask.shape[1] >= whole and mask.shape[0] == value.shape[0]:
            return mask[:, :whole]
        if self.attended is not None and self.attended.shape == (value.shape[0], whole):
            return self.attended
        if not self.past:
            return None
        return torch.ones(value.shape[0], whole, dtype=torch.bool, device=value.device)
