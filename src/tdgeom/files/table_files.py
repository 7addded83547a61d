"""Tables as CSV or JSON files, and back: every number to its last digit, arrays in cells included."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tdgeom.files.json_text import plain

__all__ = ["read_table", "write_table"]


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


def read_table(path: Path) -> pd.DataFrame:
    """The table that ``write_table`` wrote.

    Raises:
        ValueError: it is none.
    """
    try:
        return _from_json(path) if path.suffix == ".json" else _from_csv(path)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no table ({error}): the bundle is damaged.") from error


def _from_json(path: Path) -> pd.DataFrame:
    table = pd.DataFrame(json.loads(path.read_text(encoding="utf-8")))
    for column in table.columns:
        if table[column].map(lambda cell: isinstance(cell, list)).any():
            table[column] = [np.asarray(cell) for cell in table[column]]
    return table


def _from_csv(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    columns = {column: _typed(table[column].tolist()) for column in table.columns}
    return pd.DataFrame(columns, columns=table.columns)


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
