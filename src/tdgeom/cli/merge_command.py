"""``tdgeom merge``: the state files of jobs that shared nothing, as one analysis."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import tdgeom as tg
from tdgeom.cli.options import Columns, Json
from tdgeom.cli.outputs import MeasuringOptions

__all__ = ["merge"]


def merge(
    files: Annotated[
        list[Path], typer.Argument(help="What analyze --state left, of all parts.", metavar="FILE...")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Save tables and a report in this folder.", metavar="DIR")
    ] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Also where parts are missing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle in DIR.")] = False,
    columns: Columns = None,
    as_json: Json = False,
) -> None:
    """Add up the states of all parts and end the analysis: the tables of one run over all the data. Needs no model."""
    from functools import partial as bound

    from tdgeom.cli.print_results import print_results

    options = MeasuringOptions(out=out, overwrite=overwrite, as_json=as_json)
    options.check_out("bundle")
    try:
        results = tg.merge_states(files, partial=partial)
    except ValueError as error:
        if "give pipeline=" not in str(error):
            raise
        raise typer.BadParameter(
            "these files are of tg.run, whose pipeline Python alone knows: tg.merge_states(files, pipeline)"
        ) from error
    assert isinstance(results, tg.AnalysisResults)
    options.finish(results, bound(print_results, columns=columns))
