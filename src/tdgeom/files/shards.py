"""Shards: named tensors in one safetensors file, whose header is checked in full before a byte of it is believed.

Why safetensors and not memory-mapped TensorDicts: written and brought to the disk twice as fast, random batches read at least
as fast (``tests/benchmarks/store.py`` measures both); and one file a shard makes the rename, the hash and the
flipped bit one thing each. Any safetensors reader opens it.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tdgeom.files.atomic import explained, open_regular
from tdgeom.files.errors import StoreError
from tdgeom.files.json_text import read_json

__all__ = ["CODES", "LARGEST_HEADER", "MOST_DIMENSIONS", "MOST_VALUES", "Shard", "bits_of", "from_bits"]

CODES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
LARGEST_HEADER = 16 * 2**20
MOST_DIMENSIONS = 16
MOST_VALUES = 1 << 48  # of one tensor, its empty dimensions counted as 1
_DTYPES = {code: dtype for dtype, code in CODES.items()}


@dataclass(frozen=True)
class Placed:
    """Where a tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """The byte behind it."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


class Shard:
    """A safetensors file, open for reading.

    Raises:
        StoreError: the file is not what its header says (or the catalogue, by ``size``).
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        with explained(f"reading {path}"), open_regular(path) as handle:
            self.size = os.fstat(handle.fileno()).st_size
            if size is not None and self.size != size:
                raise StoreError(
                    f"{path} has {self.size:,} bytes where the catalogue says {size:,}: it was cut short or changed."
                )
            self.tensors = self._read_header(handle)

    def place(self, name: str) -> Placed:
        """Where a tensor lies."""
        if name not in self.tensors:
            raise StoreError(f"{self.path} holds no tensor {name!r}; it holds {sorted(self.tensors)[:12]}.")
        return self.tensors[name]

    def whole(self, name: str) -> Tensor:
        """One tensor, as a copy in memory."""
        one = self.place(name)
        return self._copy(one, one.offset, one.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor, as a copy; nothing stays mapped, so memory holds only what is asked for."""
        one = self.place(name)
        return self._copy(one, one.offset + start * one.row_bytes, (stop - start, *one.shape[1:]))

    def bits(self, name: str) -> np.ndarray:
        """A tensor's raw bits, as integers of its item size and of its shape, in the mapped file: read-only."""
        one = self.place(name)
        return self._mapped()[one.offset : one.end].view(bits_of(one.dtype)).reshape(one.shape)

    def _copy(self, one: Placed, offset: int, shape: tuple[int, ...]) -> Tensor:
        count = math.prod(shape) * one.dtype.itemsize
        with explained(f"reading {self.path}"), open_regular(self.path) as handle:
            data = np.fromfile(handle, dtype=np.int8, count=count, offset=offset)
        if len(data) != count:
            raise StoreError(f"{self.path} ends early: it was cut short while open.")
        return from_bits(data.view(bits_of(one.dtype)).reshape(shape), one.dtype)

    def unmap(self) -> None:
        """Let go of the mapped file, which holds a file handle."""
        self._map = None

    def _mapped(self) -> np.ndarray:
        with explained(f"reading {self.path}"):
            if self._map is None:
                with open_regular(self.path) as handle:
                    self._refuse_size(os.fstat(handle.fileno()).st_size)
                    self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
                with suppress(AttributeError, OSError):  # only advice, and not everywhere to be had
                    self._map.madvise(mmap.MADV_RANDOM)
            # to read behind the end of a file that was cut kills a process
            self._refuse_size(self._map.size())
        return np.frombuffer(self._map, dtype=np.int8)

    def _refuse_size(self, size: int) -> None:
        if size != self.size:
            raise StoreError(f"{self.path} changed its size: shards never change, so it is damaged.")

    def _read_header(self, handle: FileIO) -> dict[str, Placed]:
        length = int.from_bytes(handle.read(8), "little")
        if length > min(LARGEST_HEADER, self.size - 8):
            raise StoreError(
                f"{self.path}: its header claims {length:,} bytes in a file of {self.size:,}: no shard, or a damaged one."
            )
        header = read_json(handle.read(length), f"the header of {self.path}", LARGEST_HEADER)
        try:
            with safe_open(
                self.path, framework="np"
            ):  # refuses entries that are none, overlaps, gaps and a wrong end
                header.pop("__metadata__", None)
        except SafetensorError as error:
            raise StoreError(f"{self.path} is no shard, or a damaged one: {error}.") from error
        return {name: self._placed(name, entry, 8 + length) for name, entry in header.items()}

    def _placed(self, name: str, entry: Mapping[str, Any], base: int) -> Placed:
        dtype, shape = _DTYPES.get(entry["dtype"]), tuple(entry["shape"])
        # an empty tensor may not claim a huge other dimension: it would be allocated by whoever fills it
        is_huge = len(shape) > MOST_DIMENSIONS or math.prod(size or 1 for size in shape) >= MOST_VALUES
        if dtype is None or is_huge or len(entry) > 3:
            raise StoreError(
                f"{self.path}: no shard holds a tensor {name[:80]!r} with the entry {str(entry)[:120]}."
            )
        return Placed(dtype, shape, base + entry["data_offsets"][0])


def bits_of(dtype: torch.dtype) -> np.dtype[Any]:
    """NumPy's integers of the same item size: it has no bfloat16 and no float8."""
    return np.dtype(f"i{dtype.itemsize}")


def from_bits(bits: np.ndarray, dtype: torch.dtype) -> Tensor:
    """The tensor that shares memory with these bits."""
    raw = torch.from_numpy(bits)
    # a hostile file may hold bytes other than 0 and 1 as booleans, which torch does not expect
    return raw.ne(0) if dtype == torch.bool else raw.view(dtype)
