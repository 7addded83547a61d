"""``tdgeom compare``: every layer of one model beside every layer of another."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tdgeom.analysis.compare import MAX_ROWS
from tdgeom.cli.options import (
    BatchSize,
    Dataset,
    Device,
    JsonLines,
    Layers,
    Out,
    Overwrite,
    Plots,
    Remote,
    Seed,
    Sites,
    TextFile,
    check_out,
    console,
    device_choice,
    documents,
    layer_choice,
    listed,
    load_tokenizer,
    quiet_transformers,
    say_where,
    sequence_length,
)
from tdgeom.measures.registry import DEFAULT_MEASURES, MEASURES, named_stages

__all__: list[str] = []


def compare(
    model_a: Annotated[
        str, typer.Argument(help="A Hugging Face id or a local directory.", metavar="MODEL_A")
    ],
    model_b: Annotated[
        str, typer.Argument(help="The other model, or another checkpoint.", metavar="MODEL_B")
    ],
    text: TextFile = None,
    jsonl: JsonLines = None,
    dataset: Dataset = None,
    measures: Annotated[
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
    max_rows: Annotated[int, typer.Option("--max-rows", min=4, help="Rows to compare.")] = MAX_ROWS,
    sketch: Annotated[
        int | None,
        typer.Option(min=3, help="Random projections a site, for wide models. [exact moments]", metavar="K"),
    ] = None,
    batch_size: BatchSize = 8,
    seq_len: Annotated[int | None, typer.Option("--seq-len", min=3, help="Longest sequence. [256]")] = None,
    out: Out = None,
    plots: Plots = False,
    overwrite: Overwrite = False,
    device: Device = None,
    seed: Seed = 0,
    trust_remote_code: Remote = False,
) -> None:
    """Compare every layer of two models, or of two checkpoints, on one text."""
    names = listed(measures)
    try:
        stages = named_stages(names, sketch=sketch is not None)
    except ValueError as error:
        raise typer.BadParameter(f"--{error}") from error
    source, named = documents(text, jsonl, dataset)
    overwrite = check_out(out, overwrite, plots, "bundle")
    quiet_transformers()
    from tdgeom.analysis.compare import compare as compared
    from tdgeom.cli.print_comparison import print_comparison
    from tdgeom.model.loading import load_model

    tokenizers = [load_tokenizer(model, trust_remote_code) for model in (model_a, model_b)]
    nets = [load_model(model, trust_remote_code=trust_remote_code) for model in (model_a, model_b)]
    length = min(sequence_length(seq_len, net, words) for net, words in zip(nets, tokenizers))
    result = compared(
        nets[0],
        nets[1],
        source,
        stages,
        sites=listed(sites),
        layers=layer_choice(layers),
        tokenizer_a=tokenizers[0],
        tokenizer_b=tokenizers[1],
        align=align,
        max_rows=max_rows,
        sketch=sketch,
        batch_size=batch_size,
        seq_len=length,
        device=device_choice(device),
        seed=seed,
    )
    if result is None:  # another rank of a process group has it
        return
    result.metadata |= {"dataset": named, "run_metadata": {"command": "tdgeom compare"}}
    print_comparison(result, console())
    if out is not None:
        result.save(out, overwrite=overwrite)
        if plots:
            _draw(result)
    say_where(result)


def _draw(result: Any) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from tdgeom import plot

    folder = result.artifact_dir / "plots"
    folder.mkdir(exist_ok=True)
    for measure in result.measures:
        figure = Figure(figsize=(6.4, 5.4), layout="constrained")
        FigureCanvasAgg(figure)
        plot.matrix(result.novelty, measure, figure.subplots())
        figure.savefig(folder / f"{measure}.png", dpi=150)
