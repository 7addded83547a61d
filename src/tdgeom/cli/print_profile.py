"""Profiles over layers in the terminal: a line a site, a column for each estimator or measure."""

from __future__ import annotations

from typing import Any

import pandas as pd
from rich.console import Console
from rich.text import Text

from tdgeom.cli.print_results import headline
from tdgeom.cli.terminal_tables import cells_of, plain_table, titled

__all__: list[str] = []

TITLES = {
    "intrinsic_dimension": "Intrinsic dimension",
    "overlap": "Neighbourhood overlap",
}
NOTES = {
    "intrinsic_dimension": "From the finest scale to the coarsest.",
    "overlap": "0: no neighbour is shared (has the row's label); 1: all are. Pairs stand at their first site.",
}


def print_profile(results: Any, name: str, console: Console) -> None:
    """One profile of ``results.diagnostics`` as tables: the single numbers together, each estimate over scales alone."""
    table = results.diagnostics[name].copy()
    table["column"] = [_column(row) for row in table.to_dict("records")]
    console.print(headline(results, "rows"))
    if "step" not in table:
        _print_pivot(TITLES[name], table, "value", console)
        console.print(Text(NOTES[name], style="dim"))
        return
    scales = table.groupby("estimator")["step"].transform("max")
    if (scales == 0).any():
        _print_pivot(TITLES[name], table[scales == 0], "estimate", console)
    for column, part in table[scales > 0].groupby("column", sort=False):
        part = part.assign(column=[f"scale {step + 1}" for step in part["step"]])
        _print_pivot(f"{TITLES[name]}: {column}", part, "estimate", console)
        console.print(Text(NOTES[name], style="dim"))


def _column(row: dict[Any, Any]) -> str:
    name = str(row.get("estimator") or row["measure"])
    return f"{name} (untrained)" if row.get("weights") == "untrained" else name


def _print_pivot(title: str, table: pd.DataFrame, value: str, console: Console) -> None:
    """A line a site, in the order of the table, and a column for each entry of ``column``."""
    sites = list(dict.fromkeys(table["site"]))
    drawn = plain_table()
    drawn.add_column("site", justify="right", no_wrap=True)
    made = []
    for column, rows in table.groupby("column", sort=False):
        drawn.add_column(str(column).replace("_", "_\n", 1).replace(" (", "\n("), justify="right")
        by_site = dict(zip(rows["site"], rows[value]))
        made.append(cells_of([by_site.get(site) for site in sites], value))
    for index, site in enumerate(sites):
        drawn.add_row(site, *(column[index] for column in made))
    titled(console, title, drawn)
