"""Edits of attention patterns, before or after the softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.wrong_objects import refuse_no_number
from tdgeom.model.edits.edit import Edit
from tdgeom.model.edits.edit_call import EditCall
from tdgeom.model.positions import Positions, check_positions, position_mask

__all__ = ["BlockAttention"]


class BlockAttention(Edit):
    """Cut or scale what some positions attend to: rows, columns or blocks of the attention pattern (Geva et al. 2023).

    The block's weights are multiplied by ``factor``, and with ``renormalise`` each row is made to sum to 1 again. At
    ``attn_scores`` the log of the factor is added (0 gives the lowest finite score), and the softmax behind renormalises:
    the pattern is the one that ``renormalise=True`` gives at ``attn_pattern``, and what is not renormalised exists there only.

    Args:
        queries: the rows, positions that attend (default all of them).
        keys: the columns, positions that are attended to (default all of them).
        heads: query heads.
        factor: what the block's weight is multiplied by; at ``attn_scores`` not negative.
        renormalise: divide each edited row by its sum. Default: as the site has it, no at ``attn_pattern``, yes at
            ``attn_scores``, where ``False`` is refused.
        keep_self: leave what each query gives to its own position, among ``keys`` or not.

    Raises ``ValueError`` if a row that is renormalised would be left without a key, and for a negative factor where rows are
    renormalised.

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
        renormalise: bool | None = None,
        keep_self: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(positions=queries, **settings)
        refuse_no_number("BlockAttention", "factor", factor)
        self.keys, self.factor, self.renormalise = check_positions(keys), factor, renormalise
        self.keep_self = keep_self

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
        columns = columns[:, None, None]  # (B, 1, 1, Tk)
        if self.keep_self:
            columns = columns & ~self._own(value, mask, call)
        if call.is_scores and self.renormalise is False:
            raise ValueError(
                f"BlockAttention(renormalise=False) at {call.site!r}: the softmax behind makes every row sum to 1. Remedy: edit "
                "'attn_pattern'."
            )
        if self.factor < 0 and (call.is_scores or self.renormalise):
            raise ValueError(
                f"BlockAttention at {call.site!r} takes a factor of 0 or more where rows are made to sum to 1, got "
                f"{self.factor}: weights before a softmax are positive. Remedy: edit 'attn_pattern', without renormalise."
            )
        if not call.is_scores:
            new = torch.where(columns, value * self.factor, value)
            if not self.renormalise:
                return new
            total = new.sum(-1, keepdim=True)
            self._refuse_empty((total <= 0) & (value.sum(-1, keepdim=True) > 0), value, call)
            return new / total.clamp(min=1e-30)
        lowest = torch.finfo(value.dtype).min
        cut = value + math.log(self.factor) if self.factor else torch.full_like(value, lowest)
        new = torch.where(columns, cut, value)
        empty = (new <= lowest / 2).all(-1, keepdim=True) & ~(value <= lowest / 2).all(-1, keepdim=True)
        self._refuse_empty(empty, value, call)
        return new

    def _own(self, value: Tensor, mask: Tensor, call: EditCall) -> Tensor:
        """(B, Tq, 1, Tk), true where a query meets its own position; the last Tq of the keys' positions are the queries'."""
        if call.keys_elsewhere:
            raise ValueError(
                f"BlockAttention(keep_self=True) at {call.site!r}: its keys are those of the other sequence, and no query's own."
            )
        queries, size = value.shape[1], value.shape[-1]
        if call.mask is None and size != queries:
            raise ValueError(
                f"BlockAttention(keep_self=True) at {call.site!r}: of {size} keys for {queries} queries, which are the queries' "
                "own is told by the mask. Remedy: call the model with attention_mask."
            )
        sequence = min(mask.shape[1], size)
        first = sequence - queries  # behind the keys there may be a sink
        place = torch.arange(size, device=value.device)
        return (place[None, :] == first + torch.arange(queries, device=value.device)[:, None])[None, :, None]

    def _refuse_empty(self, empty: Tensor, value: Tensor, call: EditCall) -> None:
        edited = self.where(value, call)
        if bool((empty if edited is None else empty & edited.any(-1, keepdim=True)).any()):
            raise ValueError(
                f"BlockAttention at {call.site!r} would leave a position with no key to attend to (keys={self.keys!r}). "
                "Remedy: fewer queries or keys, keep_self=True, or edit 'attn_pattern' without renormalise."
            )
