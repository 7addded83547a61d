"""Words: a column of values that are no numbers, one a row, and the codes that stand for them in a stage's state.

A code is a hash of the value, so every process, batch and shard gives a value the same one; a ``Vocabulary`` goes from codes
back to values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from tensordict import NonTensorStack, TensorDictBase, is_non_tensor
from torch import Tensor

from tdgeom.core.keys import Key

__all__ = ["Vocabulary", "Words", "class_names", "class_numbers", "integers_with_gaps", "put", "words_of"]


class Words:
    """Values that are no numbers, one a row: text, None, booleans, lists; as JSON has them.

    They are cut, chosen and moved as the tensors beside them are.

    >>> Words(["a", None, "b"])[torch.tensor([True, False, True])].tolist()
    ['a', 'b']
    """

    def __init__(self, values: Iterable[Any]) -> None:
        listed = values if isinstance(values, np.ndarray) and values.dtype == object else None
        if listed is None:
            plain = [_plain(value) for value in values]
            listed = np.empty(len(plain), dtype=object)
            for place, value in enumerate(plain):
                listed[place] = value
        self.values: np.ndarray = listed
        self.device = torch.device("cpu")

    @property
    def shape(self) -> torch.Size:
        """As of a tensor with a number a row."""
        return torch.Size(self.values.shape)

    @property
    def ndim(self) -> int:
        """1."""
        return 1

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)

    def __getitem__(self, rows: Any) -> Words:
        chosen = rows.cpu().numpy() if isinstance(rows, Tensor) else rows
        return Words(self.values[chosen])

    def __repr__(self) -> str:
        return f"Words({self.tolist()[:6]}{'' if len(self) <= 6 else f' ... {len(self)}'})"

    def tolist(self) -> list[Any]:
        """The values."""
        return list(self.values)

    def detach(self) -> Words:
        """Itself: there is no graph."""
        return self

    def to(self, *_: Any, **__: Any) -> Words:
        """Itself: words are on no device."""
        return self

    def is_floating_point(self) -> bool:
        """False."""
        return False

    def texts(self) -> list[str]:
        """Each value as JSON, one line of ASCII."""
        known: dict[str, str] = {}
        found = []
        for value in self.values:
            if isinstance(value, str):
                text = known.get(value)
                text = known.setdefault(value, json.dumps(value)) if text is None else text
            else:
                text = json.dumps(value, sort_keys=True)
            found.append(text)
        return found

    def together_with(self, more: Words) -> Words:
        """Both, one behind the other."""
        return Words(np.concatenate([self.values, more.values]))


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.generic | np.ndarray | Tensor):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: _plain(one) for name, one in value.items()}
    raise TypeError(
        f"expected text, None, booleans, numbers or lists of them in a column, got {type(value).__name__}: {str(value)[:60]!r}. "
        f"Give it as text (str(value)), or leave the column out."
    )


def words_of(value: Any, key: Key, owner: str) -> Words | None:
    """What a TensorDict holds at a key as words: a list, or its ``NonTensorData`` or ``NonTensorStack``; None for a tensor.

    Raises:
        TypeError: one value for a whole batch, or a value that is none of JSON's.
    """
    if isinstance(value, Words):
        return value
    if is_non_tensor(value):
        value = value.tolist() if isinstance(value, NonTensorStack) else value.data
    if isinstance(value, Tensor | TensorDictBase):
        return None
    if isinstance(value, np.ndarray) and value.ndim:
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise TypeError(
            f"{owner} expects a value a row or sequence at {key!r}, got one {type(value).__name__}: {str(value)[:60]!r}. Give a "
            f"list of them, such as [value] * batch_size."
        )
    try:
        return Words(value)
    except TypeError as error:
        raise TypeError(f"{owner}, at {key!r}: {error}") from None


def put(td: TensorDictBase, key: Key, value: Tensor | Words) -> None:
    """Set a tensor, or words as a list that is no tensor."""
    if isinstance(value, Words):
        td.set_non_tensor(key, value.tolist())
    else:
        td.set(key, value)


def code_of(text: str) -> int:
    """The code of a value's JSON: 63 bits of a hash."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class Vocabulary:
    """Values by their codes, and which pieces of a state hold codes; as bytes in a tensor it is part of that state.

    >>> vocabulary = Vocabulary()
    >>> codes = vocabulary.encode(Words(["a", None, "a"]))
    >>> Vocabulary.of(vocabulary.tensor()).decode(codes).tolist()
    ['a', None, 'a']
    """

    def __init__(self) -> None:
        self.columns: list[str] = []
        self._texts: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def encode(self, words: Words) -> Tensor:
        """The codes (N,) int64 of words, which are entered."""
        codes: dict[str, int] = {}
        found = np.empty(len(words), dtype=np.int64)
        for row, text in enumerate(words.texts()):
            code = codes.get(text)
            if code is None:
                code = codes[text] = code_of(text)
                self._enter(code, text)
            found[row] = code
        return torch.from_numpy(found)

    def decode(self, codes: Tensor) -> Words:
        """The words of codes (N,).

        Raises:
            KeyError: a code that was never entered.
        """
        values = {code: json.loads(self._texts[code]) for code in torch.unique(codes).tolist()}
        found = np.empty(len(codes), dtype=object)
        for row, code in enumerate(codes.tolist()):
            found[row] = values[code]
        return Words(found)

    def update(self, other: Vocabulary) -> None:
        """Enter all of another's."""
        for code, text in other._texts.items():
            self._enter(code, text)
        self.columns = list(dict.fromkeys([*self.columns, *other.columns]))

    def copy(self) -> Vocabulary:
        """The same, apart."""
        found = Vocabulary()
        found.update(self)
        return found

    def keep(self, codes: Iterable[int]) -> None:
        """Forget all but these."""
        self._texts = {code: self._texts[code] for code in sorted(set(codes)) if code in self._texts}

    def _enter(self, code: int, text: str) -> None:
        if self._texts.setdefault(code, text) != text:
            raise ValueError(
                f"two values of a column have one hash, {text[:60]} and {self._texts[code][:60]}: number them yourself."
            )

    def tensor(self) -> Tensor:
        """As bytes: the columns, then a value a line, by code, so that the same words are the same bytes."""
        lines = [json.dumps(self.columns), *(self._texts[code] for code in sorted(self._texts))]
        return torch.frombuffer(bytearray("\n".join(lines).encode()), dtype=torch.uint8)

    @classmethod
    def of(cls, state: Tensor) -> Vocabulary:
        """What ``tensor`` gave; empty for no bytes.

        Raises:
            ValueError: bytes that are no vocabulary.
        """
        found = cls()
        if state.numel():
            columns, *texts = bytes(state.cpu().numpy()).decode().split("\n")
            found.columns = list(json.loads(columns))
            found._texts = {code_of(text): text for text in texts}
        return found


def integers_with_gaps(words: Words, ignore_index: int, owner: str, key: Key) -> Tensor | None:
    """Whole numbers among which some are None, as a tensor with ``ignore_index`` there; None where the words are names.

    Raises:
        ValueError: numbers with a fraction among which some are None: no class, and no target.
    """
    given = {type(value) for value in words if value is not None}
    if float in given:
        raise ValueError(
            f"{owner} reads labels at {key!r}, which hold numbers with a fraction and other values (None?) beside them. A target "
            f"without a number is no row to learn from: leave such rows out, or name the classes."
        )
    if given != {int}:
        return None
    return torch.tensor([ignore_index if value is None else value for value in words])


def class_names(words: Words, held: Sequence[str] = ()) -> list[str]:
    """The classes that words name, as JSON, with those held before; in order, so that the numbers do not depend on the rows'.

    >>> class_names(Words(["b", None, "a"]))
    ['"a"', '"b"']
    """
    return sorted({*held, *(text for text in words.texts() if text != "null")})


def class_numbers(words: Words, names: Sequence[str], ignore_index: int = -100) -> Tensor:
    """The place of each word among the names, (N,) int64; None has no class.

    Raises:
        ValueError: a word that is not among the names.

    >>> class_numbers(Words(["b", None, "a"]), ['"a"', '"b"']).tolist()
    [1, -100, 0]
    """
    place = {name: number for number, name in enumerate(names)} | {"null": ignore_index}
    texts = words.texts()
    if unknown := sorted(set(texts) - set(place)):
        raise ValueError(
            f"the labels {unknown[:6]} are not among the classes seen before, {list(names)[:12]}."
        )
    return torch.tensor([place[text] for text in texts], dtype=torch.int64)
