"""What ``verify_sites`` found, in the terminal: a line for each kind and check, and the reasons below."""

from __future__ import annotations

import math

import pandas as pd
from rich.console import Console
from rich.text import Text

from tdgeom.cli.print_sites import ranges
from tdgeom.cli.terminal_tables import plain_table

__all__: list[str] = []


def print_verification(table: pd.DataFrame, console: Console) -> None:
    """A line for each kind and check, with its layers and the largest difference; then what failed, and what was not checked."""
    lines = plain_table()
    for heading in ("site", "check", "layers", "difference", "outcome"):
        lines.add_column(heading, no_wrap=heading != "check", overflow="fold")
    named = table.assign(
        named=[
            ".".join(p for p in (s, k) if isinstance(p, str)) for s, k in zip(table["stack"], table["kind"])
        ]
    )
    for (name, check, outcome), rows in named.groupby(
        ["named", "check", "outcome"], sort=False, dropna=False
    ):
        numbers = [int(layer) for layer in rows["layer"].dropna()]
        worst = rows["difference"].max()
        far = "-" if not isinstance(worst, float) or math.isnan(worst) else f"{worst:.1e}"
        style = {"failed": "bold red", "unchecked": "yellow"}.get(str(outcome), "")
        lines.add_row(str(name), str(check), ranges(numbers), far, Text(str(outcome), style=style))
    console.print(lines)
    counts = {outcome: int((table["outcome"] == outcome).sum()) for outcome in ("ok", "failed", "unchecked")}
    console.print(f"\n{counts['ok']} checks ok, {counts['failed']} failed, {counts['unchecked']} not made.")
    for outcome, title in (("failed", "Failed"), ("unchecked", "Not checked")):
        part = named[named["outcome"] == outcome]
        if len(part):
            console.print(Text(f"\n{title}", style="bold"))
        for (name, check, note), rows in part.groupby(["named", "check", "note"], sort=False, dropna=False):
            layers = ranges([int(layer) for layer in rows["layer"].dropna()])
            console.print(Text(f"{name}{' ' + layers if layers else ''}, {check}: {note}"), soft_wrap=True)
