"""Tables as CSV or JSON files, and back: every number to its last digit, arrays in cells included."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tdgeom.files.json_text import plain
from tdgeom.files.shown_tables import shown_safely

__all__ = ["column_kinds", "read_table", "write_table"]

_WIDER = "its lines have more cells than it has columns"
MOST_COLUMNS = 20_000  # a column a measure: a thousandth of that is usual, and pandas takes a while over many


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table in the format that the file's ending names, ``.csv`` or ``.json`` (records)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        records = plain(table.to_dict(orient="records"))
        path.write_text(json.dumps(records, indent=1, allow_nan=False), encoding="utf-8")
        return
    flat = table.copy()
    for column in flat.columns:
        if flat[column].map(lambda cell: isinstance(cell, np.ndarray)).any():
            flat[column] = [json.dumps(plain(cell)) for cell in flat[column]]
    flat.to_csv(path, index=False)


def column_kinds(table: pd.DataFrame) -> dict[str, str]:
    """What a file cannot say of its columns: which are text, though every word looks like a number, and which are numbers.

    >>> column_kinds(pd.DataFrame({"label": ["1", "2"], "share": [float("nan")] * 2, "layer": [0, 1]}))
    {'label': 'text', 'share': 'number'}
    """
    return {str(name): kind for name in table.columns if (kind := _kind(table[name])) is not None}


def _kind(cells: pd.Series) -> str | None:
    if pd.api.types.is_float_dtype(cells):
        return "number"
    if pd.api.types.is_numeric_dtype(cells) or any(isinstance(cell, np.ndarray) for cell in cells):
        return None
    missing = [not isinstance(cell, str) for cell in cells]
    if any(gap and not (cell is None or cell is pd.NA or cell != cell) for gap, cell in zip(missing, cells)):
        return None
    return "text or nothing" if any(missing) else "text"


def read_table(path: Path, kinds: Any = None) -> pd.DataFrame:
    """The table that ``write_table`` wrote; ``kinds`` are its ``column_kinds``, where they were kept.

    Raises:
        ValueError: it is none.
    """
    kinds = kinds if isinstance(kinds, Mapping) else {}
    try:
        return shown_safely(_from_json(path, kinds) if path.suffix == ".json" else _from_csv(path, kinds))
    except (TypeError, ValueError, AttributeError, RecursionError, MemoryError, OSError, csv.Error) as error:
        raise ValueError(f"{path} is no table ({error}): the bundle is damaged.") from error


def _from_json(path: Path, kinds: Mapping[Any, Any]) -> pd.DataFrame:
    records = json.loads(path.read_text(encoding="utf-8"))
    _refuse_wide(len({name for record in records for name in record}))
    table = pd.DataFrame(records)
    for column in table.columns:
        if kinds.get(column) == "number":
            table[column] = table[column].astype(float)
        elif table[column].map(lambda cell: isinstance(cell, list)).any():
            table[column] = [np.asarray(cell) for cell in table[column]]
    return table


def _refuse_wide(columns: int) -> None:
    if columns > MOST_COLUMNS:
        raise ValueError(f"it has {columns:,} columns, more than {MOST_COLUMNS:,} are refused")


def _from_csv(path: Path, kinds: Mapping[Any, Any]) -> pd.DataFrame:
    with open(path, newline="", encoding="utf-8") as handle:
        lines = csv.reader(handle)
        width = len(next(lines, []))
        _refuse_wide(width)
        try:
            first = len(next(lines, []))
        except csv.Error:  # a cell longer than this reader takes: pandas says what there is to say
            first = 0
    if first > width:  # pandas would take the first of them for an index, however long that takes
        raise ValueError(_WIDER)
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    if not isinstance(table.index, pd.RangeIndex):  # pandas' reading of lines that are wider than the head
        raise ValueError(_WIDER)
    columns = {column: _typed(table[column].tolist(), kinds.get(column)) for column in table.columns}
    return pd.DataFrame(columns, columns=table.columns)


def _typed(cells: list[str], kind: Any = None) -> list[Any]:
    """A column's text as the values it was written from, to the last digit: parsers differ in rounding, float() does not."""
    filled = [cell for cell in cells if cell]
    if kind in ("text", "text or nothing"):
        return [cell or (None if kind != "text" else "") for cell in cells]
    if kind == "number":
        return [float(cell) if cell else math.nan for cell in cells]
    if filled and all(cell in ("True", "False") for cell in filled):
        return [cell == "True" if cell else None for cell in cells]
    if filled and all(cell.startswith("[") for cell in filled):
        return [np.asarray(json.loads(cell), dtype=float) if cell else None for cell in cells]
    for number in (int, float):
        try:
            numbers = [number(cell) for cell in filled]
        except ValueError:
            continue
        if len(numbers) == len(cells):
            return numbers
        found = iter(numbers)
        return [float(next(found)) if cell else math.nan for cell in cells]
    return [cell or None for cell in cells]
