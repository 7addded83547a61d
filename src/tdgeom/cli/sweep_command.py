"""``tdgeom sweep``: every checkpoint of a training, and each beside the first, the last and the one before."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import tdgeom as tg
from tdgeom.cli.inputs import OneModelInputs
from tdgeom.cli.options import (
    MAX_ROWS,
    Errors,
    Layers,
    Metrics,
    Sites,
    console,
    layer_choice,
    listed,
    print_json,
    quiet_transformers,
    with_options,
)

if TYPE_CHECKING:
    from rich.console import Console

__all__: list[str] = []


@with_options
def sweep(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            help="A trainer's output directory, or checkpoints: folders, or ID@REVISION; the last number is the step.",
            metavar="CHECKPOINT...",
        ),
    ],
    options: OneModelInputs,
    sites: Sites = "residual_output",
    layers: Layers = "all",
    metrics: Metrics = "default",
    steps: Annotated[
        str | None, typer.Option(help="Only these steps, comma-separated.", metavar="NUMBERS")
    ] = None,
    similarity: Annotated[
        str,
        typer.Option(
            help="Measures between a checkpoint and another, comma-separated; none: none.",
            metavar="NAMES",
            show_default="linear_cka_debiased, feature_subspace_novelty",
        ),
    ] = "linear_cka_debiased,feature_subspace_novelty",
    references: Annotated[
        str,
        typer.Option(
            help="What each is compared with: of first, last, previous.",
            metavar="WORDS",
            show_default="all three",
        ),
    ] = "first,last,previous",
    max_rows: Annotated[int, typer.Option(min=2, help="Rows to measure at each step.")] = MAX_ROWS,
    errors: Errors = False,
    devices: Annotated[
        str | None,
        typer.Option(
            help="Several devices, each of which takes checkpoints: cuda:0,cuda:1.", metavar="NAMES"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Work in this folder, and go on in it: results and report are there.", metavar="DIR"
        ),
    ] = None,
) -> Any:
    """Measure every checkpoint of a training on one text: tables over steps, similarity of steps, a report."""
    from tdgeom.model.loading import model_structure
    from tdgeom.rows.text import TextBatches
    from tdgeom.training.checkpoints import as_checkpoints

    documents, named = options.documents()
    quiet_transformers()
    loading: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    given: Any = checkpoints[0] if len(checkpoints) == 1 and Path(checkpoints[0]).is_dir() else checkpoints
    wanted = None if steps is None else _numbers(steps)
    if isinstance(given, str) and (Path(given) / "config.json").is_file():
        raise typer.BadParameter(
            f"{given} is one checkpoint: name several, or the folder that holds checkpoint-100, ..."
        )
    found = as_checkpoints(given, wanted, "sweep", **loading)
    last = (
        found[-1].name.partition("@")[0]
        if "@" in found[-1].name and not Path(found[-1].name).exists()
        else found[-1].name
    )
    if options.images is not None:
        batches: Any = options.pixels(documents, options.tokenizer or last)
    else:
        words = options.tokenizer_of(options.tokenizer or last)
        length = options.length_for(model_structure(last, **loading), words)
        batches = TextBatches(list(documents), words, batch_size=options.batch_size, max_length=length)
    result = tg.sweep(
        given,
        batches,
        steps=wanted,
        metrics=listed(metrics),
        sites=listed(sites),
        layers=layer_choice(layers),
        similarity=[] if similarity == "none" else listed(similarity),
        references=listed(references),
        max_rows=max_rows,
        errors=errors,
        seed=options.seed,
        select=options.select(),
        device=listed(devices) if devices else options.device_or_cuda(),
        save_dir=out,
        **loading,
    )
    result.metadata |= {"dataset": named, "run_metadata": {"command": "tdgeom sweep"}}
    if out is not None:
        result.save(out / "results", overwrite=True)
        result.report()
    if options.as_json:
        print_json({**result.to_dict(), "folder": result.artifact_dir})
    else:
        _print(result, console())
    return result


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in listed(text)]
    except ValueError:
        raise typer.BadParameter(f"--steps takes whole numbers such as 0,100,1000, got {text!r}") from None


def _print(result: tg.Sweep, terminal: Console) -> None:
    """The first and the last site over steps, and what lies between steps; where the report is."""
    from rich.table import Table
    from rich.text import Text

    last = str(result.metrics["site"].iloc[-1])
    rows = result.metrics[result.metrics["site"] == last]
    wanted = ["d_pr", "effective_rank", "top1_share", *(n for n in rows if str(n).startswith("linear_cka"))]
    wanted += [str(name) for name in rows if str(name).startswith("feature_subspace_novelty_to")]
    shown = [name for name in wanted if name in rows][:8]
    table = Table("step", *map(str, shown), title=Text(f"{last} over {len(result.steps)} steps"))
    for row in rows.to_dict("records"):
        table.add_row(f"{row['step']:,}", *(f"{row[name]:.4g}" for name in shown))
    terminal.print(table)
    if result.artifact_dir is not None:
        terminal.print(f"\nSaved in {result.artifact_dir}", soft_wrap=True, markup=False)
        terminal.print(
            f"Report, for a browser: {result.artifact_dir / 'report.html'}", soft_wrap=True, markup=False
        )
