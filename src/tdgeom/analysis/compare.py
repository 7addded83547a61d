"""``compare``: every layer of one model with every layer of another, in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import nn

from tdgeom.analysis.analysis_settings import MAX_ROWS, ComparisonSettings, select_settings
from tdgeom.analysis.comparison import Comparison
from tdgeom.analysis.error_stages import ErrorStages
from tdgeom.analysis.metadata import model_record, run_record
from tdgeom.analysis.null_stages import null_stages, with_joint_p
from tdgeom.analysis.result_tables import errors_beside
from tdgeom.analysis.seed_names import also_called
from tdgeom.core.for_each import ForEach
from tdgeom.core.for_each_pair import ForEachPair
from tdgeom.core.guessed_names import answer_guesses
from tdgeom.core.keys import key_tuple
from tdgeom.core.pair_stage import PairStage
from tdgeom.core.rank_failures import fail_together
from tdgeom.core.warnings import gathered
from tdgeom.measures.leave_out import SampleGroups
from tdgeom.measures.listed_measures import listed_measures
from tdgeom.measures.neighbors.nearest_neighbors import NearestNeighbors
from tdgeom.measures.registry import DEFAULT_MEASURES, named_stages
from tdgeom.model.calls.repeated_calls import CallsSpec, check_calls
from tdgeom.model.capture import Capture
from tdgeom.model.capture_spec import CaptureSpec
from tdgeom.model.loading import load_model, model_identity
from tdgeom.model.sites import LayerSpec
from tdgeom.rows.data_sources import (
    BATCH_SIZE,
    as_loader,
    holds_texts,
    named_tokenizer,
    sequence_length,
    texts_of,
)
from tdgeom.rows.select_tokens import SelectTokens
from tdgeom.rows.tokenizer_alignment import AlignedRows, PairedTexts, cut_alike
from tdgeom.run.run import run
from tdgeom.run.site_places import relative_depths, site_places
from tdgeom.run.to_frame import to_frame
from tdgeom.stream.cross_moments import StreamingCrossMoments
from tdgeom.stream.row_sample import RowSample

__all__ = ["compare"]

ALIGNMENTS = ("rows", "characters", "document")


@also_called(measures="metrics")
@answer_guesses
@fail_together
def compare(
    model_a: nn.Module | str,
    model_b: nn.Module | str,
    dataloader: Iterable[Any],
    metrics: str | PairStage | Sequence[str | PairStage] = DEFAULT_MEASURES,
    *,
    sites: str | Sequence[str] = "residual_output",
    layers: LayerSpec = "all",
    tokenizer_a: Any = None,
    tokenizer_b: Any = None,
    tokenizer: Any = None,
    text_column: str | None = None,
    align: str = "auto",
    names: tuple[str, str] = ("a", "b"),
    max_rows: int | None = MAX_ROWS,
    sample_size: int = 4096,
    sketch: int | None = None,
    errors: bool | int = False,
    select: Mapping[str, Any] | None = None,
    batch_size: int = BATCH_SIZE,
    max_length: int | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = True,
    seed: int = 0,
    calls: CallsSpec = None,
    significance: bool = False,
    sharded: bool | None = None,
    nonfinite: str = "raise",
    checkpoint: str | Path | None = None,
    every: int = 100,
) -> Comparison | None:
    """Compare every layer of one model with every layer of another, over the same data in one pass.

    Args:
        model_a, model_b: modules, Hugging Face ids or directories: two models, or two checkpoints of one.
        dataloader: batches that both models take; or documents (strings, a ``datasets.Dataset``), with ``tokenizer_a`` and,
            where it is another, ``tokenizer_b``.
        metrics: names (those of the pure functions; ``tdgeom.measures.registry.known_measures`` lists them, and so does
            the command line) or pair stages. Default: debiased linear CKA over *all* rows (``"linear_cka_debiased"``, short
            ``"cka"``: ``LinearCKA(estimator="debiased", source="moments")``) and ``"neighborhood_overlap"`` of a sample
            (``NeighborhoodOverlap(k=10)``). ``measures`` is an earlier name of it.
        sites, layers: as for ``Capture``; the same for both models.
        tokenizer_a, tokenizer_b: for documents, tokenizers or their names; ``tokenizer_b`` None: the same. ``tokenizer`` is
            ``tokenizer_a``; models that are named have their own.
        text_column: the column that holds the text, where several do.
        align: "rows": the tokens are the same, matched by ``row_id``. "characters": tokens of the two tokenizers that end at
            the same character of the text. "document": the mean over each document's tokens. "auto": rows for one
            tokenizer (or two with one vocabulary), else characters where both are fast, else document.
        names: what the two are called: the sites are ``"a/residual_output.0"`` and so on.
        max_rows: rows to compare.
        sample_size: rows of the uniform sample that sample-based measures see.
        sketch: random projections a site in place of exact moments, for wide models (CKA then has a standard error).
        errors: a column ``<measure>_se`` beside every measure that has an error: of the delete-a-group jackknife over 20 groups
            of documents, or this many. Those of measures over all rows are of the sample's rows: never too small.
        select: further settings of ``SelectTokens``, with "rows".
        batch_size, max_length: of documents; default 8, and 256 or what the models take. One tokenizer splits longer ones; with
            two they are cut off, with a warning.
        device: moves both models there first.
        progress: a progress bar on a terminal.
        seed: of the sample and the sketch.
        nonfinite: "raise" names site and batch of a NaN or Inf; "drop" leaves such rows out of both models, and counts them.
        calls: which call is compared of a module that runs several times in one pass, as ``Capture`` takes it: "first", "last"
            or a number from 0. Default: such a module is an error.
        significance: every measure beside what it is by chance, as ``analyze_model`` takes it; linear CKA is always. The
            p-value ``<measure>_p_adjusted`` is for the best of all pairs of layers.
        sharded: in a process group, whether each rank's loader is a part of the data, as for ``run``. Default: found out.
        checkpoint, every: as for ``run``: a file that keeps the state, and batches between two writes.

    Returns:
        Comparison, on rank 0 of a process group (None elsewhere); ``tg.plot.matrix(comparison.novelty, measure)`` draws it.

    Memory: 8·D_a·D_b bytes for every pair of layers (144 pairs at D = 768: 0.7 GB), refused above 8 GiB with the remedy.

    Raises:
        ValueError: equal names, an unknown alignment or measure, documents without a tokenizer, a measure that needs exact
            moments beside ``sketch=``.

        >>> from tdgeom.demo import demo_model, demo_texts
        >>> model, tokenizer = demo_model()
        >>> result = compare(model, model, demo_texts()[:4], tokenizer_a=tokenizer, layers=[0, 5], progress=False)
        >>> float(result.matrix("linear_cka_debiased").iloc[0, 0])
        1.0
    """
    if len(set(names)) != 2 or not all(names) or any("/" in name for name in names):
        raise ValueError(f"compare: names are two different words without a slash, got {names}.")
    tokenizer_a, tokenizer_b = _tokenizers(
        tokenizer_a if tokenizer is None else tokenizer, tokenizer_b, (model_a, model_b), dataloader
    )
    nets = [load_model(model) if isinstance(model, str) else model for model in (model_a, model_b)]
    if device is not None:
        nets = [net.to(device) for net in nets]
    settings = ComparisonSettings(
        sites=sites,
        layers=layers,
        max_rows=max_rows,
        sample_size=sample_size,
        seed=seed,
        select=select_settings("compare", select),
        stages=_stages(metrics, sketch),
        align=_alignment(align, tokenizer_a, tokenizer_b),
        sketch=sketch,
        errors=errors,
        calls=_one_call(calls),
        significance=significance,
    )
    captures = [
        Capture(
            net,
            sites,
            layers=layers,
            prefix=f"{name}/",
            in_keys=_inputs(side, settings.align),
            calls=settings.calls,
        )
        for net, name, side in zip(nets, names, "ab")
    ]
    pipeline = TensorDictSequential(*captures, *_stages_behind(captures, settings))
    if settings.align == "rows":
        loader: Iterable[Any] = as_loader(
            dataloader,
            owner="compare",
            tokenizer=tokenizer_a,
            text_column=text_column,
            batch_size=None if batch_size == BATCH_SIZE else batch_size,
            max_length=max_length,
            models=nets,
        )
    else:
        texts, both = texts_of(dataloader, "compare", text_column), (tokenizer_a, tokenizer_b)
        length = max_length or min(sequence_length(nets, one) for one in both)
        loader = PairedTexts(texts, *both, align=settings.align, batch_size=batch_size, max_length=length)
    with gathered() as told:
        result = run(
            pipeline,
            loader,
            max_rows=max_rows,
            keep=["between"],
            progress=None if progress else False,
            sharded=sharded,
            nonfinite=nonfinite,
            checkpoint=checkpoint,
            every=every,
        )
    if result is None:
        return None
    with_joint_p(result)
    compared = _comparison(result, nets, captures, names, settings)
    compared.metadata["warnings"] = told.texts()
    return compared


def _tokenizers(a: Any, b: Any, models: tuple[Any, Any], data: Any) -> tuple[Any, Any]:
    """Both tokenizers, by name too; those of models that are named, where texts have none."""
    if a is None and b is None and holds_texts(data) and all(isinstance(model, str) for model in models):
        a, b = models
    found = [named_tokenizer(one) if isinstance(one, str) else one for one in (a, b)]
    return found[0], found[1]


def _alignment(align: str, tokenizer_a: Any, tokenizer_b: Any) -> str:
    if align not in ("auto", *ALIGNMENTS):
        raise ValueError(f"compare: align takes 'auto' or one of {list(ALIGNMENTS)}, got {align!r}.")
    if align in ("characters", "document") and (tokenizer_a is None or tokenizer_b is None):
        raise ValueError(
            f"compare: align={align!r} matches the tokens of two tokenizers: give documents (strings), tokenizer_a= and "
            f"tokenizer_b=."
        )
    same = tokenizer_a is None or tokenizer_b is None or cut_alike(tokenizer_a, tokenizer_b)
    if align == "rows" and not same:
        raise ValueError(
            "compare: align='rows' matches token by token, but tokenizer_a and tokenizer_b cut text differently. Take "
            "align='characters' or 'document'."
        )
    if align != "auto":
        return align
    if same:
        return "rows"
    fast = getattr(tokenizer_a, "is_fast", False) and getattr(tokenizer_b, "is_fast", False)
    return "characters" if fast else "document"


def _stages(metrics: str | PairStage | Sequence[str | PairStage], sketch: int | None) -> list[PairStage]:
    given = listed_measures("compare", metrics)
    wrong = [type(one).__name__ for one in given if not isinstance(one, (str, PairStage))]
    if wrong or not given:
        raise TypeError(
            f"compare: metrics are names such as 'linear_cka_debiased' or pair stages such as tg.LinearCKA(), got "
            f"{wrong or 'none'}."
        )
    named = named_stages(
        [one for one in given if isinstance(one, str)], between=True, sketch=sketch is not None
    )
    stages = [*named, *(one for one in given if isinstance(one, PairStage))]
    exact = [str(type(stage).__name__) for stage in stages if getattr(stage, "source", None) == "moments"]
    if sketch is not None and exact:
        raise ValueError(
            f"compare: {', '.join(exact)} with source='moments' needs exact moments, sketch={sketch} gives projections. "
            f"Leave sketch out, or take source='sample' (LinearCKA: source='sketch')."
        )
    return stages


def _inputs(side: str, align: str) -> dict[str, tuple[str, str]] | None:
    """Where a model finds its own tokens, when each has its own."""
    if align == "rows":
        return None
    return {name: (side, name) for name in ("input_ids", "attention_mask")}


def _stages_behind(captures: Sequence[Capture], settings: ComparisonSettings) -> list[TensorDictModuleBase]:
    """From both models' activations to the measures: rows, what the measures read, the measures."""
    if settings.select and settings.align != "rows":
        raise ValueError(
            f"compare: select= is for align='rows', got {settings.select} with align={settings.align!r}."
        )
    sites_a, sites_b = (capture.sites for capture in captures)
    sites, pairs = [*sites_a, *sites_b], list(product(sites_a, sites_b))
    roots = {key_tuple(key)[0] for stage in settings.stages for key in stage.in_keys}
    errors = ErrorStages(int(settings.errors))
    nulls = null_stages(settings.stages, significance=settings.significance, seed=settings.seed)
    documents = bool(errors.groups or nulls)
    behind: list[TensorDictModuleBase] = [
        SelectTokens(sites, documents=documents, **settings.select)
        if settings.align == "rows"
        else AlignedRows(sites_a, sites_b, align=settings.align, documents=documents)
    ]
    if "cross_moments" in roots:
        behind.append(StreamingCrossMoments(sites, pairs=pairs, sketch=settings.sketch, seed=settings.seed))
    if roots & {"sample", "neighbors"} or errors.groups or nulls:
        also = ["document_id"] if documents else []
        behind.append(RowSample(sites, size=settings.sample_size, seed=settings.seed, also=also))
    if errors.groups:
        behind.append(SampleGroups(groups=errors.groups))
    if "neighbors" in roots:
        k = max(int(getattr(stage, "k", 10)) for stage in settings.stages)
        behind.append(ForEach(NearestNeighbors(k), sites))
    whole = [one for stage in settings.stages for one in (errors.around(stage), *errors.beside(stage))]
    ends = [ForEachPair(stage, sites, pairs=pairs) for stage in (*whole, *nulls)]
    return [*behind, *ends, *errors.jackknives(ends)]


def _comparison(
    result: TensorDict,
    nets: Sequence[nn.Module],
    captures: Sequence[Capture],
    names: Sequence[str],
    settings: ComparisonSettings,
) -> Comparison:
    metrics, models = [], {}
    for name, net, capture in zip(names, nets, captures):
        key, label = model_identity(net)
        depths, places = relative_depths(capture.sites), site_places(capture.sites)
        for site, depth in depths.items():
            place = {"model": name, "model_key": key, "model_label": label, "site": str(site)}
            metrics.append({**place, **places[site], "relative_depth": depth})
        spec = CaptureSpec.of(capture).to_dict()
        models[name] = {**model_record(net, None, capture), "capture": spec}
    return Comparison(
        metrics=pd.DataFrame(metrics),
        novelty=_in_order(to_frame(result, "between")),
        metadata={"models": models, "align": settings.align, **run_record([result], settings)},
        result=result,
    )


def _in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Every measure's error right behind it."""
    return table[list(errors_beside(dict.fromkeys(map(str, table))))]


def _one_call(calls: CallsSpec) -> CallsSpec:
    if check_calls(calls) == "all":
        raise ValueError(
            "compare: calls='all' has several values for one row. Remedy: calls='first', 'last' or a number."
        )
    return calls
