"""The shards of a run, opened as what the catalogue says they are, and read whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.words import Vocabulary, Words
from tdgeom.files.atomic import file_sha256
from tdgeom.files.errors import StoreError
from tdgeom.files.shards import Shard
from tdgeom.store.catalogue import Catalogue
from tdgeom.store.run_records import ShardRecord
from tdgeom.store.shard_layout import WORDS, ShardLayout, StoredTensor

__all__ = [
    "check_hash",
    "decoded_rows",
    "open_shard",
    "open_shards",
    "read_tensors",
    "read_vocabulary",
    "spelled_out",
]


def open_shard(
    folder_of_run: Path, record: ShardRecord, held: Sequence[StoredTensor], rows: bool = True
) -> Shard:
    """A shard with (rows of) every tensor, as the layout says.

    Raises:
        StoreError: it is missing, damaged or another one.
    """
    shard = Shard(folder_of_run / record.name, size=record.bytes)
    leading = (record.rows,) if rows else ()
    for name, (dtype, shape) in (part for one in held for part in one.parts.items()):
        placed, told = shard.place(name), (*leading, *shape)
        if placed.dtype != dtype or placed.shape != told:
            raise StoreError(
                f"{shard.path}: tensor {name!r} is {placed.dtype} of shape {placed.shape}, the catalogue says {dtype} of shape "
                f"{told}: the shard is damaged or was exchanged."
            )
    return shard


def open_shards(folder_of_run: Path, layout: ShardLayout, records: Sequence[ShardRecord]) -> list[Shard]:
    """All shards of a run, each holding what the layout says.

    Raises:
        StoreError: one does not.
    """
    if not layout.rows and len(records) != 1:
        raise StoreError(
            f"{folder_of_run} should hold one file, {len(records)} are listed: the run is damaged."
        )
    return [open_shard(folder_of_run, record, layout.entries, layout.rows) for record in records]


def check_hash(path: Path, record: ShardRecord) -> None:
    """Raise a ``StoreError`` unless a file is the shard that was written."""
    digest = file_sha256(path)
    if digest != record.sha256:
        raise StoreError(
            f"{path} is not what was written: its SHA-256 differs ({digest[:16]}..., not {record.sha256[:16]}...), so a bit "
            f"has changed."
        )


def read_vocabulary(shard: Shard) -> Vocabulary:
    """The words of a shard's rows.

    Raises:
        StoreError: it holds none, or they are damaged.
    """
    placed = shard.place(WORDS)
    try:
        if placed.dtype != torch.uint8 or len(placed.shape) != 1:
            raise ValueError(f"it is {placed.dtype} of shape {placed.shape}")
        return Vocabulary.of(shard.whole(WORDS))
    except (ValueError, TypeError, RecursionError) as error:
        raise StoreError(f"{shard.path} holds words that cannot be read ({error}): it is damaged.") from error


def spelled_out(codes: Tensor, vocabulary: Vocabulary, where: object) -> Words:
    """The words of a column's codes.

    Raises:
        StoreError: a code without a word.
    """
    try:
        return vocabulary.decode(codes)
    except (KeyError, ValueError) as error:
        raise StoreError(
            f"{where} holds the code {error} of a word that it does not hold: it is damaged."
        ) from error


def read_tensors(catalogue: Catalogue, run: str, layout: ShardLayout) -> dict[str, Any]:
    """Every tensor of a run by its name, whole and in memory, from shards that are what was written."""
    records = catalogue.shards(run)
    shards = open_shards(catalogue.folder_of(run), layout, records)
    for shard, record in zip(shards, records):
        check_hash(shard.path, record)
    if not layout.rows:
        return {one.name: shards[0].whole(one.name) for one in layout.entries}
    found: dict[str, Any] = {
        one.name: torch.cat(
            [torch.empty((0, *one.shape), dtype=one.dtype)]
            + [decoded_rows(shard, one, 0, record.rows) for shard, record in zip(shards, records)]
        )
        for one in layout.entries
    }
    if layout.words:
        vocabulary = Vocabulary()
        for shard in shards:
            vocabulary.update(read_vocabulary(shard))
        for one in layout.entries:
            if one.key in layout.words:
                found[one.name] = spelled_out(found[one.name], vocabulary, f"run {run}")
    return found


def decoded_rows(shard: Shard, held: StoredTensor, begin: int, end: int) -> Tensor:
    """Rows of a tensor, in the dtype they came in."""
    return held.decoded(lambda name: shard.rows(name, begin, end))
