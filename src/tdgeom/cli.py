"""The command line: parse, call the library, print."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app", "main"]

app = typer.Typer(
    name="tdgeom",
    help="Measure the geometry of a neural network's representations.",
    epilog="Start with: [bold]tdgeom demo[/bold]",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# typer carries its own copy of click in later versions: its exceptions are found through the one it exports
UsageError = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
_STATE = {"debug": False}
Remote = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 after an error, 130 after Ctrl-C.

    Errors are one line on stderr. ``--debug``, anywhere in the arguments, shows the traceback instead.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    _STATE["debug"] = debug
    try:
        with warnings.catch_warnings():
            if not debug:
                _quiet()
            code = app(arguments, prog_name="tdgeom", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:  # the reader of our output went away: tdgeom show DIR | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except UsageError as error:
        said = error.format_message().strip().removeprefix("Invalid value: ")
        code = _fail(f"{said}{'' if said.endswith(('.', '?')) else '.'} See: {_help_for(error)}")
    except Exception as error:
        if debug:
            raise
        said = error.args[0] if isinstance(error, KeyError) and error.args else error
        code = _fail(str(said).strip() or type(error).__name__)
    if code == 130:
        print("tdgeom: interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _fail(message: str) -> int:
    print(f"tdgeom: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _help_for(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.command_path if context is not None else 'tdgeom'} --help"


def _quiet() -> None:
    """Silence other libraries' chatter; our own warnings become one line."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    def one_line(message: Any, category: type, filename: str, *_: Any, **__: Any) -> None:
        ours = f"{os.sep}tdgeom{os.sep}" in filename and issubclass(category, UserWarning)
        if ours or category.__module__.startswith("tdgeom"):
            print(f"tdgeom: warning: {' '.join(str(message).split())}", file=sys.stderr)

    warnings.showwarning = one_line


def _quiet_transformers() -> None:
    if not _STATE["debug"]:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and other libraries' messages.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="Examples: [bold]tdgeom analyze gpt2 --text book.txt --out run[/bold]; "
    "[bold]tdgeom analyze ./my-model --jsonl rows.jsonl:body --layers 0,5,-1 --sites residual_output,mlp_output[/bold]; "
    "[bold]tdgeom analyze gpt2 --dataset wikitext:wikitext-2-raw-v1:test --max-tokens 50000 --plots --out run[/bold]"
)
def analyze(
    model: Annotated[str, typer.Argument(help="A Hugging Face id or a local directory.", metavar="MODEL")],
    text: Annotated[
        str | None, typer.Option(help="A text file; blank lines separate documents.", metavar="FILE")
    ] = None,
    jsonl: Annotated[
        str | None, typer.Option(help="A field of a JSON-lines file.", metavar="FILE:FIELD")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="A dataset: NAME[:CONFIG[:SPLIT[:FIELD]]].", metavar="NAME", show_default=False),
    ] = None,
    layers: Annotated[
        str, typer.Option(help="all, or indices such as 0,5,-1, or a range such as 2:8.")
    ] = "all",
    sites: Annotated[
        str, typer.Option(help="Kinds or sites, comma-separated; [bold]tdgeom sites MODEL[/bold] lists them.")
    ] = "residual_input",
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to measure.")] = 100_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a batch.")] = 8,
    seq_len: Annotated[
        int | None,
        typer.Option(
            min=3, help="Longest sequence; longer documents are split. [256, or what the model takes]"
        ),
    ] = None,
    metrics: Annotated[
        str, typer.Option(help="default, or any of spectrum,sample,novelty,router.", metavar="FAMILIES")
    ] = "default",
    diagnostics: Annotated[str | None, typer.Option(help="normalization_ablation", metavar="NAMES")] = None,
    out: Annotated[Path | None, typer.Option(help="Save a bundle in this new folder.", metavar="DIR")] = None,
    plots: Annotated[bool, typer.Option("--plots", help="Write pictures into DIR/plots.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier bundle in DIR.")] = False,
    save_mode: Annotated[str, typer.Option(help="bundle or csv (tables as CSV), or json.")] = "bundle",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default cuda if there is one.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Another tokenizer than the model's own.")] = None,
    skip_first: Annotated[
        int, typer.Option(min=0, help="Leave out this many tokens at the start of a sequence.")
    ] = 0,
    skip_special: Annotated[bool, typer.Option("--skip-special", help="Leave out special tokens.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the row sample.")] = 0,
    run_name: Annotated[str | None, typer.Option(help="A name to record.")] = None,
    trust_remote_code: Remote = False,
) -> None:
    """Measure a model's representations of a text: tables here, a bundle and pictures in DIR."""
    if sum(source is not None for source in (text, jsonl, dataset)) != 1:
        raise typer.BadParameter(
            "give the text by exactly one of --text FILE, --jsonl FILE:FIELD and --dataset NAME"
        )
    overwrite = _check_out(out, overwrite, plots, save_mode)
    from tdgeom import text as documents

    source, named = (
        (documents.read_text(text), text)
        if text is not None
        else (documents.read_jsonl(jsonl), jsonl)
        if jsonl is not None
        else (documents.read_dataset(dataset or ""), dataset)
    )
    _quiet_transformers()
    import torch

    from tdgeom.analyze import analyze_model
    from tdgeom.models import load_model

    place = device or ("cuda" if torch.cuda.is_available() else None)
    words = _load_tokenizer(tokenizer or model, trust_remote_code)
    net = load_model(model, trust_remote_code=trust_remote_code)
    results = analyze_model(
        model,
        documents.TextBatches(source, words, batch_size=batch_size, seq_len=_length(seq_len, net, words)),
        model=net,
        max_tokens=max_tokens,
        metrics=_list(metrics),
        diagnostics=_list(diagnostics) if diagnostics else None,
        layers=_layers(layers),
        sites=_list(sites),
        device=place,
        seed=seed,
        select={"skip_first": skip_first, "skip_special": skip_special},
        run_name=run_name,
        tokenizer_name=tokenizer or model,
        dataset_name=named,
        run_metadata={"batch_size": batch_size, "command": "tdgeom analyze"},
    )
    _report(results, out, save_mode, overwrite, plots)


@app.command(epilog="Example: [bold]tdgeom demo --max-tokens 5000 --out try[/bold]")
def demo(
    out: Annotated[Path, typer.Option(help="Where the bundle and its plots go.", metavar="DIR")] = Path(
        "tdgeom-demo"
    ),
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to measure.")] = 20_000,
) -> None:
    """Measure a real pretrained model on real text, offline (needs the demo extra)."""
    from tdgeom.demo import demo_model_path, run_demo

    demo_model_path()
    _quiet_transformers()
    _report(run_demo(out, max_tokens=max_tokens), None, "bundle", False, False)


@app.command(epilog="Example: [bold]tdgeom show tdgeom-demo[/bold]")
def show(folder: Annotated[Path, typer.Argument(help="A bundle that --out named.", metavar="DIR")]) -> None:
    """Print the tables of a saved analysis."""
    from tdgeom._terminal import print_results
    from tdgeom.results import AnalysisResults

    print_results(AnalysisResults.load(folder), _console())


@app.command(epilog="Example: [bold]tdgeom sites gpt2[/bold]")
def sites(
    model: Annotated[str, typer.Argument(help="A Hugging Face id or a local directory.", metavar="MODEL")],
    every: Annotated[bool, typer.Option("--all", help="Every site, not a line a kind.")] = False,
    trust_remote_code: Remote = False,
) -> None:
    """List which sites a model has and the modules they are read at; its weights are not loaded."""
    _quiet_transformers()
    from tdgeom._terminal import print_sites
    from tdgeom.hooks import available_sites
    from tdgeom.models import model_structure

    net = model_structure(model, trust_remote_code=trust_remote_code)
    print_sites(net, available_sites(net), _console(), every=every)


def _report(results: Any, out: Path | None, save_mode: str, overwrite: bool, plots: bool) -> None:
    from tdgeom._terminal import print_results

    if results is None:  # another rank of a process group has them
        return
    console = _console()
    print_results(results, console)
    if out is not None:
        results.save(out, save_mode, overwrite=overwrite)
        if plots:
            from tdgeom.plot import write_plots

            write_plots(results, results.artifact_dir / "plots")
    if results.artifact_dir is not None:
        pictures = results.artifact_dir / "plots"
        console.print(f"\nSaved in {results.artifact_dir}", soft_wrap=True, markup=False)
        if pictures.is_dir():
            console.print(f"Pictures in {pictures}", soft_wrap=True, markup=False)


def _check_out(out: Path | None, overwrite: bool, plots: bool, save_mode: str) -> bool:
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


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _layers(text: str) -> str | slice:
    """``"2:8"`` as a slice; ``"all"`` and ``"0,5,-1"`` are understood by the library."""
    if ":" not in text:
        return text
    try:
        return slice(*(int(part) if part.strip() else None for part in text.split(":")))
    except (ValueError, TypeError):
        raise typer.BadParameter(
            f"--layers takes all, indices such as 0,5,-1, or a range such as 2:8, got {text!r}"
        ) from None


def _load_tokenizer(name: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (
        Exception
    ) as error:  # a backend that is missing, a repository that is not there, files that do not fit
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"could not load the tokenizer of {name!r}: {said} Name another one with --tokenizer."
        ) from error


def _length(asked: int | None, model: Any, tokenizer: Any) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
