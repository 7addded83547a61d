"""The runs of a store in the terminal: a line each, as many columns side by side as fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from tdgeom.cli.terminal_tables import print_in_groups
from tdgeom.core.visible_text import visible
from tdgeom.store.runs import Runs, size_text

__all__: list[str] = []

COLUMNS = ("kind", "state", "model", "dataset", "experiment", "tags", "created", "rows", "bytes")
LONGEST = 40  # characters of one cell: names of models may be paths


def print_runs(runs: Runs, console: Console) -> None:
    """Every run, and every column that says something of one of them."""
    records = list(runs)
    if not records:
        console.print("no runs")
        return
    columns = [(name, [_cell(name, record[name]) for record in records]) for name in COLUMNS]
    empty = [name for name, cells in columns if set(cells) == {"-"}]
    ids = [record["id"] for record in records]
    title = f"{len(records)} run{'s' if len(records) > 1 else ''}"
    print_in_groups(console, title, ("id", ids), [column for column in columns if column[0] not in empty])
    if empty:
        console.print(Text(f"Empty: {', '.join(empty)}.", style="dim"))


def _cell(name: str, value: Any) -> str:
    if name == "bytes":
        return size_text(value or 0)
    if name == "created":
        return str(value)[:16].replace("T", " ")
    if name == "rows" and value is not None:
        return f"{value:,}"
    text = ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value
    shown = visible(text or "-")
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST // 2 - 2]}...{shown[-LONGEST // 2 + 1 :]}"
