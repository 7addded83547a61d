"""Profiles over layers in the terminal: a line a site, a column for each estimator or measure."""

from __future__ import annotations

from typing import Any

import pandas as pd
from rich.console import Console
from rich.text import Text

from tdgeom.analysis.results import AnalysisResults
from tdgeom.cli.print_results import headline
from tdgeom.cli.terminal_tables import cells_of, print_in_groups
from tdgeom.run.profiles import scale_name

__all__: list[str] = []

# profile: its title, and how to read it
PROFILES = {
    "intrinsic_dimension": ("Intrinsic dimension", "From the finest scale to the coarsest."),
    "overlap": (
        "Neighbourhood overlap",
        "0: no neighbour is shared (has the row's label); 1: all are. Pairs stand at their first site.",
    ),
}


def print_profiles(results: AnalysisResults, console: Console) -> None:
    """The profiles in ``results.diagnostics`` as tables: single numbers together, each estimate over scales alone."""
    console.print(headline(results))
    for name, (title, note) in PROFILES.items():
        if name in results.diagnostics:
            table = results.diagnostics[name]
            table = table.assign(column=[_column(row) for row in table.to_dict("records")])
            _print_profile(title, Text(note, style="dim"), table, console)


def _print_profile(title: str, note: Text, table: pd.DataFrame, console: Console) -> None:
    if "step" not in table:
        _print_pivot(title, table, "value", console)
        console.print(note)
        return
    scales = table.groupby("estimator")["step"].transform("max")
    if (scales == 0).any():
        _print_pivot(title, table[scales == 0], "estimate", console)
    for column, part in table[scales > 0].groupby("column", sort=False):
        part = part.assign(column=[scale_name(row) for row in part.to_dict("records")])
        _print_pivot(f"{title}: {column}", part, "estimate", console)
        console.print(note)


def _column(row: dict[Any, Any]) -> str:
    name = str(row.get("estimator") or row["measure"])
    return f"{name} (untrained)" if row.get("weights") == "untrained" else name


def _print_pivot(title: str, table: pd.DataFrame, value: str, console: Console) -> None:
    """A line a site, in the order of the table, and a column for each entry of ``column``."""
    sites = list(dict.fromkeys(table["site"]))
    columns = []
    for column, rows in table.groupby("column", sort=False):
        by_site = dict(zip(rows["site"], rows[value]))
        cells = cells_of([by_site.get(site) for site in sites], value)
        columns.append((str(column).replace("_", "_\n", 1).replace(" (", "\n("), cells))
    print_in_groups(console, title, ("site", sites), columns)
