"""Edits of attention patterns, before or after the softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tdgeom.model.edits.edit import Edit
from tdgeom.model.edits.edit_call import EditCall
from tdgeom.model.positions import Positions, check_positions, position_mask

__all__ = ["BlockAttention"]


class BlockAttention(Edit):
    """Cut or scale what some positions attend to: rows, columns or blocks of the attention pattern (Geva et al. 2023).

    At ``attn_pattern`` the block is multiplied by ``factor`` and, with ``renormalise``, the row made to sum to 1 again. At
    ``attn_scores`` the block's weight before normalising is multiplied by ``factor`` (its log is added to the scores; 0 gives
    the lowest finite score), and the softmax shares what is left among all keys: rows sum to 1 with or without
    ``renormalise``.

    Args:
        queries: the rows, positions that attend (default all of them).
        keys: the columns, positions that are attended to (default all of them).
        heads: query heads.
        factor: what the block's weight is multiplied by; at ``attn_scores`` not negative.
        renormalise: divide each edited row by its sum, which the softmax behind ``attn_scores`` does anyway.

    Raises ``ValueError`` at ``attn_scores`` if a row would be left without a key, or for a negative factor.

    >>> pattern = torch.full((1, 2, 1, 2), 0.5)  # (B, Tq, H, Tk)
    >>> BlockAttention(queries="last", keys=0)(activation=pattern)[:, :, 0]
    tensor([[[0.5000, 0.5000],
             [0.0000, 0.5000]]])
    """

    def __init__(
        self,
        *,
        queries: Positions = "all",
        keys: Positions = "all",
        factor: float = 0.0,
        renormalise: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(positions=queries, **settings)
        self.keys, self.factor, self.renormalise = check_positions(keys), factor, renormalise

    def selects(self) -> bool:
        """Whether some queries or keys are asked for."""
        return super().selects() or not (isinstance(self.keys, str) and self.keys == "all")

    def selection(self) -> str:
        """The queries and keys asked for, in words."""
        return f"queries={self.positions!r}, keys={self.keys!r}"

    def replace(self, value: Tensor, call: EditCall) -> Tensor:
        """The pattern with its block cut."""
        if value.ndim != 4:
            raise ValueError(
                f"BlockAttention expects 'attn_scores' or 'attn_pattern', (B, Tq, H, Tk), got {tuple(value.shape)} at "
                f"{call.site!r}."
            )
        if call.keys_elsewhere and not (isinstance(self.keys, str) and self.keys == "all"):
            raise ValueError(
                f"BlockAttention(keys={self.keys!r}) at {call.site!r}: its keys are those of the other sequence, whose mask and "
                "tokens this call does not tell. Remedy: keys='all', or a function of the pattern."
            )
        size = value.shape[-1]
        whole = value.new_ones((value.shape[0], size), dtype=torch.bool)
        mask = whole if call.mask is None else call.attended(whole).to(value.device)
        image = getattr(call.site, "image", None)
        columns, _ = position_mask(
            mask, self.keys, input_ids=call.input_ids, special=call.special, image=image
        )
        self.note_selection(call, columns if call.keep is None else columns.any() & call.keep.any())
        # a cache with a window holds the newest keys only; behind the keys there may be room for more, or a sink
        columns = torch.nn.functional.pad(columns, (0, max(size - columns.shape[1], 0)))[:, -size:]
        columns = columns[:, None, None]
        if not call.is_scores:
            new = torch.where(columns, value * self.factor, value)
            return new / new.sum(-1, keepdim=True).clamp(min=1e-30) if self.renormalise else new
        if self.factor < 0:
            raise ValueError(
                f"BlockAttention at {call.site!r} takes a factor of 0 or more, got {self.factor}: weights before a softmax are "
                "positive. Remedy: edit 'attn_pattern'."
            )
        lowest = torch.finfo(value.dtype).min
        cut = value + math.log(self.factor) if self.factor else torch.full_like(value, lowest)
        new = torch.where(columns, cut, value)
        edited = self.where(value, call)
        empty = (new <= lowest / 2).all(-1, keepdim=True) & ~(value <= lowest / 2).all(-1, keepdim=True)
        empty = empty if edited is None else empty & edited.any(-1, keepdim=True)
        if empty.any():
            raise ValueError(
                f"BlockAttention at {call.site!r} would leave a position with no key to attend to (keys={self.keys!r}). "
                "Remedy: fewer queries or keys, or edit 'attn_pattern'."
            )
        return new
