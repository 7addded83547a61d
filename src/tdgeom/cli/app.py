"""The command ``tdgeom``: its commands, and how it ends."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

import tdgeom as tg
from tdgeom.cli.analyze_command import analyze, demo
from tdgeom.cli.compare_command import compare
from tdgeom.cli.diff_command import diff
from tdgeom.cli.geometry_commands import dimension, overlap
from tdgeom.cli.launched_ranks import SHARED, launched
from tdgeom.cli.look_commands import show, sites
from tdgeom.cli.merge_command import merge
from tdgeom.cli.options import STATE
from tdgeom.cli.report_command import report
from tdgeom.cli.rerun_command import rerun
from tdgeom.cli.runs_command import app as runs
from tdgeom.cli.store_command import store
from tdgeom.cli.sweep_command import sweep
from tdgeom.core.visible_text import visible

__all__ = ["app", "main"]

app = typer.Typer(
    name="tdgeom",
    help="Measure the geometry of a neural network's representations.",
    epilog="Start with: [bold]tdgeom demo[/bold]",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# typer carries its own copy of click in later versions: its exceptions are found through the one it exports
UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 where ``tdgeom diff`` finds a difference, 2 after an error, 130 after
    Ctrl-C.

    Errors are one line on stderr. ``--debug``, anywhere in the arguments, shows the traceback instead. Processes that a launcher
    started (``torchrun -m tdgeom ...``) do the work together; rank 0 prints and writes, and all have one exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    STATE["debug"] = debug
    try:
        ranks = launched()
    except (ValueError, RuntimeError) as error:
        return _fail(str(error))
    if ranks is None:
        code, said = _ended(arguments, debug)
        return _fail(said) if said else code
    code, said = 0, ""
    if ranks.rank == 0 or (arguments[:1] and arguments[0] in SHARED):
        with ranks.output():
            code, said = _ended(arguments, debug)
    if said and not ranks.is_said(said):
        _fail(f"rank {ranks.rank}: {said}" if ranks.rank else said)
    return code if code == INTERRUPTED else ranks.agreed(code)


def _ended(arguments: list[str], debug: bool) -> tuple[int, str]:
    """(the exit code, the error) of a command."""
    code: Any = 0
    try:
        with warnings.catch_warnings():
            if not debug:
                _quiet()
            code = app(arguments, prog_name="tdgeom", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away: tdgeom show DIR | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0, ""
    except UsageError as error:
        said = error.format_message().strip().removeprefix("Invalid value: ") or "name a command"
        return FAILED, f"{said}{'' if said.endswith(('.', '?')) else '.'} See: {_help_for(error)}"
    except Exception as error:
        if debug:
            raise
        given = error.args[0] if isinstance(error, KeyError) and error.args else error
        return FAILED, str(given).strip() or type(error).__name__
    if code == INTERRUPTED:
        print("tdgeom: interrupted", file=sys.stderr)
    return (code if isinstance(code, int) else 0), ""


def _fail(message: str) -> int:
    print(visible(f"tdgeom: error: {' '.join(message.split())}"), file=sys.stderr)
    return FAILED


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
            print(visible(f"tdgeom: warning: {' '.join(str(message).split())}"), file=sys.stderr)

    warnings.showwarning = one_line


FAILED, INTERRUPTED = 2, 130  # exit codes
VERSIONS = ("torch", "tensordict", "transformers", "numpy")


def _version(asked: bool) -> None:
    """The version of the package, and of those that its numbers depend on: the first lines of a report."""
    if asked:
        typer.echo(f"tdgeom {tg.__version__}")
        for package in VERSIONS:
            try:
                typer.echo(f"{package} {version(package)}")
            except PackageNotFoundError:
                typer.echo(f"{package} is not installed")
        typer.echo(f"Python {sys.version.split()[0]}")
        raise typer.Exit


@app.callback()
def _options(
    versions: Annotated[
        bool,
        typer.Option("--version", "-V", help="Show the version, and stop.", is_eager=True, callback=_version),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and other libraries' messages.")
    ] = False,
) -> None:
    pass


app.command(
    epilog="Examples: [bold]tdgeom analyze gpt2 --text book.txt --out run[/bold]; "
    "[bold]tdgeom analyze ./my-model --jsonl rows.jsonl:body --layers 0,5,-1 --sites residual_output,mlp_output[/bold]; "
    "[bold]tdgeom analyze gpt2 --dataset wikitext:wikitext-2-raw-v1:test --max-rows 50000 --plots --out run[/bold]"
)(analyze)
EXAMPLES: dict[Callable[..., None], str] = {
    demo: "demo --max-rows 5000 --out try",
    show: "show tdgeom-demo",
    rerun: "rerun run --out again",
    report: "report run other-run --out both.html",
    diff: "diff run-before run-after",
    merge: "merge part-*.state --out run",
    sites: "sites gpt2",
    compare: "compare gpt2 ./my-gpt2 --text book.txt --plots --out run",
    sweep: "sweep trained --text book.txt --out over-training",
    dimension: "dimension gpt2 --text book.txt --untrained --plots --out run",
    overlap: "overlap gpt2 --text book.txt --labels chapters.txt",
    store: "store gpt2 --text book.txt --sites residual_output --dtype bfloat16 --store activations",
}
for command, example in EXAMPLES.items():
    app.command(epilog=f"Example: [bold]tdgeom {example}[/bold]")(command)
app.add_typer(runs)
