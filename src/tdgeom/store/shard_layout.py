"""What the shards of a run hold: which tensor lies where, in which dtype, and how it becomes a TensorDict again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.keys import Key, as_key, site_key
from tdgeom.files.errors import StoreError, StoreLookupError
from tdgeom.files.json_text import canonical_json, read_json
from tdgeom.files.shards import CODES, MOST_DIMENSIONS, MOST_VALUES
from tdgeom.model.guessed_sites import read_guess
from tdgeom.model.sites import KINDS
from tdgeom.store.stored_dtypes import SCALED, decode

__all__ = ["WORDS", "StoredTensor", "ShardLayout", "entries_of"]

WORDS = "#words"  # the vocabulary of a shard's own rows, as bytes
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in CODES}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a run.

    ``key``: where it is in a TensorDict. ``name``: what the shards call it. ``dtype``: as it came. ``stored``: as it lies
    in the shards. ``shape``: of one row (of the whole tensor, where the run has no rows).
    """

    key: tuple[str, ...]
    name: str
    dtype: torch.dtype
    stored: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in the shards."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.parts.values())

    @property
    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """(dtype, shape of one row) of what the shards hold of it, by name: the tensor, and its scales where it has them."""
        scales = {} if self.scale is None else {self.scale: (torch.float32, ())}
        return {self.name: (self.stored, self.shape), **scales}

    def decoded(self, part: Callable[[str], Tensor]) -> Tensor:
        """Rows in the dtype they came in, of the stored parts, which ``part`` gives by name."""
        return decode(part(self.name), None if self.scale is None else part(self.scale), self.dtype)

    @property
    def scale(self) -> str | None:
        """The name of its per-row scales, where it was cast to float8."""
        return self.name + "#scale" if self.stored != self.dtype and self.stored in SCALED else None


@dataclass(frozen=True)
class ShardLayout:
    """What the shards of a run hold.

    ``rows``: tensors are joined along their first dimension over all shards; else one shard holds them whole.
    ``several``: a list of TensorDicts, the position in the list being the first part of every key.
    ``values``: leaves that are no tensors; ``stacks``: the keys of those that hold one value a sequence.
    ``words``: the keys of rows whose numbers are codes of words, which every shard holds for its own rows (``WORDS``).
    """

    entries: tuple[StoredTensor, ...] = ()
    rows: bool = True
    batch_size: tuple[int, ...] = ()
    several: bool = False
    values: tuple[tuple[tuple[str, ...], Any], ...] = ()
    stacks: tuple[tuple[str, ...], ...] = ()
    words: tuple[tuple[str, ...], ...] = ()

    @property
    def by_key(self) -> dict[Key, StoredTensor]:
        """Entries by key."""
        return {as_key(entry.key): entry for entry in self.entries}

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of all tensors."""
        return sum(entry.row_bytes for entry in self.entries)

    def of_rows(self, sites: Sequence[str] | None = None, also: Sequence[str] = ()) -> list[StoredTensor]:
        """The tensors of these sites and carried values (default all), a carried ``document_id`` and, last, ``row_id``.

        Raises:
            StoreLookupError: the run has none of that name.
        """
        held = {entry.key: entry for entry in self.entries}
        for name in ("document_id", *also):  # runs of before keep these among the sites
            if ("carried", name) not in held and ("tokens", name) in held:
                held[("carried", name)] = replace(held.pop(("tokens", name)), key=("carried", name))
        given = [key for key in held if key[0] == "tokens"]
        wanted = given if sites is None else [("tokens", *site_key(site)) for site in sites]
        wanted = [key if key in held else _meant(key, held) for key in wanted]
        wanted += [("carried", name) for name in also]
        missing = [key[-1] for key in wanted if key not in held]
        if missing:
            names = [key[1] for key in held if len(key) > 1]
            raise StoreLookupError(f"the run holds no rows of {missing}; it holds {names[:24]}.")
        rest = [key for key in held if key[0] == "carried" and (sites is None or key[1] == "document_id")]
        return [held[key] for key in dict.fromkeys([*wanted, *rest, ("row_id",)])]

    def to_json(self) -> str:
        """As text for the catalogue."""
        told = asdict(self)
        for entry in told["entries"]:
            entry |= {name: _dtype_name(entry[name]) for name in ("dtype", "stored")}
        return canonical_json(told)

    @classmethod
    def from_json(cls, text: str, what: str) -> ShardLayout:
        """Parse what may be hostile.

        Raises:
            StoreError: it is no layout; ``what`` opens the message.
        """
        try:
            raw = {"stacks": [], "words": [], **read_json(text, what)}
            layout = cls(
                entries=tuple(map(_entry, raw["entries"])),
                rows=bool(raw["rows"]),
                batch_size=tuple(map(int, raw["batch_size"])),
                several=bool(raw["several"]),
                values=tuple((tuple(map(str, key)), value) for key, value in raw["values"]),
                stacks=tuple(tuple(map(str, key)) for key in raw["stacks"]),
                words=tuple(tuple(map(str, key)) for key in raw["words"]),
            )
            if layout.to_json() != canonical_json(raw):
                raise ValueError("it is not as it was written")
            _refuse_impossible(layout)
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{what} is damaged: {error}.") from error
        return layout


def _meant(key: tuple[str, ...], held: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The key of a site that was named as another library would; the key itself where nothing is meant."""
    guess = read_guess(key[-1], KINDS).site
    other = (*key[:-1], str(guess))
    return other if guess and other in held else key


def entries_of(
    tensors: Mapping[tuple[str, ...], tuple[torch.dtype, torch.dtype, Sequence[int]]],
) -> tuple[StoredTensor, ...]:
    """Entries from key -> (dtype, stored dtype, shape), each with a name of its own: the key's parts joined by slashes.

    Raises:
        StoreError: a dtype that shards do not hold. ValueError: a key that is no valid Unicode text.

    >>> [one.name for one in entries_of({("a", "b"): (torch.int8, torch.int8, ()), ("a/b",): (torch.int8, torch.int8, ())})]
    ['a/b', 'a/b#1']
    """
    used = {"__metadata__", WORDS}
    found = []
    for number, (key, (dtype, stored, shape)) in enumerate(tensors.items()):
        name = "/".join(key)
        _refuse_unkept(name, dtype)
        while name in used or name + "#scale" in used:
            name = f"{name}#{number}"
        used |= {name, name + "#scale"}
        found.append(StoredTensor(key, name, dtype, stored, tuple(shape)))
    return tuple(found)


def _refuse_unkept(name: str, dtype: torch.dtype) -> None:
    if dtype not in CODES:
        raise StoreError(
            f"{name!r} has dtype {dtype}, which shards do not hold; they hold {[_dtype_name(one) for one in CODES]}. Cast it, or "
            f"take it apart (torch.view_as_real for complex128)."
        )
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the key {name!r} is no valid Unicode text: {error}.") from error


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _entry(raw: Mapping[str, Any]) -> StoredTensor:
    key, shape = tuple(map(str, raw["key"])), tuple(map(int, raw["shape"]))
    return StoredTensor(key, str(raw["name"]), _DTYPES[raw["dtype"]], _DTYPES[raw["stored"]], shape)


def _refuse_impossible(layout: ShardLayout) -> None:
    for shape in (layout.batch_size, *(one.shape for one in layout.entries)):
        is_huge = len(shape) > MOST_DIMENSIONS or math.prod(size or 1 for size in shape) >= MOST_VALUES
        if is_huge or min(shape, default=0) < 0:
            raise ValueError(f"{str(shape)[:80]} is no shape")
    names = [name for one in layout.entries for name in one.parts]
    keys = [one.key for one in layout.entries] + [key for key, _ in layout.values]
    if len(set(names)) != len(names) or len(set(keys)) != len(keys):
        raise ValueError("a name or a key comes twice")
    values = dict(layout.values)
    if not all(isinstance(values.get(key), list) for key in layout.stacks):
        raise ValueError("a stack is no list")
    codes = {one.key for one in layout.entries if one.dtype == one.stored == torch.int64 and not one.shape}
    if not codes >= set(layout.words):
        raise ValueError("words without codes")
    if not all(keys) or {key[:n] for key in keys for n in range(1, len(key))} & set(keys):
        raise ValueError("a key is empty, or the parent of another")
