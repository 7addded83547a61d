"""``tdgeom compare``: every layer of one model beside every layer of another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Annotated, Any

import typer

import tdgeom as tg
from tdgeom.cli.completion import completing, pair_measures
from tdgeom.cli.options import (
    MAX_ROWS,
    Checkpoint,
    Errors,
    Every,
    Layers,
    Significance,
    Sites,
    layer_choice,
    listed,
    quiet_transformers,
    with_options,
)
from tdgeom.cli.outputs import MeasuringOptions
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
    options: MeasuringOptions,
    metrics: Annotated[
        str,
        typer.Option(
            help=f"Comma-separated: {', '.join(MEASURES)}.",
            metavar="NAMES",
            show_default=", ".join(DEFAULT_MEASURES),
            autocompletion=completing(pair_measures),
        ),
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
    errors: Errors = False,
    significance: Significance = False,
    sketch: Annotated[
        int | None,
        typer.Option(min=3, help="Random projections a site, for wide models. [exact moments]", metavar="K"),
    ] = None,
    checkpoint: Checkpoint = None,
    every: Every = 100,
) -> Any:
    """Compare every layer of two models, or of two checkpoints, on one text."""
    from tdgeom.cli.print_comparison import print_comparison
    from tdgeom.run.checkpoint import checkpoints_kept

    try:
        stages = named_stages(listed(metrics), between=True, sketch=sketch is not None)
    except ValueError as error:
        raise typer.BadParameter(f"--{error}") from error
    documents, named = options.documents()
    options.check_out()
    quiet_transformers()
    nets = [options.load(model) for model in (model_a, model_b)]
    if options.images is None:
        tokenizers: list[Any] = [options.tokenizer_of(model) for model in (model_a, model_b)]
        batches: dict[str, Any] = {
            "batch_size": options.batch_size,
            "max_length": min(map(options.length_for, nets, tokenizers)),
        }
    else:
        documents, tokenizers, batches = options.pixels(documents, model_a, model_b), [None, None], {}
    with checkpoints_kept():  # until the comparison is saved
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
            names=names_of(model_a, model_b),
            select=options.select(),
            max_rows=max_rows,
            sketch=sketch,
            errors=errors,
            significance=significance,
            **batches,
            device=options.device_or_cuda(),
            seed=options.seed,
            sharded=options.sharded or None,
            checkpoint=checkpoint,
            every=every,
        )
        if result is not None:
            result.metadata |= {"dataset": named, "run_metadata": {"command": "tdgeom compare"}}
        options.finish(result, print_comparison)
    return result


def names_of(*models: str) -> tuple[str, str]:
    """What two models are called: as much of the end of each name as tells them apart, without slashes.

    >>> names_of("gpt2", "runs/my-gpt2"), names_of("a/final", "b/final"), names_of("gpt2", "gpt2")
    (('gpt2', 'my-gpt2'), ('a_final', 'b_final'), ('gpt2', 'gpt2_again'))
    """
    parts = [PurePath(model).parts or (model,) for model in models]
    for length in range(1, max(map(len, parts)) + 1):
        first, second = (_joined(part[-length:]) for part in parts)
        if first != second:
            return first, second
    return first, f"{first}_again"


def _joined(parts: Sequence[str]) -> str:
    return "_".join(part.strip("/\\") for part in parts).strip("_") or "model"
