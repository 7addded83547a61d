"""What a report is made of: sections of charts and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

__all__ = ["Chart", "Section", "Table"]


@dataclass(frozen=True)
class Chart:
    """A chart: what it shows, what to read from it in a sentence, its Vega-Lite specification, and what it says in words."""

    title: str
    says: str
    spec: dict[str, Any]
    words: str = ""
    wide: bool = False
    difference: Chart | None = None
    """What runs differ by, drawn below."""


@dataclass(frozen=True)
class Table:
    """A table that sorts, filters and downloads; ``name`` is that of the file."""

    title: str
    frame: pd.DataFrame
    name: str


@dataclass(frozen=True)
class Section:
    """A heading, how to read what stands below it, charts, tables, and choices of layers where charts have them."""

    key: str
    title: str
    says: str
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    layers: Sequence[str] = ()
    shown: Sequence[str] = field(default=())
