"""A record beside tensors in one file, sealed by a hash of both: what a run leaves on the disk is read back whole or not at all.

The file is in the safetensors format: tensors and one JSON record, read by a parser that checks everything and runs nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdgeom.files.errors import StoreError
from tdgeom.files.json_text import canonical_json, read_json
from tdgeom.files.shard_writing import bytes_of, write_shard
from tdgeom.files.shards import Shard

__all__ = ["read_record", "seal_of", "write_record"]

RECORD = "record"
_LARGEST_RECORD = 16 * 2**20


def write_record(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> str:
    """Write tensors and a record; the record's seal, by which another file can name this one.

    Raises:
        StoreError: the disk refused; ``path`` is then as it was.
    """
    seal = seal_of(tensors, record)
    text = json.dumps({**record, "sha256": seal}, allow_nan=False).encode()
    write_shard(path, {**tensors, RECORD: torch.frombuffer(bytearray(text), dtype=torch.uint8)})
    return seal


def read_record(
    file: Shard, check: Callable[[Any], None] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A file's record (with its seal, "sha256") and its other tensors; ``check`` sees the record before anything else is read.

    Raises:
        StoreError: a damaged or changed file.
    """
    record = read_json(
        bytes(file.whole(RECORD).view(torch.uint8).numpy()), f"the record of {file.path}", _LARGEST_RECORD
    )
    if check is not None:
        check(record)
    held = {name: file.whole(name) for name in file.tensors if name != RECORD}
    if not isinstance(record, dict) or record.get("sha256") != seal_of(held, record):
        raise StoreError("its SHA-256 is not the one that was written: it was damaged or changed.")
    return record, held


def seal_of(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> str:
    """SHA-256 over the record and every tensor: a flipped bit would else become a wrong number."""
    told = {name: value for name, value in record.items() if name != "sha256"}
    digest = hashlib.sha256(canonical_json(told).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(canonical_json([name, list(value.shape), str(value.dtype)]).encode())
        digest.update(bytes_of(value))
    return digest.hexdigest()
