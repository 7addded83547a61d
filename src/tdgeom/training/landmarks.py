"""Rows of a corpus that are chosen by their text, and so are the same for every model that reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.stage import Stage
from tdgeom.core.streaming_stage import StreamingStage
from tdgeom.numerics.hashing import hash_ids

__all__ = ["Landmarks", "TextIds", "text_ids"]


def text_ids(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """(B, T) int64 >= 0 of tokens -> an id of each position's text: all attended tokens of its sequence up to and with it.

    The same text has the same id in any batch, order, padding and run; two texts share one by chance of 2^-63.

    >>> whole = text_ids(torch.tensor([[5, 6, 7]]))
    >>> padded = text_ids(torch.tensor([[0, 5, 6]]), torch.tensor([[0, 1, 1]]))
    >>> bool((whole[0, :2] == padded[0, 1:]).all())
    True
    """
    tokens = hash_ids(input_ids.long(), 0)
    attended = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    state = torch.full_like(tokens[:, 0], 0x2545F491)
    found = []
    for position in range(tokens.shape[1]):
        state = torch.where(
            attended[:, position], hash_ids(state * 6364136223846793005 + tokens[:, position], 1), state
        )
        found.append(state)
    return torch.stack(found, 1)


class TextIds(Stage):
    """``text_ids`` of a batch: reads ``"input_ids"`` and where present ``"attention_mask"``, writes ``"text_id"``."""

    reads = ["input_ids", "attention_mask"]
    optional = frozenset({"attention_mask"})
    writes = ["text_id"]

    def compute(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """See ``text_ids``."""
        return text_ids(input_ids, attention_mask)


class Landmarks(StreamingStage):
    """The rows with the smallest text ids, each text once: reads ``("tokens", site)`` and ``("carried", "text_id")``.

    Writes ``("landmarks", site)`` (n, D) and ``"landmark_id"`` (n,) ascending. Which rows these are depends on the texts alone.
    """

    ids: Tensor

    def __init__(self, sites: Sequence[str], *, size: int = 4096) -> None:
        reads: list[Any] = [*(("tokens", site) for site in sites), ("carried", "text_id")]
        super().__init__(reads=reads, writes=[*(("landmarks", site) for site in sites), "landmark_id"])
        self.sites, self.size = list(sites), size
        self.add_state("ids", torch.int64)
        for number in range(len(self.sites)):
            self.add_state(f"rows_{number}", None)

    def start(self, *inputs: Tensor) -> Mapping[str, Tensor]:
        """No rows."""
        rows = {f"rows_{number}": value[:0] for number, value in enumerate(inputs[:-1])}
        return {"ids": inputs[-1].new_zeros((0,)), **rows}

    @property
    def is_empty(self) -> bool:
        """True before the first rows."""
        return not self.ids.numel()

    def accumulate(self, *inputs: Tensor) -> None:
        """Of the rows held and the new ones, those with the smallest ids."""
        self._keep(inputs[-1], inputs[:-1])

    def combine(self, other: Landmarks) -> None:
        """Another's rows are offered like new ones."""
        self._keep(other.ids, [getattr(other, f"rows_{number}") for number in range(len(self.sites))])

    def fits(self, name: str, value: Tensor) -> bool:
        """Any number of rows does."""
        return value.shape[1:] == self.state()[name].shape[1:]

    def result(self) -> list[Tensor]:
        """The rows by ascending id."""
        return [
            *(getattr(self, f"rows_{number}").clone() for number in range(len(self.sites))),
            self.ids.clone(),
        ]

    def _keep(self, ids: Tensor, rows: Sequence[Tensor]) -> None:
        if len(self.ids) == self.size:  # most rows of a long stream come too late
            early = ids < self.ids[-1].to(ids.device)
            ids, rows = ids[early], [one[early] for one in rows]
            if not len(ids):
                return
        every = torch.cat((self.ids, ids.to(self.ids.device)))
        order = torch.argsort(every, stable=True)  # of one text the first row
        fresh = torch.ones_like(order, dtype=torch.bool)
        fresh[1:] = every[order][1:] != every[order][:-1]
        chosen = order[fresh][: self.size]
        held = {
            f"rows_{n}": torch.cat((getattr(self, f"rows_{n}"), one.to(every.device)))[chosen]
            for n, one in enumerate(rows)
        }
        self.set_state({"ids": every[chosen], **held})
