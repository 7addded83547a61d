"""What an edit may know of the call in which it acts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tdgeom.model.positions import Positions, attended_tokens, selected_tokens
from tdgeom.model.sites import is_pattern


@dataclass(frozen=True, eq=False)
class EditCall:
    """One call of an edit: where it stands, which tokens there are, and which of them it edits.

    Attributes:
        site: name of the place, ``None`` where the edit is called on its own.
        groups: query heads that share one head of the activation.
        mask: (B, S), true at attended tokens, or ``None`` for all; not a tensor where that is not known. In a step with a
            cache S exceeds the activation's T, and the last T columns are the activation's.
        input_ids, special: (B, S), the tokens and which of them are special, where known.
        keep: (B, T), the positions to edit, or ``None`` for all.
    """

    site: str | None = None
    groups: int = 1
    mask: Any = None
    input_ids: Tensor | None = None
    special: Tensor | None = None
    keep: Tensor | None = None

    @property
    def is_pattern(self) -> bool:
        """Whether attention scores or patterns are edited, (B, Tq, H, Tk)."""
        return is_pattern(self.site)

    @property
    def is_scores(self) -> bool:
        """Whether they are those before the softmax."""
        return is_pattern(self.site, scores=True)

    @property
    def is_elsewhere(self) -> bool:
        """Whether the activation lies at the positions of another sequence: keys and values of a cross-attention."""
        return self.site is not None and not {"cross_k", "cross_v"}.isdisjoint(_words(self.site))

    @property
    def keys_elsewhere(self) -> bool:
        """Whether the keys of a pattern are another sequence's."""
        return self.site is not None and not {"cross_attn_scores", "cross_attn_pattern"}.isdisjoint(
            _words(self.site)
        )

    def attended(self, value: Tensor) -> Tensor:
        """(B, S) booleans beside an activation."""
        return attended_tokens(self.mask, value)

    def rank(self, value: Tensor) -> Tensor:
        """(B, T): the number of each position of an activation among the attended tokens, from 0."""
        whole = self.attended(value)
        return (whole.cumsum(1) - 1)[:, whole.shape[1] - value.shape[1] :]

    def select(self, value: Tensor, positions: Positions, owner: object) -> Tensor:
        """(B, T), true at positions of an activation."""
        return selected_tokens(
            value,
            positions,
            self.mask,
            input_ids=self.input_ids,
            special=self.special,
            image=getattr(self.site, "image", None),
            owner=owner,
        )


def _words(site: str) -> list[str]:
    name = site.rpartition("/")[2]
    return [] if ":" in name else name.split(".")
