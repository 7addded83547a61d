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
            help="The file to write; else report.html in the bundle, or here for several.", metavar="FILE"
        ),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Its title; else what was measured.")] = None,
) -> None:
    """Write one HTML file that shows a saved analysis, or several side by side; it opens from disk and needs no network."""
    loaded = [tg.load_results(folder) for folder in folders]
    path = out or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
    names = [folder.resolve().name for folder in folders]
    given = dict(zip(names, loaded)) if len(set(names)) == len(names) else loaded
    written = tg.write_report(loaded[0] if len(loaded) == 1 else given, path, title=title)
    console().print(f"Report: {written.resolve()}", soft_wrap=True, markup=False)
