"""``tdgeom show`` and ``tdgeom sites``: a saved analysis, and what a model offers to measure."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import tdgeom as tg
from tdgeom.cli.inputs import InputOptions
from tdgeom.cli.options import (
    Columns,
    Intervals,
    Json,
    Model,
    Remote,
    console,
    layer_choice,
    print_json,
    quiet_transformers,
)
from tdgeom.core.visible_text import visible

if TYPE_CHECKING:
    from torch import nn

__all__ = ["show", "sites"]


def show(
    folder: Annotated[Path, typer.Argument(help="A bundle that --out named.", metavar="DIR")],
    columns: Columns = None,
    intervals: Intervals = False,
    as_json: Json = False,
) -> None:
    """Print the tables of a saved analysis."""
    from tdgeom.cli.print_comparison import print_comparison
    from tdgeom.cli.print_profile import PROFILES, print_profiles
    from tdgeom.cli.print_results import print_results

    results = tg.AnalysisResults.load(folder)
    if as_json:
        print_json({**results.to_dict(), "folder": results.artifact_dir})
        return
    for said in results.metadata.get("warnings") or ():
        print(visible(f"tdgeom: warning: {' '.join(str(said).split())}"), file=sys.stderr)
    if "align" in results.metadata:
        print_comparison(results, console())
    elif columns is None and not intervals and not PROFILES.keys().isdisjoint(results.diagnostics):
        print_profiles(results, console())
    else:
        print_results(results, console(), columns, intervals)


def sites(
    model: Model,
    every: Annotated[bool, typer.Option("--all", help="Every site, not a line a kind.")] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Load the model, and compare what is read and changed there with the model itself.",
        ),
    ] = False,
    text: Annotated[
        str | None,
        typer.Option(
            help="A text file whose first two documents --verify runs on. [made-up tokens]", metavar="FILE"
        ),
    ] = None,
    layers: Annotated[str, typer.Option(help="Layers that --verify looks at, such as 0,-1 or 2:8.")] = "all",
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """List which sites a model has and the modules they are read at; its weights are not loaded, unless for --verify.

    With --verify the exit code is 1 where a check failed.
    """
    from tdgeom.cli.print_sites import print_sites, site_records
    from tdgeom.cli.print_verification import print_verification
    from tdgeom.model.loading import load_model, model_structure

    quiet_transformers()
    if not verify:
        if text is not None:
            raise typer.BadParameter("--text is what --verify runs the model on: add --verify")
        net = model_structure(model, trust_remote_code=trust_remote_code)
        if as_json:
            print_json({"sites": site_records(tg.available_sites(net))})
        else:
            print_sites(net, tg.available_sites(net), console(), every=every)
        return
    net = load_model(model, trust_remote_code=trust_remote_code)
    table = tg.verify_sites(net, _batch(net, model, text, trust_remote_code), layers=layer_choice(layers))
    if as_json:
        print_json({"sites": site_records(tg.available_sites(net)), "checks": table.to_dict("records")})
    else:
        print_sites(net, tg.available_sites(net), console(), every=every)
        print_verification(table, console())
    if (table["outcome"] == "failed").any():
        raise typer.Exit(1)


def _batch(net: nn.Module, name: str, text: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """Two short sequences: of a text, or of made-up tokens (or pixels)."""
    import torch

    from tdgeom.model.calls.forward_signature import read_signature
    from tdgeom.model.calls.model_inputs import made_up_inputs
    from tdgeom.rows.text import TextBatches, read_text

    if text is not None:
        options = InputOptions(text=text, trust_remote_code=trust_remote_code)
        tokenizer = options.tokenizer_of(name)
        length = min(64, options.length_for(net, tokenizer))
        return next(iter(TextBatches(read_text(text), tokenizer, batch_size=2, max_length=length)))
    made_up = made_up_inputs(net, read_signature(net), 2, 8)
    if made_up is None:
        raise typer.BadParameter(
            f"no inputs can be made up for a {type(net).__name__}: give a text with --text, or call "
            "tdgeom.verify_sites(model, batch)"
        )
    return {key: value for key, value in made_up.items() if isinstance(value, torch.Tensor)}
