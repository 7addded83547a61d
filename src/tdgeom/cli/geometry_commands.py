"""``tdgeom dimension`` and ``tdgeom overlap``: the geometry of hidden representations over the layers of a model.

As in Valeriani et al. (2023), The geometry of hidden representations of large transformer models: a row is a sequence, its
representation the mean over positions of the normalised input of each block, and of the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from tdgeom.cli.options import (
    BatchSize,
    Dataset,
    Device,
    JsonLines,
    Model,
    Out,
    Overwrite,
    Plots,
    Remote,
    Seed,
    SequenceLength,
    TextFile,
    Tokenizer,
    Untrained,
    check_out,
    console,
    device_choice,
    documents,
    listed,
    loaded,
    say_where,
)

__all__: list[str] = []

ESTIMATORS = {
    "twonn": "TwoNN",
    "gride": "Gride",
    "decimation": "Decimation",
    "levina_bickel": "LevinaBickel",
    "mom": "MOM",
    "tle": "TLE",
    "local_knn": "LocalKNN",
    "local_pca": "LocalPCA",
    "global_pca": "GlobalPCA",
    "ca_pca": "CAPCA",
    "participation_ratio": "ParticipationRatio",
}
HiddenSites = Annotated[
    str | None,
    typer.Option(
        "--sites",
        help="Kinds or sites, comma-separated. [attn_input and final_norm, or the last residual_output]",
        show_default=False,
    ),
]
MaxRows = Annotated[
    int, typer.Option("--max-rows", min=3, help="Rows to measure: sequences, or tokens with --pool none.")
]
Pool = Annotated[
    str, typer.Option("--pool", help="mean: a row is the mean over a sequence. none: every token is one.")
]
Neighbors = Annotated[
    int | None,
    typer.Option(
        "--neighbors",
        min=1,
        help="Keep tables of this many nearest neighbours in the bundle, to analyse them later.",
        metavar="K",
    ),
]


def dimension(
    model: Model,
    text: TextFile = None,
    jsonl: JsonLines = None,
    dataset: Dataset = None,
    estimator: Annotated[
        str, typer.Option(help=f"Comma-separated: {', '.join(ESTIMATORS)}.", metavar="NAMES")
    ] = "twonn,gride",
    sites: HiddenSites = None,
    pool: Pool = "mean",
    max_rows: MaxRows = 10_000,
    batch_size: BatchSize = 8,
    seq_len: SequenceLength = None,
    out: Out = None,
    plots: Plots = False,
    overwrite: Overwrite = False,
    neighbors: Neighbors = None,
    untrained: Untrained = False,
    device: Device = None,
    tokenizer: Tokenizer = None,
    seed: Seed = 0,
    trust_remote_code: Remote = False,
) -> None:
    """Intrinsic dimension over the layers of a model.

    A row is a sequence (the mean over its tokens), or with --pool none a token; Gride wants more than 64 rows.
    """
    import tdgeom as tg
    from tdgeom.analysis.profiles import intrinsic_dimension_profile

    names = listed(estimator)
    if unknown := [name for name in names if name not in ESTIMATORS]:
        raise typer.BadParameter(
            f"--estimator takes any of {', '.join(ESTIMATORS)}, got {', '.join(unknown)}"
        )

    def stages(chosen: list[str]) -> list[Any]:
        return [getattr(tg, ESTIMATORS[name])() for name in names]

    _measure(
        model,
        documents(text, jsonl, dataset),
        stages,
        {"intrinsic_dimension": intrinsic_dimension_profile},
        command="tdgeom dimension",
        sites=sites,
        pool=pool,
        max_rows=max_rows,
        batch_size=batch_size,
        seq_len=seq_len,
        out=out,
        plots=plots,
        overwrite=overwrite,
        neighbors=neighbors,
        untrained=untrained,
        device=device,
        tokenizer=tokenizer,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )


def overlap(
    model: Model,
    text: TextFile = None,
    jsonl: JsonLines = None,
    dataset: Dataset = None,
    labels: Annotated[
        Path | None, typer.Option(help="A label a line, one for each document.", metavar="FILE")
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Nearest neighbours.")] = 30,
    balanced: Annotated[
        bool, typer.Option("--balanced", help="Every class counts alike in the label overlap.")
    ] = False,
    sites: HiddenSites = None,
    pool: Pool = "mean",
    max_rows: MaxRows = 10_000,
    batch_size: BatchSize = 8,
    seq_len: SequenceLength = None,
    out: Out = None,
    plots: Plots = False,
    overwrite: Overwrite = False,
    neighbors: Neighbors = None,
    untrained: Untrained = False,
    device: Device = None,
    tokenizer: Tokenizer = None,
    seed: Seed = 0,
    trust_remote_code: Remote = False,
) -> None:
    """Neighbourhood overlap from layer to layer and, with --labels, the overlap with labels."""
    import tdgeom as tg
    from tdgeom.analysis.profiles import overlap_profile

    def stages(chosen: list[str]) -> list[Any]:
        pairs = tg.ForEachPair(tg.NeighborhoodOverlap(k=k), chosen, pairs=list(pairwise(chosen)))
        return [pairs] if labels is None else [pairs, tg.LabelOverlap(k=k, balanced=balanced)]

    _measure(
        model,
        documents(text, jsonl, dataset),
        stages,
        {"overlap": overlap_profile},
        command="tdgeom overlap",
        labels=labels,
        sites=sites,
        pool=pool,
        max_rows=max_rows,
        batch_size=batch_size,
        seq_len=seq_len,
        out=out,
        plots=plots,
        overwrite=overwrite,
        neighbors=neighbors,
        untrained=untrained,
        device=device,
        tokenizer=tokenizer,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )


def read_labels(path: Path, wanted: int) -> tuple[list[int], list[str]]:
    """The classes of the documents as numbers, and the classes' names in order."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a text file with a label a line.")
    names = path.read_text(encoding="utf-8").splitlines()
    if len(names) != wanted:
        raise ValueError(
            f"{path} holds {len(names)} labels, but there are {wanted} documents: give a label a line, one for each document "
            f"(in a text file blank lines separate documents, a new line does not)."
        )
    classes = sorted(set(names))
    number = {name: index for index, name in enumerate(classes)}
    return [number[name] for name in names], classes


def _measure(
    model: str,
    source: tuple[Any, str],
    stages: Callable[[list[str]], list[Any]],
    profiles: Mapping[str, Any],
    *,
    command: str,
    sites: str | None,
    pool: str,
    max_rows: int,
    batch_size: int,
    seq_len: int | None,
    out: Path | None,
    plots: bool,
    overwrite: bool,
    neighbors: int | None,
    untrained: bool,
    device: str | None,
    tokenizer: str | None,
    seed: int,
    trust_remote_code: bool,
    labels: Path | None = None,
) -> None:
    """Analyse with these stages, print the profiles, save and draw them."""
    if pool not in ("mean", "none"):
        raise typer.BadParameter(f"--pool takes mean or none, got {pool!r}")
    if neighbors is not None and out is None:
        raise typer.BadParameter("--neighbors needs --out DIR, the bundle that keeps the tables")
    overwrite = check_out(out, overwrite, plots, "bundle")
    texts, named = source
    classes: list[str] = []
    numbers = None
    if labels is not None:
        texts = list(texts)
        numbers, classes = read_labels(labels, len(texts))
    net, batches = loaded(
        model,
        texts,
        batch_size=batch_size,
        seq_len=seq_len,
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
        labels=numbers,
    )
    from tdgeom.analysis.analyze_model import analyze_model
    from tdgeom.model.capture import Capture
    from tdgeom.model.structure.hidden_states import hidden_state_sites

    asked = Capture(net, listed(sites) if sites else hidden_state_sites(net))
    select: dict[str, Any] = {"pool": "mean"} if pool == "mean" else {}
    if labels is not None:
        select["also"] = ["label"]
    results = analyze_model(
        model,
        batches,
        model=net,
        max_tokens=max_rows,
        sample_limit=max_rows,
        metrics=stages(asked.sites),
        sites=[str(site) for site in asked.sites],
        device=device_choice(device),
        seed=seed,
        select=select,
        neighbors=neighbors or False,
        untrained=untrained,
        tokenizer_name=tokenizer or model,
        dataset_name=named,
        run_metadata={
            "batch_size": batch_size,
            "command": command,
            **({"classes": classes} if classes else {}),
        },
    )
    if results is None:  # another rank of a process group has them
        return
    from tdgeom.cli.print_profile import print_profile

    for name, profile in profiles.items():
        results.diagnostics[name] = profile(results)
        print_profile(results, name, console())
    if out is not None:
        results.save(out, overwrite=overwrite)
        if plots:
            from tdgeom.plot import write_plots

            write_plots(results, results.artifact_dir / "plots")
    say_where(results)
