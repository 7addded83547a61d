"""Bundles read back: every file checked against its hash, nothing outside the folder, nothing trusted."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tdgeom.core.visible_text import visible
from tdgeom.files.atomic import explained, file_sha256
from tdgeom.files.errors import StoreError
from tdgeom.files.json_text import read_json_file
from tdgeom.files.table_files import read_table

__all__ = ["ARRAYS", "METADATA", "SCHEMA_VERSION", "TABLE_ENDINGS", "Bundle", "read_bundle"]

SCHEMA_VERSION = "1.0"
METADATA = "metadata.json"
ARRAYS = ("eigenvalues", "neighbors", "result", "baseline", "baseline_neighbors")
TABLE_ENDINGS = ("csv", "json")
_LARGEST_JSON = 64 * 2**20
# what a damaged archive raises; RuntimeError: an encrypted member, or one packed by a method that zipfile does not know
_DAMAGED = (ValueError, OSError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error)
_LEAST_ARRAYS, _MOST_PACKED = 16 * 2**20, 100  # measured numbers pack to a half, repeated ones to a tenth


@dataclass(frozen=True)
class Bundle:
    """A bundle read back.

    Attributes:
        tables: frames by name, such as "metrics", "novelty" and "diagnostics/normalization_ablation".
        arrays: by archive ("eigenvalues", "neighbors", "result", "baseline"), then by name.
        metadata: model, data, settings, versions; ``"files"`` holds every file's hash.
        folder: where it lies.
    """

    tables: Mapping[str, pd.DataFrame]
    arrays: Mapping[str, Mapping[str, np.ndarray]]
    metadata: Mapping[str, Any]
    folder: Path

    def __repr__(self) -> str:
        arrays = {name: list(found) for name, found in self.arrays.items() if found}
        return visible(f"Bundle(tables {list(self.tables)}, arrays {arrays} in {str(self.folder)!r})")


def read_bundle(folder: Path) -> Bundle:
    """Tables, arrays and metadata of a bundle whose files are all as they were written.

    Raises:
        FileNotFoundError: no bundle there. ValueError: a file is missing or changed, or the schema is newer.
    """
    path = folder / METADATA
    try:
        with explained(f"reading {path}"):
            is_there = path.is_file()
        if not is_there:
            inner = sorted(found.parent for found in folder.glob(f"*/{METADATA}"))
            remedy = "Give the folder that --out named."
            if inner:
                remedy = f"There is one in {', '.join(map(str, inner[:3]))}{' ...' if len(inner) > 3 else ''}: give that."
            raise FileNotFoundError(f"{folder} holds no bundle: there is no {METADATA}. {remedy}")
        if path.is_symlink():
            raise ValueError(f"{path} is a symbolic link, which a bundle never holds: it was tampered with.")
        metadata = read_json_file(path, _LARGEST_JSON)
        _refuse_other(metadata, path)
        tables: dict[str, pd.DataFrame] = {}
        arrays: dict[str, dict[str, np.ndarray]] = {name: {} for name in ARRAYS}
        columns = metadata.get("columns") if isinstance(metadata.get("columns"), dict) else {}
        for name, digest in metadata["files"].items():
            file = _inside(folder, name)
            if file_sha256(file) != digest:
                raise ValueError(
                    f"{file} has changed since the bundle was written: its SHA-256 differs from {METADATA}."
                )
            stem, _, ending = name.rpartition(".")
            if ending == "npz" and stem in ARRAYS:
                arrays[stem] = _read_arrays(file)
            elif ending in TABLE_ENDINGS and stem not in tables:  # both formats hold the same
                tables[stem] = read_table(file, columns.get(stem))
    except StoreError as error:
        raise ValueError(f"the bundle cannot be read: {error}") from error
    except FileNotFoundError:
        raise
    except ValueError as error:  # which may quote what the files hold
        raise ValueError(visible(error)) from error
    return Bundle(tables, arrays, metadata, folder.resolve())


def _refuse_other(metadata: Any, path: Path) -> None:
    if not isinstance(metadata, dict) or not isinstance(metadata.get("files"), dict):
        raise ValueError(f"{path} lists no files: it was not written by tdgeom.")
    version = str(metadata.get("artifact_schema_version"))
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise ValueError(
            f"{path.parent} has schema {version}; this version reads {SCHEMA_VERSION}. Use a matching tdgeom."
        )


def _inside(folder: Path, name: str) -> Path:
    file = folder / name
    is_linked = file.is_symlink() or (file.parent != folder and file.parent.is_symlink())
    if not re.fullmatch(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?", name) or ".." in name or is_linked:
        raise ValueError(f"{folder / METADATA} names the file {name!r}, which is not one inside the bundle.")
    if not file.is_file():
        raise ValueError(f"{file} is missing: the bundle is incomplete.")
    return file


def _read_arrays(file: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > _LEAST_ARRAYS + _MOST_PACKED * file.stat().st_size:
            raise ValueError(
                f"it has {file.stat().st_size:,} bytes and unpacks to {unpacked:,}: a decompression bomb"
            )
        with np.load(file, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}
    except _DAMAGED as error:
        raise ValueError(f"{file} is no archive of arrays ({error}): the bundle is damaged.") from error
