"""What the commands share: their options, the text they read, the model they load, how they end."""

from __future__ import annotations

import functools
import inspect
import json
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tdgeom.cli.completion import completing, measures, site_kinds
from tdgeom.cli.config_file import read_config, recorded

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from tdgeom.analysis.results import AnalysisResults
    from tdgeom.rows.text import TextBatches

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
Metrics = Annotated[
    str,
    typer.Option(
        help="default, any of spectrum,sample,novelty,router, and measures such as twonn,gride,rankme.",
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
Pool = Annotated[str, typer.Option(help="mean: a row is the mean over a sequence. none: every token is one.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")]
Remote = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]


@dataclass
class TextOptions:
    """The options of every command that measures models on a text."""

    text: Annotated[
        str | None, typer.Option(help="A text file; blank lines separate documents.", metavar="FILE")
    ] = None
    jsonl: Annotated[str | None, typer.Option(help="A field of a JSON-lines file.", metavar="FILE:FIELD")] = (
        None
    )
    dataset: Annotated[
        str | None,
        typer.Option(help="A dataset: NAME[:CONFIG[:SPLIT[:FIELD]]].", metavar="NAME", show_default=False),
    ] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a batch.")] = 8
    max_length: Annotated[
        int | None,
        typer.Option(
            min=3, help="Longest sequence; longer documents are split. [256, or what the model takes]"
        ),
    ] = None
    positions: Annotated[
        str,
        typer.Option(
            help="Which tokens become rows: all, first, last, last-N, special, random-N, indices such as 0,5,-1, or a range "
            "such as 2:8."
        ),
    ] = "all"
    pool: Pool = "none"
    skip_first: Annotated[
        int, typer.Option(min=0, help="Leave out this many tokens at the start of a sequence.")
    ] = 0
    skip_special: Annotated[bool, typer.Option("--skip-special", help="Leave out special tokens.")] = False
    out: Annotated[Path | None, typer.Option(help="Save a bundle in this new folder.", metavar="DIR")] = None
    plots: Annotated[bool, typer.Option("--plots", help="Write pictures into DIR/plots.")] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier bundle in DIR.")] = False
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default cuda if there is one.")
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of the row sample.")] = 0
    trust_remote_code: Remote = False
    as_json: Json = False
    config: Annotated[
        Path | None,
        typer.Option(
            help="Options from a YAML or TOML file; those given here count more.",
            metavar="FILE",
            is_eager=True,
            callback=read_config,
        ),
    ] = None

    command: dict[str, Any] = field(default_factory=dict, init=False, repr=False)  # as it was called
    weights: dict[str, Any] = field(default_factory=dict, init=False, repr=False)  # of the models loaded

    def documents(self) -> tuple[Iterable[str], str]:
        """The documents that exactly one of the three options names, and their name."""
        from tdgeom.rows.text import read_dataset, read_jsonl, read_text

        readers = {self.text: read_text, self.jsonl: read_jsonl, self.dataset: read_dataset}
        named = [name for name in (self.text, self.jsonl, self.dataset) if name is not None]
        if len(named) != 1:
            raise typer.BadParameter(
                "give the text by exactly one of --text FILE, --jsonl FILE:FIELD and --dataset NAME"
            )
        return readers[named[0]](named[0]), named[0]

    def check_out(self, save_mode: str = "bundle") -> None:
        """Refuse before the work what would be refused after it."""
        from tdgeom.files.bundle import check_target
        from tdgeom.plot.style import require_matplotlib

        if save_mode not in ("bundle", "csv", "json"):
            raise typer.BadParameter(f"--save-mode takes bundle, csv or json, got {save_mode!r}")
        if self.plots:
            if self.out is None:
                raise typer.BadParameter("--plots needs --out DIR, the folder that the pictures go to")
            require_matplotlib()
        if self.out is not None:
            check_target(self.out, save_mode, self.overwrite)

    def select(self) -> dict[str, Any]:
        """Which positions become rows: what was asked for, as ``SelectTokens`` takes it."""
        if self.pool not in ("mean", "none"):
            raise typer.BadParameter(f"--pool takes mean or none, got {self.pool!r}")
        asked = {
            "positions": position_choice(self.positions) if self.positions != "all" else None,
            "pool": "mean" if self.pool == "mean" else None,
            "skip_first": self.skip_first or None,
            "skip_special": self.skip_special or None,
        }
        return {name: value for name, value in asked.items() if value is not None}

    def load(self, name: str) -> nn.Module:
        """A model with its weights, which the bundle can tell again."""
        from tdgeom.model.loading import load_model
        from tdgeom.run.identity import weights_identity

        model = load_model(name, trust_remote_code=self.trust_remote_code)
        self.weights[name] = weights_identity(model)["sha256"]
        return model

    def tokenizer_of(self, name: str) -> Any:
        """The tokenizer of that name, or an error that names --tokenizer."""
        from transformers import AutoTokenizer

        from tdgeom.model.loading import first_reason

        try:
            return AutoTokenizer.from_pretrained(name, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # no backend, no such repository, files that do not fit
            raise ValueError(
                f"could not load the tokenizer of {name!r}: {first_reason(name, error)} Name another one with --tokenizer."
            ) from error

    def length_for(self, model: nn.Module, tokenizer: Any) -> int:
        """The sequence length: what was asked for if the model takes it, else 256 or the most it takes."""
        names = ("max_position_embeddings", "n_positions", "max_seq_len")
        limits = [getattr(getattr(model, "config", None), name, None) for name in names]
        most = min(
            (
                limit
                for limit in (*limits, tokenizer.model_max_length)
                if isinstance(limit, int) and 0 < limit < 10**9
            ),
            default=None,
        )
        if self.max_length is None:
            return min(256, most or 256)
        if most is not None and self.max_length > most:
            raise typer.BadParameter(
                f"--max-length {self.max_length} is longer than the {most} positions that the model takes"
            )
        return self.max_length

    def device_or_cuda(self) -> str | None:
        """The device asked for, else CUDA where there is one."""
        import torch

        return self.device or ("cuda" if torch.cuda.is_available() else None)

    def finish(
        self,
        results: AnalysisResults | None,
        printed: Callable[[AnalysisResults, Console], None],
        save_mode: str = "bundle",
    ) -> None:
        """Save an analysis with its report, and draw it, where the options say so; print it, and say where it is."""
        if results is None:  # another rank of a process group has it
            return
        if self.command:
            results.metadata["command"] = {**self.command, "weights": self.weights}
        if self.out is not None:
            results.save(self.out, save_mode, overwrite=self.overwrite)
            if self.plots:
                results.write_plots()
            try:
                results.report()
            except ModuleNotFoundError as error:  # the tables are saved, and tdgeom report makes it later
                typer.echo(f"tdgeom: no report: {error}", err=True)
        if self.as_json:
            print_json({**results.to_dict(), "folder": results.artifact_dir})
            return
        terminal = console()
        printed(results, terminal)
        if results.artifact_dir is not None:
            report, pictures = results.artifact_dir / "report.html", results.artifact_dir / "plots"
            terminal.print(f"\nSaved in {results.artifact_dir}", soft_wrap=True, markup=False)
            if report.is_file():
                terminal.print(f"Report, for a browser: {report}", soft_wrap=True, markup=False)
            if pictures.is_dir():
                terminal.print(f"Pictures in {pictures}", soft_wrap=True, markup=False)


@dataclass
class OneModelOptions(TextOptions):
    """The options of every command that measures one model."""

    tokenizer: Annotated[str | None, typer.Option(help="Another tokenizer than the model's own.")] = None
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Measure the same model with fresh random weights beside it.")
    ] = False

    def loaded(
        self, model: str, documents: Iterable[str], labels: Sequence[float] | None = None
    ) -> tuple[nn.Module, TextBatches]:
        """The model with its weights, and its tokenizer's batches of the documents."""
        from tdgeom.rows.text import TextBatches

        quiet_transformers()
        words = self.tokenizer_of(self.tokenizer or model)
        net = self.load(model)
        length = self.length_for(net, words)
        return net, TextBatches(
            documents, words, batch_size=self.batch_size, max_length=length, labels=labels
        )


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
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)


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
