"""``tdgeom compare``: every layer of one model beside every layer of another."""

from __future__ import annotations

from typing import Annotated

import typer

import tdgeom as tg
from tdgeom.cli.options import (
    MAX_ROWS,
    Layers,
    Sites,
    TextOptions,
    layer_choice,
    listed,
    quiet_transformers,
    with_options,
)
from tdgeom.measures.registry import DEFAULT_MEASURES, MEASURES, named_stages

__all__: list[str] = []


@with_options
def compare(
    model_a: Annotated[
        str, typer.Argument(help="A Hugging Face id or a local directory.", metavar="MODEL_A")
    ],
    model_b: Annotated[
        str, typer.Argument(help="The other model, or another checkpoint.", metavar="MODEL_B")
    ],
    options: TextOptions,
    metrics: Annotated[
        str, typer.Option(help=f"Comma-separated: {', '.join(MEASURES)}.", metavar="NAMES")
    ] = ",".join(DEFAULT_MEASURES),
    sites: Sites = "residual_output",
    layers: Layers = "all",
    align: Annotated[
        str,
        typer.Option(
            help="rows (one tokenizer), characters (tokens that end together), document (means), or auto."
        ),
    ] = "auto",
    max_rows: Annotated[int, typer.Option(min=4, help="Rows to compare.")] = MAX_ROWS,
    sketch: Annotated[
        int | None,
        typer.Option(min=3, help="Random projections a site, for wide models. [exact moments]", metavar="K"),
    ] = None,
) -> None:
    """Compare every layer of two models, or of two checkpoints, on one text."""
    from tdgeom.cli.print_comparison import print_comparison
    from tdgeom.model.loading import load_model

    try:
        stages = named_stages(listed(metrics), between=True, sketch=sketch is not None)
    except ValueError as error:
        raise typer.BadParameter(f"--{error}") from error
    documents, named = options.documents()
    options.check_out()
    quiet_transformers()
    tokenizers = [options.tokenizer_of(model) for model in (model_a, model_b)]
    nets = [load_model(model, trust_remote_code=options.trust_remote_code) for model in (model_a, model_b)]
    result = tg.compare(
        nets[0],
        nets[1],
        documents,
        stages,
        sites=listed(sites),
        layers=layer_choice(layers),
        tokenizer_a=tokenizers[0],
        tokenizer_b=tokenizers[1],
        align=align,
        max_rows=max_rows,
        sketch=sketch,
        batch_size=options.batch_size,
        max_length=min(map(options.length_for, nets, tokenizers)),
        device=options.device_or_cuda(),
        seed=options.seed,
    )
    if result is not None:
        result.metadata |= {"dataset": named, "run_metadata": {"command": "tdgeom compare"}}
    options.finish(result, print_comparison)
