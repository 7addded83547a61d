"""``tdgeom diff``: what differs between two saved analyses beyond its errors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tdgeom as tg
from tdgeom.cli.options import console, print_json

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["diff"]


def diff(
    run_a: Annotated[Path, typer.Argument(help="A bundle measured with --errors.", metavar="RUN_A")],
    run_b: Annotated[Path, typer.Argument(help="The other bundle.", metavar="RUN_B")],
    level: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Corrected p-value at which a metric counts as different.")
    ] = 0.05,
    correction: Annotated[
        str,
        typer.Option(help="For the number of metrics: holm (no false one) or fdr (few among those called)."),
    ] = "holm",
    metrics: Annotated[
        str | None, typer.Option(help="Comma-separated: only these columns.", metavar="NAMES")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Print all metrics, not only those that differ.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Say which metrics of two runs differ by more than their errors; the exit code is 1 where any does, else 0."""
    if correction not in ("holm", "fdr"):
        raise typer.BadParameter(f"--correction takes holm or fdr, got {correction!r}")
    runs = [tg.AnalysisResults.load(folder) for folder in (run_a, run_b)]
    asked = None if metrics is None else [name.strip() for name in metrics.split(",")]
    frame = tg.difference(
        *runs, level=level, correction="fdr" if correction == "fdr" else "holm", metrics=asked
    )
    shown = frame if every else frame[frame["differs"]]
    if as_json:
        print_json(
            {"differ": int(frame["differs"].sum()), "compared": len(frame), "rows": shown.to_dict("records")}
        )
    else:
        _print(shown, len(frame), int(frame["differs"].sum()), bool(frame["paired"].all()), level)
    raise typer.Exit(1 if bool(frame["differs"].any()) else 0)


def _print(shown: pd.DataFrame, compared: int, differ: int, paired: bool, level: float) -> None:
    from rich.table import Table
    from rich.text import Text

    terminal = console()
    how = "the same documents, paired group by group" if paired else "documents of their own"
    terminal.print(
        f"{differ} of {compared} metrics differ at a corrected p of {level:g} ({how}).", markup=False
    )
    table = Table("site", "metric", "a", "b", "b - a", "error", "p")
    for row in shown.to_dict("records"):
        numbers = [f"{row[name]:.4g}" for name in ("a", "b", "difference", "se")]
        table.add_row(Text(str(row["site"])), Text(str(row["metric"])), *numbers, f"{row['p_adjusted']:.2g}")
    if table.row_count:
        terminal.print(table)
