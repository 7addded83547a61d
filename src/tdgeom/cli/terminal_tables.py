"""The look of every table in a terminal: headings, numbers and bars."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["bar_of", "broken", "cells_of", "columns_table", "plain_table", "titled"]

EIGHTHS = " ▏▎▍▌▋▊▉█"
COUNTS = ("most_used_expert", "routed_assignments")  # whole numbers, as are k90, k95, ...


def plain_table() -> Table:
    """An empty table in the look of all."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))


def columns_table(headings: Iterable[str], columns: Iterable[list[str]]) -> Table:
    """A table from columns of text, aligned on the right; the first names the rows and is never broken."""
    table = plain_table()
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right", no_wrap=number == 0, overflow="fold")
    for row in zip(*columns):
        table.add_row(*row)
    return table


def titled(console: Console, title: str, table: Table) -> None:
    """A table under its title."""
    console.print()
    console.print(Text(title, style="bold"))
    console.print(table)


def broken(column: str) -> str:
    """A name on two lines where it has two words: columns stay narrow and names whole."""
    words = column.split("_")
    if len(column) < 8 or len(words) < 2:
        return column
    cut = min(range(1, len(words)), key=lambda at: abs(len("_".join(words[:at])) - len(column) / 2))
    return "_".join(words[:cut]) + "_\n" + "_".join(words[cut:])


def cells_of(values: Iterable[Any], column: str) -> list[str]:
    """A column's values as text, in one precision."""
    values = list(values)
    decimals = decimals_of(values)
    return [_cell(value, column, decimals) for value in values]


def decimals_of(values: Iterable[Any]) -> int:
    """One precision for a column: three or four digits of its largest number."""
    sizes = [abs(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]
    largest = max(sizes, default=0.0)
    return 0 if largest >= 1000 else 1 if largest >= 10 else 3


def _cell(value: Any, column: str, decimals: int) -> str:
    """One value as text: ``-`` where there is none, whole numbers of counts without a fraction."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool) or str(value) in ("True", "False"):
        return "yes" if value else "no"
    if isinstance(value, str) or not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and (column.startswith("k") or column in COUNTS):
        return f"{int(value):,}"
    return f"{value:,.{decimals}f}"


def bar_of(value: float, top: float, width: int, console: Console) -> str:
    """A bar of ``width`` cells for the value ``top``, in eighths of a cell."""
    if not math.isfinite(value) or not top > 0:
        return ""
    filled = max(0.0, min(1.0, value / top)) * width
    if console.options.ascii_only:
        return "#" * round(filled)
    whole = int(filled)
    part = EIGHTHS[int((filled - whole) * 8)]
    return "█" * whole + part.strip()
