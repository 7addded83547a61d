"""Bundles: tables, arrays and metadata in one folder, written whole or not at all and hashed."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tdgeom.files.atomic import file_sha256, is_taken, whole_folder
from tdgeom.files.errors import StoreError
from tdgeom.files.json_text import plain, read_json_file
from tdgeom.files.table_files import read_table, write_table

__all__ = ["METADATA", "SCHEMA_VERSION", "Bundle", "check_target", "read_bundle", "safe_name", "write_bundle"]

SCHEMA_VERSION = "1.0"
METADATA = "metadata.json"
ARRAYS = ("eigenvalues", "neighbors", "result", "baseline")
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


def safe_name(name: str) -> str:
    """A name as a single path component: nothing in it can leave the folder.

    >>> safe_name("../../x y")
    'x_y'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "_", str(name)).strip("._-") or "unnamed"


def check_target(folder: Path, mode: str, overwrite: bool) -> None:
    """Refuse what ``write_bundle`` would refuse; to be asked before the work as well."""
    if mode not in ("bundle", "csv", "json"):
        raise ValueError(f"save_mode takes 'bundle', 'csv' or 'json', got {mode!r}.")
    folder = folder.absolute()
    if not is_taken(folder):
        return
    if not overwrite:
        raise FileExistsError(
            f"{folder} exists already: give another folder, or overwrite=True (--overwrite) to replace a bundle there."
        )
    if not (folder / METADATA).is_file():
        raise FileExistsError(
            f"{folder} exists and is no bundle (it has no {METADATA}), so it is not overwritten."
        )


def write_bundle(
    folder: Path,
    tables: Mapping[str, pd.DataFrame],
    arrays: Mapping[str, Mapping[str, Any]],
    metadata: Mapping[str, Any],
    mode: str = "bundle",
    overwrite: bool = False,
) -> Path:
    """Write a bundle, whole or not at all; its folder.

    Args:
        folder: a new or empty folder, or with ``overwrite`` an earlier bundle's.
        tables: frames by name; a name may lie in a folder of the bundle ("diagnostics/x").
        arrays: NumPy archives by name (one of ``ARRAYS``), each a mapping from a name inside it; empty ones are left out.
        metadata: anything; kept as plain JSON values.
        mode: "bundle" or "csv" (tables as CSV), or "json".

    Raises:
        FileExistsError: the folder is there. OSError: the disk refused; nothing is left behind.
    """
    check_target(folder, mode, overwrite)
    folder = folder.absolute()
    with whole_folder(folder, replace=overwrite) as draft:
        for name, table in tables.items():
            write_table(draft / f"{name}.{'json' if mode == 'json' else 'csv'}", table)
        for name, members in arrays.items():
            if members:
                np.savez_compressed(draft / f"{name}.npz", **members)
        written = sorted(path for path in draft.rglob("*") if path.is_file())
        files = {path.relative_to(draft).as_posix(): file_sha256(path) for path in written}
        told = plain({"artifact_schema_version": SCHEMA_VERSION, **metadata, "files": files})
        text = json.dumps(told, indent=2, allow_nan=False)
        (draft / METADATA).write_text(text + "\n", encoding="utf-8")
    return folder


def read_bundle(folder: Path) -> Bundle:
    """Tables, arrays and metadata of a bundle whose files are all as they were written.

    Raises:
        FileNotFoundError: no bundle there. ValueError: a file is missing or changed, or the schema is newer.
    """
    path = folder / METADATA
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no bundle: there is no {METADATA}. Give the folder that --out named."
        )
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link, which a bundle never holds: it was tampered with.")
    try:
        metadata = read_json_file(path, _LARGEST_JSON)
        _refuse_other(metadata, path)
        tables: dict[str, pd.DataFrame] = {}
        arrays: dict[str, dict[str, np.ndarray]] = {name: {} for name in ARRAYS}
        for name, digest in metadata["files"].items():
            file = _inside(folder, name)
            if file_sha256(file) != digest:
                raise ValueError(
                    f"{file} has changed since the bundle was written: its SHA-256 differs from {METADATA}."
                )
            stem, _, ending = name.rpartition(".")
            if ending == "npz" and stem in ARRAYS:
                arrays[stem] = _read_arrays(file)
            elif ending in ("csv", "json"):
                tables[stem] = read_table(file)
    except StoreError as error:
        raise ValueError(f"the bundle cannot be read: {error}") from error
    missing = {"metrics", "novelty"} - set(tables)
    if missing:
        raise ValueError(f"{folder} lacks the tables {sorted(missing)}: the bundle is incomplete.")
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
