"""What stages that hold rows share: keys of several sites, and the checks that rows are the same and of one kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key, as_key, site_key
from tdgeom.core.streaming_stage import StreamingStage
from tdgeom.core.words import Vocabulary, Words
from tdgeom.core.wrong_objects import site_list

__all__: list[str] = []

_MANY_BYTES = 1 << 22


def row_keys(
    owner: str, root: str, sites: Iterable[Any] | None, also: Sequence[str]
) -> tuple[list[Key], list[Key]]:
    """What such a stage reads, sites and carried values and ``"row_id"`` last, and where it writes them under its root."""
    if isinstance(sites, str) or isinstance(also, str):
        raise TypeError(f"{owner}: sites and also are lists of names, got {sites!r} and {also!r}.")
    if sites is None and also:
        raise ValueError(f"{owner}: also={list(also)} needs sites=; without sites it reads 'tokens' alone.")
    parts = [()] if sites is None else [site_key(site) for site in site_list(owner, sites)]
    carried = [str(name) for name in also]
    reads = [as_key(("tokens", *site)) for site in parts] + [("carried", name) for name in carried]
    writes = [as_key((root, *site)) for site in parts] + [(f"{root}_carried", name) for name in carried]
    return [*reads, "row_id"], [*writes, f"{root}_row_id"]


class HoldsWords(StreamingStage):
    """A streaming stage whose rows may be words: it holds their codes, and the vocabulary as a piece of state of its own."""

    takes_words = frozenset({"carried"})
    vocabulary: Tensor

    def add_vocabulary(self) -> None:
        """Declare the vocabulary; last, for the first piece of state says whether there are rows."""
        self.add_state("vocabulary", torch.uint8)

    def coded(self, name: str, value: Tensor | Words) -> Tensor:
        """Rows as the state's piece ``name`` holds them: words by their codes; numbers too, once there were words."""
        if isinstance(value, Tensor) and not self.vocabulary.numel():
            return value
        known = Vocabulary.of(self.vocabulary)
        if isinstance(value, Tensor) and name not in known.columns:
            return value
        before = len(known), len(known.columns)
        if name not in known.columns:
            known.columns.append(name)
            if not self.is_empty:  # numbers so far, among which now is a None
                self.set_state({name: known.encode(Words(self.state()[name].tolist())).to(self.home)})
        codes = known.encode(value if isinstance(value, Words) else Words(value.tolist()))
        if (len(known), len(known.columns)) != before:
            self.vocabulary = known.tensor().to(self.vocabulary.device)
        return codes

    def fits(self, name: str, value: Tensor) -> bool:
        """Vocabularies may differ; where one has words the other may have lists of numbers, of any width."""
        return name == "vocabulary" or super().fits(name, value)

    def agree_with(self, other: HoldsWords) -> dict[str, Tensor]:
        """The other's state, with codes where either has them; the own is brought to the same."""
        own, theirs = Vocabulary.of(self.vocabulary), Vocabulary.of(other.vocabulary)
        found = {name: value.to(self.home) for name, value in other.state().items() if name != "vocabulary"}
        for name in dict.fromkeys([*own.columns, *theirs.columns]):
            if name not in theirs.columns:
                found[name] = theirs.encode(Words(found[name].tolist())).to(self.home)
            if name not in own.columns:
                self.set_state({name: own.encode(Words(self.state()[name].tolist())).to(self.home)})
        own.update(theirs)
        if own.columns:
            self.vocabulary = own.tensor().to(self.home)
        return found

    def forget_words(self, rows: Mapping[str, Tensor]) -> None:
        """Keep the words of these rows alone, once those of many others fill memory."""
        if self.vocabulary.numel() > _MANY_BYTES:
            known = Vocabulary.of(self.vocabulary)
            known.keep(code for name in known.columns for code in torch.unique(rows[name]).tolist())
            self.vocabulary = known.tensor().to(self.home)

    def with_words(self, rows: Mapping[str, Tensor]) -> dict[str, Any]:
        """Rows by the names of the state, codes as the words that they stand for."""
        known = Vocabulary.of(self.vocabulary)
        return {name: known.decode(value) if name in known.columns else value for name, value in rows.items()}


def named_rows(stage: HoldsWords, inputs: Sequence[Any]) -> dict[str, Tensor]:
    """The inputs by the names that the state has for them, ``ids`` and ``rows_0``, ``rows_1``, ...

    Raises:
        ValueError: inputs that do not share their first dimension, or of another width than the state's.
    """
    *rows, row_id = inputs
    names = (f"rows_{number}" for number in range(len(rows)))
    found = {name: stage.coded(name, value).to(row_id.device) for name, value in zip(names, rows)}
    for key, (name, value) in zip(stage.in_keys, found.items()):
        held = value if stage.is_empty else stage.state()[name]
        if value.shape[:1] != row_id.shape or value.shape[1:] != held.shape[1:]:
            raise ValueError(
                f"{type(stage).__name__} expects {key!r} of shape ({row_id.shape[0]}, {', '.join(map(str, held.shape[1:]))}) "
                f"beside {stage.in_keys[-1]!r} of shape {tuple(row_id.shape)}, got {tuple(value.shape)}. Rows of all sites must "
                f"come from one selection (SelectTokens)."
            )
    return {"ids": row_id.long(), **found}


def same_kind(owner: str, what: object, held: Tensor, came: Tensor) -> None:
    """An error unless rows have the width of those held, and are whole numbers or not as they are."""
    if held.shape[1:] != came.shape[1:] or held.is_floating_point() != came.is_floating_point():
        raise ValueError(
            f"{owner} has seen {what} of shape {tuple(held.shape[1:])} a row and {held.dtype}, and now gets "
            f"{tuple(came.shape[1:])} and {came.dtype}. Give every batch the same kind, or reset()."
        )
