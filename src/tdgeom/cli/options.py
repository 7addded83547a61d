"""What the commands share: their options, the text they read, the model they load."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

__all__: list[str] = []

STATE = {"debug": False}

Model = Annotated[str, typer.Argument(help="A Hugging Face id or a local directory.", metavar="MODEL")]
TextFile = Annotated[
    str | None, typer.Option("--text", help="A text file; blank lines separate documents.", metavar="FILE")
]
JsonLines = Annotated[
    str | None, typer.Option("--jsonl", help="A field of a JSON-lines file.", metavar="FILE:FIELD")
]
Dataset = Annotated[
    str | None,
    typer.Option(
        "--dataset", help="A dataset: NAME[:CONFIG[:SPLIT[:FIELD]]].", metavar="NAME", show_default=False
    ),
]
Layers = Annotated[
    str, typer.Option("--layers", help="all, or indices such as 0,5,-1, or a range such as 2:8.")
]
Sites = Annotated[
    str,
    typer.Option(
        "--sites", help="Kinds or sites, comma-separated; [bold]tdgeom sites MODEL[/bold] lists them."
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Sequences a batch.")]
SequenceLength = Annotated[
    int | None,
    typer.Option(
        "--seq-len",
        min=3,
        help="Longest sequence; longer documents are split. [256, or what the model takes]",
    ),
]
Out = Annotated[Path | None, typer.Option("--out", help="Save a bundle in this new folder.", metavar="DIR")]
Plots = Annotated[bool, typer.Option("--plots", help="Write pictures into DIR/plots.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier bundle in DIR.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps; default cuda if there is one.")
]
Tokenizer = Annotated[str | None, typer.Option("--tokenizer", help="Another tokenizer than the model's own.")]
Untrained = Annotated[
    bool, typer.Option("--untrained", help="Measure the same model with fresh random weights beside it.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the row sample.")]
Remote = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]


def quiet_transformers() -> None:
    """Silence transformers' logs and bars, unless --debug wants them."""
    if not STATE["debug"]:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()


def console() -> Any:
    """Where tables are printed."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)


def check_out(out: Path | None, overwrite: bool, plots: bool, save_mode: str) -> bool:
    """Refuse before the work what would be refused after it; whether to overwrite (an empty folder always)."""
    if save_mode not in ("bundle", "csv", "json"):
        raise typer.BadParameter(f"--save-mode takes bundle, csv or json, got {save_mode!r}")
    if plots:
        from tdgeom.plot import require_matplotlib

        if out is None:
            raise typer.BadParameter("--plots needs --out DIR, the folder that the pictures go to")
        require_matplotlib()
    if out is None or not out.exists():
        return overwrite
    if not (out.is_dir() and not any(out.iterdir())):
        if not overwrite:
            raise typer.BadParameter(
                f"{out} exists already: name another folder, or replace a bundle there with --overwrite"
            )
        if not (out / "metadata.json").is_file():
            raise typer.BadParameter(
                f"{out} exists and is no bundle (it has no metadata.json), so it is not overwritten"
            )
    return True


def listed(text: str) -> list[str]:
    """``"a, b"`` as ``["a", "b"]``."""
    return [part.strip() for part in text.split(",") if part.strip()]


def layer_choice(text: str) -> str | slice:
    """``"2:8"`` as a slice; ``"all"`` and ``"0,5,-1"`` are understood by the library."""
    if ":" not in text:
        return text
    try:
        return slice(*(int(part) if part.strip() else None for part in text.split(":")))
    except (ValueError, TypeError):
        raise typer.BadParameter(
            f"--layers takes all, indices such as 0,5,-1, or a range such as 2:8, got {text!r}"
        ) from None


def load_tokenizer(name: str, trust_remote_code: bool) -> Any:
    """The tokenizer of that name, or an error that names --tokenizer."""
    from transformers import AutoTokenizer

    from tdgeom.model.loading import first_reason

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (
        Exception
    ) as error:  # a backend that is missing, a repository that is not there, files that do not fit
        raise ValueError(
            f"could not load the tokenizer of {name!r}: {first_reason(name, error)} Name another one with --tokenizer."
        ) from error


def sequence_length(asked: int | None, model: Any, tokenizer: Any) -> int:
    """The sequence length: what was asked for if the model takes it, else 256 or the most it takes."""
    config = getattr(model, "config", None)
    limits = [
        getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")
    ]
    limits = [
        limit
        for limit in (*limits, tokenizer.model_max_length)
        if isinstance(limit, int) and 0 < limit < 10**9
    ]
    most = min(limits, default=None)
    if asked is None:
        return min(256, most or 256)
    if most is not None and asked > most:
        raise typer.BadParameter(
            f"--seq-len {asked} is longer than the {most} positions that the model takes"
        )
    return asked


def device_choice(asked: str | None) -> str | None:
    """The device asked for, else CUDA where there is one."""
    import torch

    return asked or ("cuda" if torch.cuda.is_available() else None)


def documents(text: str | None, jsonl: str | None, dataset: str | None) -> tuple[Iterable[str], str]:
    """The documents that exactly one of the three options names, and their name."""
    if sum(source is not None for source in (text, jsonl, dataset)) != 1:
        raise typer.BadParameter(
            "give the text by exactly one of --text FILE, --jsonl FILE:FIELD and --dataset NAME"
        )
    from tdgeom.rows.text import read_dataset, read_jsonl, read_text

    if text is not None:
        return read_text(text), text
    if jsonl is not None:
        return read_jsonl(jsonl), jsonl
    return read_dataset(dataset or ""), str(dataset)


def loaded(
    model: str,
    source: Iterable[str],
    *,
    batch_size: int,
    seq_len: int | None,
    tokenizer: str | None,
    trust_remote_code: bool,
    labels: Sequence[float] | None = None,
) -> tuple[Any, Any]:
    """The model with its weights, and its tokenizer's batches of the documents."""
    quiet_transformers()
    from tdgeom.model.loading import load_model
    from tdgeom.rows.text import TextBatches

    words = load_tokenizer(tokenizer or model, trust_remote_code)
    net = load_model(model, trust_remote_code=trust_remote_code)
    length = sequence_length(seq_len, net, words)
    return net, TextBatches(source, words, batch_size=batch_size, seq_len=length, labels=labels)


def report(results: Any, out: Path | None, save_mode: str, overwrite: bool, plots: bool) -> None:
    """Print an analysis; save it, and draw it, where the options say so."""
    from tdgeom.cli.print_results import print_results

    if results is None:  # another rank of a process group has them
        return
    terminal = console()
    print_results(results, terminal)
    if out is not None:
        results.save(out, save_mode, overwrite=overwrite)
        if plots:
            from tdgeom.plot import write_plots

            write_plots(results, results.artifact_dir / "plots")
    say_where(results)


def say_where(results: Any) -> None:
    """Where a saved analysis and its pictures are."""
    terminal = console()
    if results.artifact_dir is not None:
        pictures = results.artifact_dir / "plots"
        terminal.print(f"\nSaved in {results.artifact_dir}", soft_wrap=True, markup=False)
        if pictures.is_dir():
            terminal.print(f"Pictures in {pictures}", soft_wrap=True, markup=False)
