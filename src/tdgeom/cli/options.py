"""What the commands share: how options are written, and how their words are understood."""

from __future__ import annotations

import functools
import inspect
import json
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tdgeom.cli.completion import completing, measures, site_kinds
from tdgeom.cli.config_file import recorded

if TYPE_CHECKING:
    from rich.console import Console

__all__: list[str] = []

STATE = {"debug": False}
MAX_ROWS = 100_000  # as the library's own: naming an option needs no torch

Model = Annotated[str, typer.Argument(help="A Hugging Face id or a local directory.", metavar="MODEL")]
Layers = Annotated[str, typer.Option(help="all, or indices such as 0,5,-1, or a range such as 2:8.")]
Sites = Annotated[
    str,
    typer.Option(
        help="Kinds or sites, comma-separated; [bold]tdgeom sites MODEL[/bold] lists them.",
        autocompletion=completing(site_kinds),
    ),
]
Errors = Annotated[
    bool, typer.Option("--errors", help="A standard error beside every measure, over 20 groups of documents.")
]
Significance = Annotated[
    bool,
    typer.Option(
        "--significance",
        help="Every measure of two layers beside what it is by chance: z, p, p for the best of all pairs, calibrated.",
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(help="Keep the run's state in this file, and go on from it if it exists.", metavar="FILE"),
]
Every = Annotated[int, typer.Option(min=1, help="Batches between two writes of the checkpoint.")]
Metrics = Annotated[
    str,
    typer.Option(
        help="default, any of spectrum, sample, novelty and router, and measures such as twonn, gride, rankme.",
        metavar="NAMES",
        autocompletion=completing(measures),
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        help="The columns to print, comma-separated; all: every one, a few side by side. [as many as fit]",
        metavar="NAMES",
    ),
]
Intervals = Annotated[
    bool,
    typer.Option(
        "--intervals", help="The 95 % interval of every measure that has an error, in tables of their own."
    ),
]
Pool = Annotated[str, typer.Option(help="mean: a row is the mean over a sequence. none: every token is one.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")]
Remote = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]


def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command of typer's in which the parameter that is a class of options stands for one option a field."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    (shared,) = (parameter for parameter in own if is_dataclass(parameter.annotation))
    types = typing.get_type_hints(shared.annotation, include_extras=True)
    options = [
        inspect.Parameter(field.name, shared.kind, default=field.default, annotation=types[field.name])
        for field in fields(shared.annotation)
        if field.init
    ]

    @functools.wraps(command)
    def called(**given: Any) -> Any:
        record = recorded(command.__name__, given)
        taken = {option.name: given.pop(option.name) for option in options}
        made = shared.annotation(**taken)
        made.command = record
        return command(**given, **{shared.name: made})

    every = [one for parameter in own for one in (options if parameter is shared else [parameter])]
    called.__annotations__ = {one.name: one.annotation for one in every}
    vars(called)["__signature__"] = inspect.Signature(every)
    return called


def quiet_transformers() -> None:
    """Silence transformers' logs and bars, unless --debug wants them."""
    if not STATE["debug"]:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()


def console() -> Console:
    """Where tables are printed."""
    from tdgeom.cli.safe_console import SafeConsole

    return SafeConsole(highlight=False, soft_wrap=False)


def print_json(value: Any) -> None:
    """A value as JSON on stdout: what is no number is null."""
    from tdgeom.files.json_text import plain

    typer.echo(json.dumps(plain(value), indent=2, allow_nan=False))


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


def position_choice(text: str) -> str | list[int] | slice:
    """``"last"`` as it is, ``"2:8"`` as a slice, ``"0,5,-1"`` as a list of ints."""
    from tdgeom.model.positions import is_position

    try:
        if ":" in text:
            return slice(*(int(part) if part.strip() else None for part in text.split(":")))
        if text.lstrip("-")[:1].isdigit():
            return [int(part) for part in listed(text)]
    except (ValueError, TypeError):
        pass
    if not is_position(text):
        raise typer.BadParameter(
            f"--positions takes all, first, last, last-N, special, random-N, indices such as 0,5,-1, or a range such as 2:8, "
            f"got {text!r}"
        )
    return text
