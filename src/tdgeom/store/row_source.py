"""A stored run read again row by row: a source of batches, and rows by their number."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, overload

import numpy as np
from tensordict import TensorDict, TensorDictBase, is_non_tensor
from torch import Tensor

from tdgeom.core.keys import as_key
from tdgeom.core.row_ids import POSITION_BITS
from tdgeom.core.visible_text import visible
from tdgeom.core.words import Vocabulary, Words, put
from tdgeom.files.shards import Shard, bits_of, from_bits
from tdgeom.store.catalogue import Catalogue
from tdgeom.store.run_shards import check_hash, decoded_rows, open_shard, read_vocabulary, spelled_out
from tdgeom.store.shard_layout import StoredTensor
from tdgeom.store.shuffled_rows import CHUNK_ROWS, MIXED_CHUNKS, ShuffledRows

__all__ = ["RowSource"]

_MOST_MAPS = 100  # some systems allow a process 256 open files


class RowSource:
    """The rows of a stored run, a source of batches for ``run``.

    Iterating gives TensorDicts of batch size [] with ``("tokens", site)``, ``("carried", name)`` for what ``also=`` carried
    (words as lists, which are found under ``("tokens", name)`` too), ``"row_id"``, and, following from these,
    ``"document_id"`` (the sequence, unless one was carried) and ``"position"``;
    a batch never spans two shards, so the last of a shard may be smaller. ``source[rows]`` reads any rows by their
    number in the run (a list, a slice or a mask), ``source[3]`` one row as a nested dict. ``len(source)`` is the number of rows
    (as ``source.rows``), so that it is a map-style data set of torch's: ``DataLoader(source, batch_size=64, shuffle=True,
    num_workers=2)``, ``Subset`` and ``random_split`` take it. ``source.shuffled()`` reads faster, in chunks, in random order.

    ``source.sites`` are the sites whose rows it gives; ``source.about`` is what the store says of the run. With ``verify`` every
    shard is checked against its hash before the first of its rows is read.

    Raises:
        StoreError: a shard is missing, damaged or not what the catalogue says.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        run: str,
        entries: Sequence[StoredTensor],
        batch_rows: int,
        verify: bool = False,
        about: Mapping[str, Any] | None = None,
        words: Collection[tuple[str, ...]] = (),
    ) -> None:
        self.about = {"id": run, **(about or {})}
        self.words = frozenset(words)
        self.run, self.batch_rows, self.verify = run, batch_rows, verify
        self._folder = catalogue.folder_of(run)
        self._entries = list(entries)
        self._records = catalogue.shards(run)
        self._starts = np.array([0, *accumulate(one.rows for one in self._records)], dtype=np.int64)
        self.rows = int(self._starts[-1])
        self._vocabularies: dict[int, Vocabulary] = {}
        self._open: dict[int, Shard] = {}
        self._maps: dict[int, Shard] = {}  # the last one used at the end

    @property
    def sites(self) -> list[str]:
        """The sites whose rows it gives, in the order in which they were stored."""
        return ["/".join(entry.key[1:]) for entry in self._entries if entry.key[0] == "tokens"]

    def __repr__(self) -> str:
        sites = ", ".join(entry.key[-1] for entry in self._entries if entry.key[0] in ("tokens", "carried"))
        return visible(f"RowSource(run {self.run}: {self.rows:,} rows of {sites})")

    def __len__(self) -> int:
        return self.rows

    def shuffled(
        self, *, seed: int = 0, chunk_rows: int = CHUNK_ROWS, mixed_chunks: int = MIXED_CHUNKS
    ) -> ShuffledRows:
        """The rows in a random order, in batches, for workers and ranks: see ``ShuffledRows``."""
        return ShuffledRows(self, seed=seed, chunk_rows=chunk_rows, mixed_chunks=mixed_chunks)

    def __iter__(self) -> Iterator[TensorDict]:
        for number, record in enumerate(self._records):
            shard = self._shard(number)
            for begin in range(0, record.rows, self.batch_rows):
                end = min(record.rows, begin + self.batch_rows)
                columns = [decoded_rows(shard, entry, begin, end) for entry in self._entries]
                yield self._batch(columns, [number])

    @overload
    def __getitem__(self, rows: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, rows: Tensor | np.ndarray | Sequence[int] | slice) -> TensorDict: ...
    def __getitem__(
        self, rows: int | Tensor | np.ndarray | Sequence[int] | slice
    ) -> TensorDict | dict[str, Any]:
        """Rows by number, in the order given; one row, by a plain number, as a nested dict."""
        if isinstance(rows, bool):
            rows = [rows]  # no number, which is said below
        if isinstance(rows, int | np.integer):
            return self.__getitems__([int(rows)])[0]
        numbers = self._numbers(rows)
        shard_of = np.searchsorted(self._starts, numbers, side="right") - 1
        # opened, and so checked, before memory is asked for on the word of the catalogue
        touched = np.unique(shard_of).tolist()
        for number in touched:
            self._shard(number)
        parts = {name: part for entry in self._entries for name, part in entry.parts.items()}
        # raw bits: NumPy copies whole rows, torch value by value
        bits = {
            name: np.empty((len(numbers), *shape), bits_of(dtype)) for name, (dtype, shape) in parts.items()
        }
        for number in touched:
            here = np.flatnonzero(shard_of == number)
            local, shard = numbers[here] - self._starts[number], self._mapped(number)
            for name in bits:
                bits[name][here] = np.take(shard.bits(name), local, axis=0)
        found = {name: from_bits(bits[name], dtype) for name, (dtype, _) in parts.items()}
        return self._batch([entry.decoded(found.__getitem__) for entry in self._entries], touched)

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Rows one by one, as torch's loaders ask for those of a batch: nested dicts, which every collate function takes."""
        found = self[list(rows)]
        return [_row(found, place) for place in range(len(rows))]

    def _numbers(self, rows: Tensor | np.ndarray | Sequence[int] | slice) -> np.ndarray:
        if isinstance(rows, slice):
            return np.arange(*rows.indices(self.rows))
        given = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows)
        if given.dtype == bool and given.shape == (self.rows,):
            return np.flatnonzero(given)
        is_list = given.ndim == 1 and (not given.size or given.dtype.kind in "iu")
        if not is_list or (given.size and not -self.rows <= given.min() <= given.max() < self.rows):
            raise IndexError(
                f"rows are numbered 0 to {self.rows - 1} in run {self.run}, a list of numbers or a mask of all rows is asked "
                f"for; got {rows!s:.80}."
            )
        numbers = given.astype(np.int64)
        return np.where(numbers < 0, numbers + self.rows, numbers)

    def _shard(self, number: int) -> Shard:
        if number not in self._open:
            shard = open_shard(self._folder, self._records[number], self._entries)
            if self.verify:
                check_hash(shard.path, self._records[number])
            self._open[number] = shard
        return self._open[number]

    def _mapped(self, number: int) -> Shard:
        """A shard that will be mapped; only so many are at a time, as each takes one of the process's file handles."""
        self._maps.pop(number, None)
        self._maps[number] = self._open[number]
        if len(self._maps) > _MOST_MAPS:
            self._maps.pop(next(iter(self._maps))).unmap()
        return self._open[number]

    def _spelled_out(self, codes: Tensor, shards: Sequence[int]) -> Words:
        together = Vocabulary()
        for number in shards:
            if number not in self._vocabularies:
                self._vocabularies = {number: read_vocabulary(self._shard(number))} | (
                    self._vocabularies if len(shards) > 1 else {}
                )
            together.update(self._vocabularies[number])
        return spelled_out(codes, together, f"run {self.run}")

    def _batch(self, columns: Sequence[Tensor], shards: Sequence[int]) -> TensorDict:
        found = TensorDict({}, batch_size=[])
        sites = {entry.key for entry in self._entries}
        for entry, column in zip(self._entries, columns):
            if entry.key in self.words:
                words = self._spelled_out(column, shards)
                for key in {entry.key, ("tokens", *entry.key[1:])} - (sites - {entry.key}):
                    put(found, as_key(key), words)
            else:
                found.set(as_key(entry.key), column)
        row_id = found.get("row_id")
        carried = found.get(("carried", "document_id"), None)
        found.set("document_id", row_id >> POSITION_BITS if carried is None else carried)
        found.set("position", row_id & ((1 << POSITION_BITS) - 1))
        return found

    def __getstate__(self) -> dict[str, object]:
        # a mapped file does not travel to another process
        return {**self.__dict__, "_open": {}, "_maps": {}, "_vocabularies": {}}


def _row(rows: TensorDictBase, place: int) -> dict[str, Any]:
    """One of the rows, as a nested dict."""
    return {
        str(key): _row(value, place)
        if isinstance(value, TensorDictBase)
        else (value.data if is_non_tensor(value) else value)[place]
        for key, value in rows.items()
    }
