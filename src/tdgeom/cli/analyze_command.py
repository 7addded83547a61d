"""``tdgeom analyze`` and ``tdgeom demo``: the default analysis of a model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import tdgeom as tg
from tdgeom.cli.options import (
    MAX_ROWS,
    Checkpoint,
    Columns,
    Errors,
    Every,
    Intervals,
    Json,
    Layers,
    Metrics,
    Model,
    Significance,
    Sites,
    console,
    layer_choice,
    listed,
    quiet_transformers,
    with_options,
)
from tdgeom.cli.outputs import MeasuringOptions, OneModelOptions

__all__ = ["analyze", "demo"]


@with_options
def analyze(
    model: Model,
    options: OneModelOptions,
    layers: Layers = "all",
    sites: Sites = "residual_input",
    max_rows: Annotated[
        int | None,
        typer.Option(min=2, help=f"Rows (tokens, or sequences with --pool mean) to measure. [{MAX_ROWS}]"),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Another name of --max-rows.")] = None,
    metrics: Metrics = "default",
    diagnostics: Annotated[str | None, typer.Option(help="normalization_ablation", metavar="NAMES")] = None,
    errors: Errors = False,
    significance: Significance = False,
    convergence: Annotated[
        bool,
        typer.Option(
            "--convergence", help="Measures of N, N/2, N/4, ... rows of the sample too: have they settled?"
        ),
    ] = False,
    save_mode: Annotated[str, typer.Option(help="bundle or csv (tables as CSV), or json.")] = "bundle",
    checkpoint: Checkpoint = None,
    every: Every = 100,
    nonfinite: Annotated[
        str,
        typer.Option(help="Rows with NaN or Inf: raise an error, or drop and count them.", metavar="WORD"),
    ] = "raise",
    shard: Annotated[
        str | None,
        typer.Option(help="Measure part K of N alone, such as 3/16: jobs that share nothing.", metavar="K/N"),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(help="Leave the state here instead of tables: tdgeom merge makes them.", metavar="FILE"),
    ] = None,
    run_name: Annotated[str | None, typer.Option(help="A name to record.")] = None,
    columns: Columns = None,
    intervals: Intervals = False,
) -> Any:
    """Measure a model's representations of a text: tables here, a bundle and a report in DIR."""
    from tdgeom.cli.print_results import print_results
    from tdgeom.run.checkpoint import checkpoints_kept

    if max_rows is not None and max_tokens is not None:
        raise typer.BadParameter("--max-tokens is another name of --max-rows: give one of them")
    documents, named = options.documents()
    options.check_out(save_mode)
    if state is not None and options.out is not None:
        raise typer.BadParameter("--state leaves a part's state and no tables: --out belongs to tdgeom merge")
    net, batches = options.loaded(model, documents)
    with checkpoints_kept():  # until the analysis is saved
        results = tg.analyze_model(
            model,
            batches,
            model=net,
            max_rows=max_rows or max_tokens or MAX_ROWS,
            metrics=listed(metrics),
            diagnostics=listed(diagnostics) if diagnostics else None,
            errors=errors or intervals,
            significance=significance,
            convergence=convergence,
            layers=layer_choice(layers),
            sites=listed(sites),
            device=options.device_or_cuda(),
            seed=options.seed,
            sharded=options.sharded or None,
            select=options.select(),
            untrained=options.untrained,
            checkpoint=checkpoint,
            every=every,
            nonfinite=nonfinite,
            shard=shard,
            state=state,
            run_name=run_name,
            tokenizer_name=options.tokenizer or model,
            dataset_name=named,
            run_metadata={"batch_size": options.batch_size, "command": "tdgeom analyze"},
        )
        options.finish(results, partial(print_results, columns=columns, intervals=intervals), save_mode)
    if state is not None and state.is_file():
        console().print(f"State of this part: {state}", soft_wrap=True, markup=False)
    return results


def demo(
    out: Annotated[
        Path, typer.Option(help="Where the bundle, its report and its plots go.", metavar="DIR")
    ] = Path("tdgeom-demo"),
    max_rows: Annotated[int, typer.Option(min=2, help="Rows (tokens) to measure.")] = 20_000,
    as_json: Json = False,
) -> None:
    """Measure a real pretrained model on real text, offline (needs the demo extra)."""
    from tdgeom.cli.demo import demo_model_path, run_demo
    from tdgeom.cli.print_results import print_results

    demo_model_path()
    quiet_transformers()
    MeasuringOptions(as_json=as_json).finish(run_demo(out, max_rows=max_rows), print_results)
