"""``tdgeom dimension`` and ``tdgeom overlap``: the geometry of hidden representations over the layers of a model.

As in Valeriani et al. (2023), The geometry of hidden representations of large transformer models: a row is a sequence, its
representation the mean over positions of the normalised input of each block, and of the final norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import tdgeom as tg
from tdgeom.cli.completion import ESTIMATORS, completing, site_kinds
from tdgeom.cli.options import Errors, Model, Pool, listed, with_options
from tdgeom.cli.outputs import OneModelOptions
from tdgeom.measures.registry import named_stages

if TYPE_CHECKING:
    from tensordict.nn import TensorDictModuleBase

    from tdgeom.analysis.results import AnalysisResults

__all__: list[str] = []


@dataclass
class HiddenStateOptions(OneModelOptions):
    """The options of both commands."""

    sites: Annotated[
        str | None,
        typer.Option(
            help="Kinds or sites, comma-separated. [attn_input and final_norm, or the last residual_output]",
            show_default=False,
            autocompletion=completing(site_kinds),
        ),
    ] = None
    pool: Pool = "mean"
    max_rows: Annotated[
        int, typer.Option(min=3, help="Rows to measure: sequences, or tokens with --pool none.")
    ] = 10_000
    errors: Errors = False
    neighbors: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Keep tables of this many nearest neighbours in the bundle, to analyse them later.",
            metavar="K",
        ),
    ] = None


@with_options
def dimension(
    model: Model,
    options: HiddenStateOptions,
    estimator: Annotated[
        str,
        typer.Option(
            help=f"Comma-separated: {', '.join(ESTIMATORS)}.",
            metavar="NAMES",
            autocompletion=completing(lambda: ESTIMATORS),
        ),
    ] = "twonn,gride",
) -> Any:
    """Intrinsic dimension over the layers of a model.

    A row is a sequence (the mean over its tokens), or with --pool none a token; Gride wants more than 64 rows.
    """
    names = listed(estimator)
    if unknown := [name for name in names if name not in ESTIMATORS]:
        raise typer.BadParameter(
            f"--estimator takes any of {', '.join(ESTIMATORS)}, got {', '.join(unknown)}"
        )
    stages = named_stages(names)
    return _measure("dimension", model, options, lambda sites: stages)


@with_options
def overlap(
    model: Model,
    options: HiddenStateOptions,
    labels: Annotated[
        Path | None, typer.Option(help="A label a line, one for each document.", metavar="FILE")
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Nearest neighbours.")] = 30,
    balanced: Annotated[
        bool, typer.Option("--balanced", help="Every class counts alike in the label overlap.")
    ] = False,
) -> Any:
    """Neighbourhood overlap from layer to layer and, with --labels, the overlap with labels."""

    def stages(sites: list[str]) -> list[TensorDictModuleBase]:
        pairs = tg.ForEachPair(tg.NeighborhoodOverlap(k=k), sites, pairs=list(pairwise(sites)))
        return [pairs] if labels is None else [pairs, tg.LabelOverlap(k=k, balanced=balanced)]

    return _measure("overlap", model, options, stages, labels)


def read_labels(path: Path, wanted: int) -> tuple[list[int], list[str]]:
    """The classes of the documents as numbers, and the classes' names in order."""
    from tdgeom.rows.text import lines_of, readable_file

    names = [line.rstrip("\n") for line in lines_of(readable_file(path, "a text file with a label a line"))]
    if len(names) != wanted:
        raise ValueError(
            f"{path} holds {len(names)} labels, but there are {wanted} documents: give a label a line, one for each document "
            f"(in a text file blank lines separate documents, a new line does not)."
        )
    classes = sorted(set(names))
    number = {name: index for index, name in enumerate(classes)}
    return [number[name] for name in names], classes


def _measure(
    command: str,
    model: str,
    options: HiddenStateOptions,
    stages: Callable[[list[str]], list[TensorDictModuleBase]],
    labels: Path | None = None,
) -> AnalysisResults | None:
    """Analyse with these stages, print the profile, save and draw it."""
    from tdgeom.cli.print_profile import print_profiles

    select = options.select()
    if options.neighbors is not None and options.out is None:
        raise typer.BadParameter("--neighbors needs --out DIR, the bundle that keeps the tables")
    documents, named = options.documents()
    options.check_out()
    recorded: dict[str, Any] = {"batch_size": options.batch_size, "command": f"tdgeom {command}"}
    numbers = None
    if labels is not None:
        documents = list(documents)
        numbers, recorded["classes"] = read_labels(labels, len(documents))
        select["also"] = ["label"]
    net, batches = options.loaded(model, documents, numbers)
    sites = tg.Capture(net, listed(options.sites) if options.sites else tg.hidden_state_sites(net)).sites
    results = tg.analyze_model(
        model,
        batches,
        model=net,
        max_rows=options.max_rows,
        sample_size=options.max_rows,
        metrics=stages([str(site) for site in sites]),
        sites=[str(site) for site in sites],
        device=options.device_or_cuda(),
        seed=options.seed,
        sharded=options.sharded or None,
        select=select,
        neighbors=options.neighbors or False,
        errors=options.errors,
        untrained=options.untrained,
        tokenizer_name=options.tokenizer or model,
        dataset_name=named,
        run_metadata=recorded,
    )
    if results is not None:
        if command == "dimension":
            results.diagnostics["intrinsic_dimension"] = tg.intrinsic_dimension_profile(results)
        else:
            results.diagnostics["overlap"] = tg.overlap_profile(results)
    options.finish(results, print_profiles)
    return results
