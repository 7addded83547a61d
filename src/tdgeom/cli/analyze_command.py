"""``tdgeom analyze`` and ``tdgeom demo``: the default analysis of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tdgeom.cli.options import (
    BatchSize,
    Dataset,
    Device,
    JsonLines,
    Layers,
    Model,
    Out,
    Overwrite,
    Plots,
    Remote,
    Seed,
    SequenceLength,
    Sites,
    TextFile,
    Tokenizer,
    Untrained,
    check_out,
    device_choice,
    documents,
    layer_choice,
    listed,
    loaded,
    quiet_transformers,
    report,
)

__all__ = ["analyze", "demo"]


def analyze(
    model: Model,
    text: TextFile = None,
    jsonl: JsonLines = None,
    dataset: Dataset = None,
    layers: Layers = "all",
    sites: Sites = "residual_input",
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to measure.")] = 100_000,
    batch_size: BatchSize = 8,
    seq_len: SequenceLength = None,
    metrics: Annotated[
        str, typer.Option(help="default, or any of spectrum,sample,novelty,router.", metavar="FAMILIES")
    ] = "default",
    diagnostics: Annotated[str | None, typer.Option(help="normalization_ablation", metavar="NAMES")] = None,
    out: Out = None,
    plots: Plots = False,
    overwrite: Overwrite = False,
    save_mode: Annotated[str, typer.Option(help="bundle or csv (tables as CSV), or json.")] = "bundle",
    device: Device = None,
    tokenizer: Tokenizer = None,
    skip_first: Annotated[
        int, typer.Option(min=0, help="Leave out this many tokens at the start of a sequence.")
    ] = 0,
    skip_special: Annotated[bool, typer.Option("--skip-special", help="Leave out special tokens.")] = False,
    untrained: Untrained = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Keep the run's state in this file, and go on from it if it exists.", metavar="FILE"
        ),
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Batches between two writes of the checkpoint.")] = 100,
    seed: Seed = 0,
    run_name: Annotated[str | None, typer.Option(help="A name to record.")] = None,
    trust_remote_code: Remote = False,
) -> None:
    """Measure a model's representations of a text: tables here, a bundle and pictures in DIR."""
    source, named = documents(text, jsonl, dataset)
    overwrite = check_out(out, overwrite, plots, save_mode)
    net, batches = loaded(
        model,
        source,
        batch_size=batch_size,
        seq_len=seq_len,
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
    )
    from tdgeom.analysis.analyze_model import analyze_model

    results = analyze_model(
        model,
        batches,
        model=net,
        max_tokens=max_tokens,
        metrics=listed(metrics),
        diagnostics=listed(diagnostics) if diagnostics else None,
        layers=layer_choice(layers),
        sites=listed(sites),
        device=device_choice(device),
        seed=seed,
        select={"skip_first": skip_first, "skip_special": skip_special},
        untrained=untrained,
        checkpoint=checkpoint,
        every=every,
        run_name=run_name,
        tokenizer_name=tokenizer or model,
        dataset_name=named,
        run_metadata={"batch_size": batch_size, "command": "tdgeom analyze"},
    )
    report(results, out, save_mode, overwrite, plots)


def demo(
    out: Annotated[Path, typer.Option(help="Where the bundle and its plots go.", metavar="DIR")] = Path(
        "tdgeom-demo"
    ),
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to measure.")] = 20_000,
) -> None:
    """Measure a real pretrained model on real text, offline (needs the demo extra)."""
    from tdgeom.cli.demo import demo_model_path, run_demo

    demo_model_path()
    quiet_transformers()
    report(run_demo(out, max_tokens=max_tokens), None, "bundle", False, False)
