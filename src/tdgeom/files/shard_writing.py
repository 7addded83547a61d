"""Writing a shard: named tensors in one safetensors file, whole or not at all, hashed on the way."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from tdgeom.files.atomic import explain, open_regular, write_whole
from tdgeom.files.errors import StoreError
from tdgeom.files.shards import CODES, LARGEST_HEADER

__all__ = ["file_sha256", "write_shard"]

_STEP = 1 << 18  # bytes a read() or write(): up to three times as fast as whole tensors at once, on Linux


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write a safetensors file whole or not at all; (its bytes, its SHA-256).

    Raises:
        StoreError: a dtype that shards do not hold, too many names, or the disk refused.
    """
    # the widest first: every tensor then starts at a multiple of its own item size
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    chunks = [_header({name: tensors[name] for name in names}, path)]
    chunks += [_bytes_of(tensors[name]) for name in names if tensors[name].numel()]

    def write(handle: BinaryIO) -> None:
        for chunk in chunks:
            _write_all(handle, chunk)

    # hashlib, write() and fsync() let go of the interpreter lock: the hash costs next to no time of its own
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(_sha256_of, chunks)
        write_whole(path, write)
        return sum(len(chunk) for chunk in chunks), digest.result()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    try:
        with open_regular(path) as handle:
            return _sha256_of(iter(lambda: handle.read(_STEP), b""))
    except OSError as error:
        raise explain(error, f"reading {path}") from error


def _sha256_of(chunks: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _header(tensors: Mapping[str, Tensor], path: Path) -> bytes:
    header = {}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in CODES:
            raise StoreError(
                f"{name!r} has dtype {tensor.dtype}, which shards do not hold; they hold {[str(one) for one in CODES]}."
            )
        begin, end = end, end + math.prod(tensor.shape) * tensor.element_size()
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LARGEST_HEADER:
        raise StoreError(
            f"{path.name}: {len(tensors)} tensors need a header of {len(text):,} bytes; {LARGEST_HEADER:,} are allowed."
        )
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def _write_all(handle: BinaryIO, chunk: bytes | memoryview) -> None:
    rest = memoryview(chunk)
    while rest.nbytes:
        rest = rest[handle.write(rest[:_STEP]) :]
