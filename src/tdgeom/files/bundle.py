"""Bundles: tables, arrays and metadata in one folder, written whole or not at all and hashed."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tdgeom.files.atomic import explained_writing, file_sha256, is_taken, whole_folder
from tdgeom.files.bundle_reading import METADATA, SCHEMA_VERSION, TABLE_ENDINGS, Bundle, read_bundle
from tdgeom.files.json_text import plain
from tdgeom.files.table_files import column_kinds, write_table

__all__ = ["METADATA", "SCHEMA_VERSION", "Bundle", "check_target", "read_bundle", "safe_name", "write_bundle"]

MODES = ("bundle", "csv", "json")


def safe_name(name: str) -> str:
    """A name as a single path component: nothing in it can leave the folder.

    >>> safe_name("../../x y")
    'x_y'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "_", str(name)).strip("._-") or "unnamed"


def check_target(folder: Path, mode: str, overwrite: bool) -> None:
    """Refuse what ``write_bundle`` would refuse; to be asked before the work as well."""
    if mode not in MODES:
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
    """Write a bundle, whole or not at all; its folder. The tables of one bundle can stand there as CSV and as JSON.

    Args:
        folder: a new or empty folder, or with ``overwrite`` an earlier bundle's; or a bundle of the same tables, arrays and
            metadata in the other format, beside which these are written.
        tables: frames by name; a name may lie in a folder of the bundle ("diagnostics/x").
        arrays: NumPy archives by name (one of ``ARRAYS``), each a mapping from a name inside it; empty ones are left out.
        metadata: anything; kept as plain JSON values.
        mode: "bundle" or "csv" (tables as CSV), or "json".

    Raises:
        FileExistsError: the folder is there. OSError: the disk refused; nothing is left behind.
    """
    folder = folder.absolute()
    with explained_writing(folder):
        return _written(folder, tables, arrays, metadata, mode, overwrite)


def _written(
    folder: Path,
    tables: Mapping[str, pd.DataFrame],
    arrays: Mapping[str, Mapping[str, Any]],
    metadata: Mapping[str, Any],
    mode: str,
    overwrite: bool,
) -> Path:
    earlier = None if overwrite else _same_in_the_other_format(folder, tables, arrays, metadata, mode)
    if earlier is None:
        check_target(folder, mode, overwrite)
    with whole_folder(folder, replace=overwrite or earlier is not None) as draft:
        if earlier is not None:
            shutil.copytree(folder, draft, dirs_exist_ok=True)
        for name, table in tables.items():
            with _named(folder / f"{name}.{_ending(mode)}"):
                write_table(draft / f"{name}.{_ending(mode)}", table)
        for name, members in arrays.items() if earlier is None else ():
            if members:
                with _named(folder / f"{name}.npz"):
                    np.savez_compressed(draft / f"{name}.npz", **members)
        new = {
            path.relative_to(draft).as_posix(): path for path in sorted(draft.rglob("*")) if path.is_file()
        }
        own = {f"{name}.{_ending(mode)}" for name in tables}
        files = {
            name: file_sha256(path) for name, path in new.items() if earlier is None or name in own | earlier
        }
        columns = {name: column_kinds(table) for name, table in tables.items()}
        told = {"artifact_schema_version": SCHEMA_VERSION, **metadata, "artifact_dir": str(folder)}
        with _named(folder / METADATA):
            text = json.dumps(plain({**told, "columns": columns, "files": files}), indent=2, allow_nan=False)
            (draft / METADATA).write_text(text + "\n", encoding="utf-8")
    return folder


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Which file it was that could not be written: a full disk does not say, and what cannot be a table neither."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} could not be written: {error}") from error


def _ending(mode: str) -> str:
    return "json" if mode == "json" else "csv"


def _same_in_the_other_format(
    folder: Path,
    tables: Mapping[str, pd.DataFrame],
    arrays: Mapping[str, Mapping[str, Any]],
    metadata: Mapping[str, Any],
    mode: str,
) -> set[str] | None:
    """The files of an intact bundle that stands there with the same content, its tables in the other format alone."""
    if not (folder / METADATA).is_file() or mode not in MODES:
        return None
    try:
        found = read_bundle(folder)
    except (ValueError, OSError):
        return None
    endings = {Path(name).suffix[1:] for name in found.metadata["files"]} & set(TABLE_ENDINGS)
    same_words = _own_words(found.metadata) == _own_words(plain(metadata))
    if endings != set(TABLE_ENDINGS) - {_ending(mode)} or not same_words or set(found.tables) != set(tables):
        return None
    for name, members in arrays.items():
        other = found.arrays[name]
        if set(other) != set(members) or not all(_equal(other[key], members[key]) for key in members):
            return None
    with tempfile.TemporaryDirectory() as scratch:
        for name, table in tables.items():
            again = Path(scratch) / f"{name}.{next(iter(endings))}"
            write_table(again, table)
            if file_sha256(again) != found.metadata["files"][f"{name}{again.suffix}"]:
                return None
    return set(found.metadata["files"])


def _own_words(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata without what a place and a format make of it."""
    placed = ("files", "columns", "save_mode", "artifact_dir", "artifact_schema_version")
    return {name: value for name, value in metadata.items() if name not in placed}


def _equal(one: np.ndarray, other: Any) -> bool:
    other = np.asarray(other)
    numbers = one.dtype.kind in "fc" and other.dtype.kind in "fc"
    return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=numbers)
