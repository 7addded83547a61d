"""Labels that are names: which class number each has, and what a state is renumbered to when further names come.

Classes are numbered in the order of their names, so that neither the order of rows nor their split into shards has a part in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.core.streaming_stage import StreamingStage, tensor_text, text_tensor
from tdgeom.core.words import Words, class_names, class_numbers, integers_with_gaps

__all__: list[str] = []


class NamesClasses(StreamingStage):
    """A streaming stage whose labels may be names; it holds the names as a piece of state of its own."""

    takes_words = frozenset({"carried"})
    ignore_index: int
    class_texts: Tensor

    def add_class_names(self) -> None:
        """Declare the names; last, for the first piece of state says whether there are rows."""
        self.add_state("class_texts", torch.uint8)

    @property
    def names(self) -> list[str]:
        """The classes' names so far as JSON, in the order of their numbers; none where labels are numbers."""
        return (tensor_text(self.class_texts) or "").splitlines()

    @property
    def classes(self) -> list[Any]:
        """The classes' names, in the order of their numbers; empty where labels are numbers."""
        return [json.loads(name) for name in self.names]

    def numbered(self, label: Any, key: Key) -> Tensor:
        """Labels as numbers; names not met before get a place among the others, and the state is renumbered."""
        held = self.names
        if isinstance(label, Words):
            owner = type(self).__qualname__
            numbers = None if held else integers_with_gaps(label, self.ignore_index, owner, key)
        else:
            numbers = label
        if numbers is not None and not held:
            return numbers
        if not isinstance(label, Words):
            label = Words(None if one == self.ignore_index else one for one in label.tolist())
        if not held and not self.is_empty:
            raise ValueError(
                f"{type(self).__name__} has seen labels at {key!r} that are numbers and now gets names, such as "
                f"{class_names(label)[:3]}. Give every batch the same kind, or reset()."
            )
        names = class_names(label, held)
        self.rename(names)
        return class_numbers(label, names, self.ignore_index)

    def rename(self, names: Sequence[str]) -> None:
        """Give the state the numbers that the classes have among these names."""
        held = self.names
        if list(names) == held:
            return
        if held and not self.is_empty:
            self.renumber(torch.tensor([names.index(name) for name in held]), len(names))
        self.class_texts = text_tensor("\n".join(names)).to(self.class_texts.device)

    def renumber(self, places: Tensor, classes: int) -> None:
        """Move class i of the state to ``places[i]``, of ``classes``."""
        raise TypeError(f"{type(self).__name__} defines no renumber(): move the classes of its state there.")

    def agree_on_classes(self, other: Any) -> Any:
        """Another with the names of both, as the own has now; the other itself is left as it is."""
        if bool(self.names) != bool(other.names):
            raise ValueError(
                f"{type(self).__name__} cannot merge labels that are names with labels that are numbers: {self.classes[:3]} and "
                f"{other.classes[:3]}."
            )
        if self.names == other.names:
            return other
        names = sorted({*self.names, *other.names})
        self.rename(names)
        twin = other.with_state({name: value.clone() for name, value in other.state().items()})
        twin.rename(names)
        return twin


def named_label(label: Any) -> Words | None:
    """What a user hands over as labels, as words; None where it is numbers.

    >>> named_label(["a", "b"]), named_label([0, 1]) is None
    (Words(['a', 'b']), True)
    """
    if isinstance(label, Words):
        return label
    listed = label.tolist() if isinstance(label, np.ndarray) and label.dtype.kind in "OUS" else label
    listed = list(listed) if isinstance(listed, pd.Series) else listed
    if not isinstance(listed, list | tuple) or not any(isinstance(one, str) or one is None for one in listed):
        return None
    return Words(listed)


def numbers_of(label: Any, names: Sequence[str], ignore_index: int, owner: str, key: Key) -> Tensor:
    """Labels as a fitted probe numbers them: words by the names of its classes.

    Raises:
        ValueError: a name that it does not know, names for a probe fitted on numbers, or the reverse.
    """
    if not isinstance(label, Words):
        if names:
            raise ValueError(
                f"{owner} was fitted on classes with names, {[json.loads(name) for name in names[:6]]}, and is given numbers at "
                f"{key!r}. Give names."
            )
        return label
    if names:
        return class_numbers(label, names, ignore_index)
    numbers = integers_with_gaps(label, ignore_index, owner, key)
    if numbers is None:
        raise ValueError(
            f"{owner} was fitted on labels that are numbers and is given names at {key!r}. Give numbers."
        )
    return numbers


def moved_labels(label: Tensor, places: Tensor) -> Tensor:
    """Class numbers (N,) as others; below 0 there is no class."""
    return torch.where(label < 0, label, places.to(label.device)[label.clamp(min=0)])


def moved_targets(
    moments: Mapping[str, Tensor], places: Tensor, classes: int, before: int = 0
) -> dict[str, Tensor]:
    """Moments whose targets, behind ``before`` others, are moved to ``places`` among ``classes``."""
    mean = moments["target_mean"]
    width = before + classes
    behind = mean.shape[-1] - before  # classes that were met with rows to learn from
    at = torch.cat([torch.arange(before), before + places[:behind]]).to(mean.device)
    found = dict(moments)
    found["target_mean"] = mean.new_zeros(*mean.shape[:-1], width).index_copy(-1, at, mean)
    cross, square = moments["cross_scatter"], moments["target_scatter"]
    found["cross_scatter"] = cross.new_zeros(*cross.shape[:-1], width).index_copy(-1, at, cross)
    rows = square.new_zeros(*square.shape[:-1], width).index_copy(-1, at, square)
    found["target_scatter"] = square.new_zeros(*square.shape[:-2], width, width).index_copy(-2, at, rows)
    return found
