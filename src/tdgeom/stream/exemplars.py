"""Maximally activating samples: which tokens, in which text, drive a unit, a head or a direction most.

Not the reservoir of ``RowSample``: every unit keeps rows of its own, so the best of a block are found first and only
their contexts move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdgeom.core.guessed_names import answer_guesses
from tdgeom.core.keys import Key, as_key
from tdgeom.core.words import Vocabulary, Words
from tdgeom.numerics.hashing import EMPTY
from tdgeom.rows.token_context import marked_text
from tdgeom.stream.held_rows import HoldsWords

__all__ = ["MaxActivating", "describe_exemplars", "top_activating", "top_rows"]


def top_rows(values: Tensor, row_id: Tensor, k: int) -> Tensor:
    """Indices (k, U) of the k largest of (N, U) values in each column, largest first; equal values by smaller row id.

    >>> top_rows(torch.tensor([[1.0], [3.0], [3.0]]), torch.tensor([0, 2, 1]), 2).flatten()
    tensor([2, 1])
    """
    order = row_id.argsort(stable=True)
    ordered = values[order]
    k = min(k, len(values))
    threshold = ordered.topk(k, 0).values[-1]
    above, tie = ordered > threshold, ordered == threshold
    # of the rows that tie at the threshold the first ones by id, so the answer does not depend on the order of rows
    chosen = above | (tie & (tie.cumsum(0) <= k - above.sum(0)))
    rows = chosen.byte().topk(k, 0).indices.sort(0).values
    best = ordered.gather(0, rows).argsort(dim=0, descending=True, stable=True)
    return order[rows.gather(0, best)]


def top_activating(coordinates: Tensor, row_id: Tensor, k: int = 10) -> tuple[Tensor, Tensor]:
    """The k rows with the largest coordinate on each concept: (N, n), (N,) -> values (n, k) and row ids (n, k).

    >>> top_activating(torch.tensor([[1.0], [3.0], [2.0]]), torch.tensor([10, 11, 12]), 2)
    (tensor([[3., 2.]]), tensor([[11, 12]]))
    """
    best = top_rows(coordinates, row_id.to(coordinates.device), k)
    return coordinates.gather(0, best).mT, row_id.to(best.device)[best].mT


class MaxActivating(HoldsWords):
    """The k rows of a stream with the largest value of every unit, with their text, in memory that does not grow.

    Units are the features of a site, or projections on ``directions``. Whole heads are units of
    ``Capture(model, "head_output", callback=lambda site, x: x.norm(dim=-1))``, each by the length of its contribution; the
    features of one head those of ``Capture(model, "z", heads=[3])``. Any order of rows and any split into batches give
    the same answer: equal values are ordered by row id.

    Reads ``("tokens", site)`` (N, D), ``("carried", context)`` (N, W) and ``"row_id"``; writes under
    ``("exemplars", site)`` ``values`` (U, k) descending, ``row_id`` (U, k), ``context`` (U, k, W). ``k`` shrinks to the number
    of rows. At many sites: ``ForEach(MaxActivating(), sites)``.

    Args:
        site: the site whose rows are watched; None for one unnamed site (``"tokens"``, ``"exemplars"``).
        k: how many rows to keep for a unit.
        units: which features to watch (default all of them).
        directions: (D, U), watch projections ``x @ directions`` instead.
        smallest: keep the smallest values instead, ascending.
        context: the carried value kept with a row, ``SelectTokens(..., also=[context])``; see ``ContextWindow``. Words (the text
            of a sequence, its category) are kept too: ``context`` is then U lists of k.

        >>> import torch, tdgeom as tg
        >>> rows, windows = torch.tensor([[1.0], [4.0]]), torch.tensor([[7], [8]])
        >>> values, row_id, context = tg.MaxActivating(k=1)(tokens=rows, context=windows, row_id=torch.arange(2))
        >>> values.item(), row_id.item(), context.item()
        (4.0, 1, 8)
    """

    top: Tensor
    ids: Tensor
    text: Tensor

    def __init__(
        self,
        site: str | None = None,
        *,
        k: int = 20,
        units: Sequence[int] | None = None,
        directions: Tensor | None = None,
        smallest: bool = False,
        context: str = "context",
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        if k < 1:
            raise ValueError(f"MaxActivating: k must be at least 1, got {k}.")
        if units is not None and directions is not None:
            raise ValueError("MaxActivating expects units= or directions=, not both.")
        at = () if site is None else (str(site),)
        super().__init__(
            in_keys=in_keys,
            out_keys=out_keys,
            reads={as_key(("tokens", *at)): "N D", ("carried", context): None, "row_id": "N"},
            writes=[("exemplars", *at, name) for name in ("values", "row_id", "context")],
        )
        self.k, self.units, self.smallest = k, None if units is None else list(units), smallest
        self.directions = None if directions is None else directions.detach().clone()
        self.add_state("top", torch.float32)
        self.add_state("ids", torch.int64)
        self.add_state("text", torch.int64)
        self.add_vocabulary()

    def start(self, rows: Tensor, context: Any, row_id: Tensor) -> Mapping[str, Tensor]:
        """Room for k rows, all of them still empty."""
        shape, context = (self.k, self._values(rows[:0]).shape[1]), self._contexts(context, rows)
        return {
            "top": torch.full(shape, -torch.inf, dtype=torch.float32, device=rows.device),
            "ids": torch.full(shape, EMPTY, dtype=torch.int64, device=rows.device),
            "text": torch.full((*shape, context.shape[1]), -1, dtype=torch.int64, device=rows.device),
        }

    def accumulate(self, rows: Tensor, context: Any, row_id: Tensor) -> None:
        """Keep the best of what is held and what comes."""
        values, row_id, context = self._values(rows), row_id.long(), self._contexts(context, rows)
        best = top_rows(values, row_id, self.k)
        self._join(values.gather(0, best), row_id[best], context[best])
        self.forget_words({"text": self.text})

    def combine(self, other: MaxActivating) -> None:
        """Keep the best of both."""
        theirs = self._alike(other)
        self._join(*(theirs[name] for name in ("top", "ids", "text")))

    def _contexts(self, context: Tensor | Words, rows: Tensor) -> Tensor:
        """(N, W) int64: windows of token ids, or the codes of words."""
        if isinstance(context, Words) and not self.is_empty and not self.vocabulary.numel():
            raise ValueError(
                f"MaxActivating has seen windows of token ids at {self.in_keys[1]!r} and now gets words: reset() it."
            )
        if isinstance(context, Words) or self.vocabulary.numel():
            return self.coded("text", context).to(rows.device).unsqueeze(-1)
        if context.ndim != 2 or context.shape[0] != rows.shape[0]:
            raise ValueError(
                f"MaxActivating expects {self.in_keys[1]!r} of shape ({rows.shape[0]}, W), a window of token ids a row "
                f"(ContextWindow), or words, got {tuple(context.shape)}."
            )
        return context.long()

    def _alike(self, other: MaxActivating) -> Mapping[str, Tensor]:
        """The other's state; words on one side alone are refused."""
        if bool(self.vocabulary.numel()) != bool(other.vocabulary.numel()):
            raise ValueError(
                "MaxActivating cannot merge contexts that are words with contexts that are token ids."
            )
        return self.agree_with(other)

    def result(self) -> Mapping[str, Any]:
        """Values, row ids and contexts, (U, k, ...)."""
        held = int((self.ids[:, 0] != EMPTY).sum())
        values = -self.top[:held] if self.smallest else self.top[:held]
        context: Any = self.text[:held].transpose(0, 1).clone()
        if self.vocabulary.numel():
            spelled = Vocabulary.of(self.vocabulary).decode(context.flatten()).tolist()
            context = Words([spelled[start : start + held] for start in range(0, len(spelled), held)])
        return {
            "values": values.T.clone(),
            "row_id": self.ids[:held].T.clone(),
            "context": context,
        }

    def _values(self, rows: Tensor) -> Tensor:
        rows = rows.float()
        if self.directions is not None:
            rows = rows @ self.directions.to(rows)
        elif self.units is not None:
            rows = rows[:, self.units]
        return -rows if self.smallest else rows

    def _join(self, values: Tensor, ids: Tensor, text: Tensor) -> None:
        values, ids = torch.cat([self.top, values]), torch.cat([self.ids, ids])
        text = torch.cat([self.text, text])
        by_id = ids.argsort(dim=0, stable=True)
        order = by_id.gather(0, values.gather(0, by_id).argsort(dim=0, descending=True, stable=True))[
            : self.k
        ]
        self.top, self.ids = values.gather(0, order), ids.gather(0, order)
        self.text = text.gather(0, order.unsqueeze(-1).expand(-1, -1, text.shape[-1]))


@answer_guesses
def describe_exemplars(
    exemplars: TensorDictBase, tokenizer: Any, unit: int, *, before: int = 10, most: int = 10
) -> list[str]:
    """One line an exemplar of a unit: its value and its text with the token itself in double brackets.

    ``exemplars`` is what ``MaxActivating`` wrote (``result["exemplars", site]``); ``before`` as in ``ContextWindow``. Words kept
    in place of windows stand as they are.
    """
    values, contexts = exemplars["values"][unit][:most].tolist(), exemplars["context"][unit][:most]
    if isinstance(contexts, list):
        return [f"{value:8.3f}  {text}" for value, text in zip(values, contexts)]
    windows = contexts.tolist()
    return [
        f"{value:8.3f}  {marked_text(ids, before, tokenizer.decode)}" for value, ids in zip(values, windows)
    ]
