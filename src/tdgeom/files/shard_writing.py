"""Writing a shard: named tensors in one safetensors file, whole or not at all, hashed on the way.

The library's own writer names no error of the system, opens the path by name, and its file can only be hashed once it is
there, which takes a fifth longer (``tests/benchmarks/store.py``); it checks every header that is read (``shards``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from tdgeom.files.atomic import sha256_of, write_whole
from tdgeom.files.errors import StoreError
from tdgeom.files.shards import CODES, LARGEST_HEADER

__all__ = ["bytes_of", "write_shard"]


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write a safetensors file whole or not at all; (its bytes, its SHA-256).

    Raises:
        StoreError: a dtype that shards do not hold, too many names, or the disk refused.
    """
    # the widest first: every tensor then starts at a multiple of its own item size
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    chunks = [_header({name: tensors[name] for name in names}, path)]
    chunks += [bytes_of(tensors[name]) for name in names]
    # hashlib, write() and fsync() let go of the interpreter lock: the hash costs next to no time of its own
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(sha256_of, chunks)
        write_whole(path, chunks)
        return sum(len(chunk) for chunk in chunks), digest.result()


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes, in the order of its dimensions."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _header(tensors: Mapping[str, Tensor], path: Path) -> memoryview:
    header = {}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in CODES:
            raise StoreError(
                f"{name!r} has dtype {tensor.dtype}, which shards do not hold; they hold {[str(one) for one in CODES]}."
            )
        begin, end = end, end + tensor.numel() * tensor.element_size()
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
    return memoryview(len(text).to_bytes(8, "little") + text)
