"""The command line: parse, call the library, print."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from tdgeom._command_line import (
    STATE,
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
    console,
    device_choice,
    documents,
    layer_choice,
    listed,
    loaded,
    quiet_transformers,
    report,
)
from tdgeom._compare_command import compare
from tdgeom._geometry_commands import dimension, overlap
from tdgeom._runs_commands import app as runs

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


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 after an error, 130 after Ctrl-C.

    Errors are one line on stderr. ``--debug``, anywhere in the arguments, shows the traceback instead.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    STATE["debug"] = debug
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
    from tdgeom.analyze import analyze_model

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
    quiet_transformers()
    report(run_demo(out, max_tokens=max_tokens), None, "bundle", False, False)


@app.command(epilog="Example: [bold]tdgeom show tdgeom-demo[/bold]")
def show(folder: Annotated[Path, typer.Argument(help="A bundle that --out named.", metavar="DIR")]) -> None:
    """Print the tables of a saved analysis."""
    from tdgeom._terminal import print_results
    from tdgeom.results import AnalysisResults

    print_results(AnalysisResults.load(folder), console())


@app.command(epilog="Example: [bold]tdgeom sites gpt2[/bold]")
def sites(
    model: Model,
    every: Annotated[bool, typer.Option("--all", help="Every site, not a line a kind.")] = False,
    trust_remote_code: Remote = False,
) -> None:
    """List which sites a model has and the modules they are read at; its weights are not loaded."""
    quiet_transformers()
    from tdgeom._terminal import print_sites
    from tdgeom.hooks import available_sites
    from tdgeom.models import model_structure

    net = model_structure(model, trust_remote_code=trust_remote_code)
    print_sites(net, available_sites(net), console(), every=every)


app.command(epilog="Example: [bold]tdgeom compare gpt2 ./my-gpt2 --text book.txt --plots --out run[/bold]")(
    compare
)
app.command(
    epilog="Example: [bold]tdgeom dimension gpt2 --text book.txt --untrained --plots --out run[/bold]"
)(dimension)
app.command(epilog="Example: [bold]tdgeom overlap gpt2 --text book.txt --labels chapters.txt[/bold]")(overlap)
app.add_typer(runs)


if __name__ == "__main__":
    sys.exit(main())
