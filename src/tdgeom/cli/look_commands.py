"""``tdgeom show`` and ``tdgeom sites``: a saved analysis, and what a model offers to measure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tdgeom.analysis.results import AnalysisResults
from tdgeom.cli.options import Model, Remote, console, quiet_transformers
from tdgeom.cli.print_comparison import print_comparison
from tdgeom.cli.print_results import print_results
from tdgeom.cli.print_sites import print_sites
from tdgeom.model.loading import model_structure
from tdgeom.model.structure.resolve import available_sites

__all__ = ["show", "sites"]


def show(folder: Annotated[Path, typer.Argument(help="A bundle that --out named.", metavar="DIR")]) -> None:
    """Print the tables of a saved analysis."""
    results = AnalysisResults.load(folder)
    printed = print_comparison if "align" in results.metadata else print_results
    printed(results, console())


def sites(
    model: Model,
    every: Annotated[bool, typer.Option("--all", help="Every site, not a line a kind.")] = False,
    trust_remote_code: Remote = False,
) -> None:
    """List which sites a model has and the modules they are read at; its weights are not loaded."""
    quiet_transformers()
    net = model_structure(model, trust_remote_code=trust_remote_code)
    print_sites(net, available_sites(net), console(), every=every)
