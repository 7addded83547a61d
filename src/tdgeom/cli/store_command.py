"""``tdgeom store``: a model's activations kept in a store, to be analysed later and more than once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import tdgeom as tg
from tdgeom.cli.inputs import OneModelInputs
from tdgeom.cli.options import Layers, Model, Sites, console, layer_choice, listed, print_json, with_options

__all__: list[str] = []

DTYPES = ("as-is", "bfloat16", "float16", "float32", "float64", "float8")


@with_options
def store(
    model: Model,
    options: OneModelInputs,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--store",
            "--out",
            envvar="TDGEOM_STORE",
            help="The store's folder; made if it is not there.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    sites: Sites = "residual_output",
    layers: Layers = "all",
    max_rows: Annotated[int | None, typer.Option(min=1, help="Rows to keep. [all]")] = None,
    dtype: Annotated[
        str, typer.Option(help=f"What values are cast to: {', '.join(DTYPES)}.", metavar="NAME")
    ] = "as-is",
    also: Annotated[
        str,
        typer.Option(
            help="Entries of the batch to keep beside the rows, comma-separated, such as input_ids.",
            metavar="NAMES",
        ),
    ] = "",
    experiment: Annotated[str, typer.Option(help="A name that several runs share.")] = "default",
    tag: Annotated[list[str] | None, typer.Option(help="A tag to find the run by; may be repeated.")] = None,
    resume: Annotated[
        str | None, typer.Option(help="Go on with this unfinished run.", metavar="RUN", show_default=False)
    ] = None,
) -> Any:
    """Keep a model's activations in a store: tdgeom runs finds them, and analyses read them without the model."""
    from tensordict.nn import TensorDictSequential

    from tdgeom.rows.text import TextBatches
    from tdgeom.store.runs import size_text

    if folder is None:
        raise typer.BadParameter("name the store: --store DIR, or the environment variable TDGEOM_STORE")
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype takes one of {', '.join(DTYPES)}, got {dtype!r}")
    select = options.select()
    documents, named = options.documents()
    net, batches = options.loaded(model, documents)
    if (device := options.device_or_cuda()) is not None:
        net.to(device)
    capture = tg.Capture(net, listed(sites), layers=layer_choice(layers))
    carried = list(
        dict.fromkeys([*listed(also), *(["document_id"] if isinstance(batches, TextBatches) else [])])
    )
    opened = tg.ActivationStore(folder)
    keep = tg.StoreActivations(
        opened,
        capture.sites,
        also=carried,
        dtype=None if dtype == "as-is" else dtype,
        resume=resume and opened.query()[resume]["id"],
        model=model,
        dataset=named,
        experiment=experiment,
        tag=tag or [],
        capture=capture,
        metadata={"command": {**options.command, "weights": options.weights}},
    )
    pipeline = TensorDictSequential(capture, tg.SelectTokens(capture.sites, also=carried, **select), keep)
    try:
        result = tg.run(pipeline, batches, max_rows=max_rows, sharded=options.sharded or None)
    except BaseException:
        if not keep.is_empty:
            typer.echo(
                f"tdgeom: run {keep.run_id} is unfinished: --resume {keep.run_id} goes on with it", err=True
            )
        raise
    if result is None:  # another rank of a process group has it
        return None
    kept = {
        "run": keep.run_id,
        "store": str(folder),
        "sites": [str(site) for site in capture.sites],
        **{name: result["stored", name].item() for name in ("rows", "bytes", "relative_error")},
    }
    if options.as_json:
        print_json(kept)
        return kept
    changed = kept["relative_error"]
    terminal = console()
    for line in (
        f"Run {kept['run']} in {folder}: {kept['rows']:,} rows at {len(kept['sites'])} sites, {size_text(kept['bytes'])}",
        f"Casting to {dtype} changed them by {changed:.1e} (relative)" if changed else "",
        f"What is known of it: tdgeom runs show {kept['run']} --store {folder}",
    ):
        if line:
            terminal.print(line, soft_wrap=True, markup=False)
    return kept
