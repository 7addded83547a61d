"""Bundles: tables, eigenvalues and metadata in one folder, written whole or not at all and hashed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

__all__ = ["SCHEMA_VERSION", "plain", "read", "safe_name", "write"]

SCHEMA_VERSION = "1.0"
METADATA = "metadata.json"
ARRAYS = ("eigenvalues", "neighbors")
_LARGEST_JSON = 64 * 2**20
_LEAST_ARRAYS, _MOST_PACKED = 16 * 2**20, 100  # measured numbers pack to a half, repeated ones to a tenth


def safe_name(name: str) -> str:
    """A name as a single path component: nothing in it can leave the folder.

    >>> safe_name("../../x y")
    'x_y'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "_", str(name)).strip("._-") or "unnamed"


def plain(value: Any) -> Any:
    """Plain JSON values: tensors, NumPy arrays and scalars unpacked, NaN and Inf as None, anything else as its string."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(part) for part in value]
    if isinstance(value, np.ndarray | torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    return None if value is pd.NA else str(value)


def write(
    folder: Path,
    tables: Mapping[str, pd.DataFrame],
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    metadata: Mapping[str, Any],
    mode: str,
    overwrite: bool,
) -> Path:
    """Write a bundle into a temporary folder beside ``folder``, then rename it into place.

    ``arrays`` are NumPy archives by name (one of ``ARRAYS``), each a mapping from a name inside it; empty ones are left out.
    """
    check_target(folder, mode, overwrite)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        for name, table in tables.items():
            _write_table(draft / f"{name}.{'json' if mode == 'json' else 'csv'}", table, mode)
        for name, members in arrays.items():
            if members:
                np.savez_compressed(draft / f"{name}.npz", **dict(members))
        files = {
            path.relative_to(draft).as_posix(): _sha256(path)
            for path in sorted(draft.rglob("*"))
            if path.is_file()
        }
        text = json.dumps(
            plain({"artifact_schema_version": SCHEMA_VERSION, **metadata, "files": files}),
            indent=2,
            allow_nan=False,
        )
        (draft / METADATA).write_text(text + "\n", encoding="utf-8")
        _sync(draft)
        draft.chmod(0o755)
        _put(draft, folder, overwrite)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return folder


def check_target(folder: Path, mode: str, overwrite: bool) -> None:
    """Refuse what ``write`` would refuse; to be asked before the work as well."""
    if mode not in ("bundle", "csv", "json"):
        raise ValueError(f"save_mode takes 'bundle', 'csv' or 'json', got {mode!r}.")
    folder = folder.absolute()
    if not folder.exists():
        return
    if not overwrite:
        raise FileExistsError(
            f"{folder} exists already: give another folder, or overwrite=True to replace a bundle there."
        )
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / METADATA).is_file()):
        raise FileExistsError(
            f"{folder} exists and is no bundle (it has no {METADATA}), so it is not overwritten."
        )


def _put(draft: Path, folder: Path, overwrite: bool) -> None:
    if overwrite and folder.exists():
        old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
        os.replace(folder, old / "bundle")
        os.replace(draft, folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(draft, folder)


def _sync(folder: Path) -> None:
    """Bytes reach the disk before the folder gets its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return (
            hashlib.file_digest(handle, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _digest(handle)
        )


def _digest(handle: Any) -> str:
    digest = hashlib.sha256()
    while chunk := handle.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _write_table(path: Path, table: pd.DataFrame, mode: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode == "json":
        path.write_text(
            json.dumps(plain(table.to_dict(orient="records")), indent=1, allow_nan=False), encoding="utf-8"
        )
    else:
        flat = table.copy()
        for column in flat.columns:
            if flat[column].map(lambda cell: isinstance(cell, np.ndarray)).any():
                flat[column] = [json.dumps(plain(cell)) for cell in flat[column]]
        flat.to_csv(path, index=False)


def read(folder: Path) -> tuple[dict[str, pd.DataFrame], dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """Tables, arrays and metadata of a bundle whose files are all as they were written."""
    path = folder / METADATA
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no bundle: there is no {METADATA}. Give the folder that --out named."
        )
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link, which a bundle never holds: it was tampered with.")
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(
            f"{path} is {path.stat().st_size:,} bytes; metadata above {_LARGEST_JSON:,} is refused."
        )
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): the bundle is damaged.") from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("files"), dict):
        raise ValueError(f"{path} lists no files: it was not written by tdgeom.")
    version = str(metadata.get("artifact_schema_version"))
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise ValueError(
            f"{folder} has schema {version}; this version reads {SCHEMA_VERSION}. Use a matching tdgeom."
        )
    tables: dict[str, pd.DataFrame] = {}
    arrays: dict[str, dict[str, np.ndarray]] = {name: {} for name in ARRAYS}
    for name, digest in metadata["files"].items():
        file = _inside(folder, name)
        if _sha256(file) != digest:
            raise ValueError(
                f"{file} has changed since the bundle was written: its SHA-256 differs from {METADATA}."
            )
        stem, _, ending = name.rpartition(".")
        if ending == "npz" and stem in ARRAYS:
            arrays[stem] = _read_arrays(file)
        elif name.endswith((".csv", ".json")):
            tables[name.rsplit(".", 1)[0]] = _read_table(file)
    missing = {"metrics", "novelty"} - set(tables)
    if missing:
        raise ValueError(f"{folder} lacks the tables {sorted(missing)}: the bundle is incomplete.")
    return tables, arrays, metadata


def _read_arrays(file: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > _LEAST_ARRAYS + _MOST_PACKED * file.stat().st_size:
            raise ValueError(
                f"{file} has {file.stat().st_size:,} bytes and unpacks to {unpacked:,}: refused as a decompression bomb."
            )
        with np.load(file, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, MemoryError, RuntimeError) as error:
        # RuntimeError: an encrypted member, or one packed by a method that zipfile does not know
        raise ValueError(f"{file} is no archive of arrays ({error}): the bundle is damaged.") from error


def _inside(folder: Path, name: str) -> Path:
    file = folder / name
    if not re.fullmatch(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?", name) or ".." in name or _linked(folder, file):
        raise ValueError(f"{folder / METADATA} names the file {name!r}, which is not one inside the bundle.")
    if not file.is_file():
        raise ValueError(f"{file} is missing: the bundle is incomplete.")
    return file


def _linked(folder: Path, file: Path) -> bool:
    return file.is_symlink() or (file.parent != folder and file.parent.is_symlink())


def _read_table(file: Path) -> pd.DataFrame:
    try:
        return _table(file)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"{file} is no table ({error}): the bundle is damaged.") from error


def _table(file: Path) -> pd.DataFrame:
    if file.suffix == ".json":
        table = pd.DataFrame(json.loads(file.read_text(encoding="utf-8")))
        for column in table.columns:
            if table[column].map(lambda cell: isinstance(cell, list)).any():
                table[column] = [np.asarray(cell) for cell in table[column]]
        return table
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    return pd.DataFrame(
        {column: _typed(table[column].tolist()) for column in table.columns}, columns=table.columns
    )


def _typed(cells: list[str]) -> list[Any]:
    """A column's text as the values it was written from, to the last digit: parsers differ in rounding, float() does not."""
    filled = [cell for cell in cells if cell]
    if filled and all(cell in ("True", "False") for cell in filled):
        return [cell == "True" if cell else None for cell in cells]
    if filled and all(cell.startswith("[") for cell in filled):
        return [np.asarray(json.loads(cell), dtype=float) if cell else None for cell in cells]
    for kind in (int, float):
        try:
            numbers = [kind(cell) for cell in filled]
        except ValueError:
            continue
        if len(numbers) == len(cells):
            return numbers
        found = iter(numbers)
        return [float(next(found)) if cell else math.nan for cell in cells]
    return [cell or None for cell in cells]
