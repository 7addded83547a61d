"""What a command reads: a text, models and their tokenizers, and which rows of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tdgeom.cli.config_file import read_config
from tdgeom.cli.options import Json, Pool, Remote, position_choice, quiet_transformers

if TYPE_CHECKING:
    from torch import nn


__all__: list[str] = []


@dataclass
class InputOptions:
    """The options of every command that reads models: on which text, which of their rows, and how."""

    text: Annotated[
        str | None, typer.Option(help="A text file; blank lines separate documents.", metavar="FILE")
    ] = None
    jsonl: Annotated[str | None, typer.Option(help="A field of a JSON-lines file.", metavar="FILE:FIELD")] = (
        None
    )
    dataset: Annotated[
        str | None,
        typer.Option(
            help="A dataset: NAME, NAME:CONFIG or NAME:CONFIG:SPLIT, and :FIELD behind.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None
    fasta: Annotated[
        str | None,
        typer.Option(help="Sequences of a protein or genome: FASTA, or one a line.", metavar=""),
    ] = None
    images: Annotated[
        str | None, typer.Option(help="A folder of images, for a model of images.", metavar="FOLDER")
    ] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences, or images, a batch.")] = 8
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
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default cuda if there is one.")
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of the row sample.")] = 0
    sharded: Annotated[
        bool,
        typer.Option(
            "--sharded",
            help="Under torchrun: the data named here are this process's part alone, not all of them.",
        ),
    ] = False
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

    def documents(self) -> tuple[Iterable[Any], str]:
        """The documents (or paths of images) that exactly one of the options names, and their name."""
        from tdgeom.rows.images import image_files
        from tdgeom.rows.text import read_dataset, read_fasta, read_jsonl, read_text

        readers: list[tuple[str | None, Callable[[str], Iterable[Any]]]] = [
            (self.text, read_text),
            (self.jsonl, read_jsonl),
            (self.dataset, read_dataset),
            (self.fasta, read_fasta),
            (self.images, image_files),
        ]
        named = [(name, read) for name, read in readers if name is not None]
        if len(named) != 1:
            raise typer.BadParameter(
                "give the data by exactly one of --text FILE, --jsonl FILE:FIELD, --dataset NAME, --fasta FILE, --images FOLDER"
            )
        name, read = named[0]
        return read(name), name

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
        from tdgeom.rows.data_sources import knows_words

        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # no backend, no such repository, files that do not fit
            raise ValueError(
                f"could not load the tokenizer of {name!r}: {first_reason(name, error)} Name another one with --tokenizer."
            ) from error
        return knows_words(tokenizer, name, "Name another one with --tokenizer.")

    def processor_of(self, name: str) -> Any:
        """The image processor of that name."""
        from transformers import AutoImageProcessor

        from tdgeom.model.loading import first_reason

        try:
            return AutoImageProcessor.from_pretrained(name, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # no such repository, no model of images
            raise ValueError(
                f"could not load the image processor of {name!r}: {first_reason(name, error)}"
            ) from error

    def pixels(self, images: Iterable[Any], *names: str) -> Iterable[Any]:
        """Batches of images as the processor of these models makes them; of models whose processors differ there are none."""
        from tdgeom.rows.images import ImageBatches

        processors = [self.processor_of(name) for name in names]
        if any(one.to_dict() != processors[0].to_dict() for one in processors):
            raise ValueError(
                f"the image processors of {' and '.join(names)} differ, so that the models would see other pixels: compare them "
                f"with tdgeom.compare on batches of your own."
            )
        return ImageBatches(images, processors[0], batch_size=self.batch_size)

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


@dataclass
class OneModelInputs(InputOptions):
    """The options of every command that reads one model."""

    tokenizer: Annotated[str | None, typer.Option(help="Another tokenizer than the model's own.")] = None

    def loaded(
        self, model: str, documents: Iterable[Any], labels: Sequence[float] | None = None
    ) -> tuple[nn.Module, Iterable[Any]]:
        """The model with its weights, and its tokenizer's (or image processor's) batches of the documents."""
        from tdgeom.rows.text import TextBatches

        quiet_transformers()
        if self.images is not None:
            given = (
                documents
                if labels is None
                else [(one, {"label": label}) for one, label in zip(documents, labels)]
            )
            return self.load(model), self.pixels(given, self.tokenizer or model)
        words = self.tokenizer_of(self.tokenizer or model)
        net = self.load(model)
        length = self.length_for(net, words)
        return net, TextBatches(
            documents, words, batch_size=self.batch_size, max_length=length, labels=labels
        )
