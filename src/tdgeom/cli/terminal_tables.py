"""The look of every table in a terminal: headings, numbers and bars, and how many columns stand side by side."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = [
    "bar_of", "broken", "cells_of", "columns_table", "plain_table", "print_in_groups", "titled", "width_beside",
]  # fmt: skip

EIGHTHS = " ▏▎▍▌▋▊▉█"
ROUNDING = 1e-8  # smaller numbers are shown as 0
COUNTS = ("most_used_expert", "routed_assignments")  # whole numbers, as are k90, k95, ...


def plain_table() -> Table:
    """An empty table in the look of all."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))


def columns_table(
    headings: Iterable[str], columns: Iterable[Sequence[str]], ends: Collection[int] = ()
) -> Table:
    """A table from columns of text, aligned on the right; the first names the rows and is never broken.

    A line stays empty behind the rows numbered in ``ends``.
    """
    table = plain_table()
    for number, heading in enumerate(headings):
        table.add_column(Text(heading), justify="right", no_wrap=number == 0, overflow="fold")
    for number, row in enumerate(zip(*columns)):
        table.add_row(*map(Text, row), end_section=number in ends)
    return table


def width_beside(heading: str, cells: Iterable[str]) -> int:
    """The room that a column takes beside another."""
    return 2 + max(len(line) for text in (heading, *cells) for line in text.split("\n"))


def print_in_groups(
    console: Console,
    title: str,
    label: tuple[str, Sequence[str]],
    columns: Sequence[tuple[str, Sequence[str]]],
    ends: Collection[int] = (),
) -> None:
    """Every column, as (heading, cells): as many side by side as fit the width, the others below, each table with the labels."""
    room = console.width - width_beside(*label) + 2
    groups: list[list[tuple[str, Sequence[str]]]] = []
    left = 0
    for column in columns:
        needed = width_beside(*column)
        if not groups or needed > left:
            groups.append([])
            left = room
        groups[-1].append(column)
        left -= needed
    for number, group in enumerate(groups):
        headings, cells = zip(label, *group)
        titled(console, title if number == 0 else f"{title}, continued", columns_table(headings, cells, ends))


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
    """A column's values as text, in the precision of its largest number."""
    values = list(values)
    sizes = [abs(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]
    decimals = decimals_of(max(sizes, default=0.0))
    return [_cell(value, column, decimals) for value in values]


def decimals_of(largest: float) -> int | None:
    """Decimals that show three or four digits of a column's largest number; None: powers of ten.

    >>> [decimals_of(size) for size in (4321.0, 12.0, 1.0, 0.0312, 2e-6, 3e9)]
    [0, 1, 3, 4, None, None]
    """
    if largest < ROUNDING:
        return 3
    if not 1e-4 <= largest < 1e7:
        return None
    return 0 if largest >= 1000 else 1 if largest >= 10 else max(3, 2 - math.floor(math.log10(largest)))


def _cell(value: Any, column: str, decimals: int | None) -> str:
    """One value as text: ``-`` where there is none, whole numbers of counts without a fraction, no number as 0 that is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool) or str(value) in ("True", "False"):
        return "yes" if value else "no"
    if isinstance(value, str) or not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or (float(value).is_integer() and (column.startswith("k") or column in COUNTS)):
        return f"{int(value):,}"
    if abs(value) < ROUNDING or (decimals is not None and abs(value) >= 0.5 * 10.0**-decimals):
        return f"{value:,.{decimals or 0}f}"
    return f"{value:.1e}"


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
