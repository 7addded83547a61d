"""``tdgeom report``: saved analyses as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import tdgeom as tg
from tdgeom.cli.options import console

__all__ = ["report"]


def report(
    folders: Annotated[list[Path], typer.Argument(help="Bundles that --out named.", metavar="DIR...")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The file to write. [report.html in the bundle, or here for several]", metavar="FILE"
        ),
    ] = None,
    title: Annotated[str | None, typer.Option(help="The report's title. [what was measured]")] = None,
) -> None:
    """Write one HTML file that shows a saved analysis, or several side by side; it opens from disk and needs no network."""
    first, *others = [tg.AnalysisResults.load(folder) for folder in folders]
    path = out if out is not None or not others else Path("report.html")
    written = first.report(path, beside=others, title=title)
    console().print(f"Report: {written.resolve()}", soft_wrap=True, markup=False)
