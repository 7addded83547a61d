"""``compare``: two models side by side, a matrix of layers for every measure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import pandas as pd
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import nn

from tdgeom.analysis.metadata import stage_settings
from tdgeom.analysis.profiles import relative_depths
from tdgeom.analysis.results import AnalysisResults
from tdgeom.core.for_each import ForEach, ForEachPair
from tdgeom.core.keys import key_tuple
from tdgeom.core.stage import PairStage
from tdgeom.files.bundle import SCHEMA_VERSION
from tdgeom.measures.neighbors.nearest_neighbors import NearestNeighbors
from tdgeom.measures.registry import DEFAULT_MEASURES, named_stages
from tdgeom.model.capture import Capture
from tdgeom.model.capture_spec import CaptureSpec
from tdgeom.model.loading import config_summary, load_model, model_identity, software_versions
from tdgeom.rows.select_tokens import SelectTokens
from tdgeom.rows.text import TextBatches
from tdgeom.rows.tokenizer_alignment import AlignedRows, PairedTexts, cut_alike
from tdgeom.run.run import run
from tdgeom.run.to_frame import site_parts, to_frame
from tdgeom.stream.cross_moments import StreamingCrossMoments
from tdgeom.stream.row_sample import RowSample

__all__ = ["MAX_ROWS", "Comparison", "compare"]

ALIGNMENTS = ("rows", "characters", "document")
MAX_ROWS = 100_000


@dataclass(repr=False)
class Comparison(AnalysisResults):
    """Two models side by side.

    ``novelty`` holds one row a pair of sites (columns ``a``, ``b`` and a column a measure), ``metrics`` one row a site;
    ``matrix`` gives a measure as a layer x layer table. Saved and loaded as ``AnalysisResults`` is.
    """

    def __repr__(self) -> str:
        models = ", ".join(f"{side} {one['id']}" for side, one in self.metadata.get("models", {}).items())
        return f"Comparison({models}: {len(self.novelty)} pairs of sites, {', '.join(self.measures)})"

    def _repr_html_(self) -> str:
        return self.matrix().to_html() if self.measures else repr(self)

    def matrix(self, measure: str | None = None) -> pd.DataFrame:
        """A measure as a table: the first model's sites down, the second's across.

        Raises:
            KeyError: no such measure; the message lists those there are.
        """
        measure = self.measures[0] if measure is None else measure
        if measure not in self._columns:
            raise KeyError(f"the comparison has no measure {measure!r}; it has {self._columns}.")
        order = {side: list(dict.fromkeys(self.novelty[side])) for side in ("a", "b")}
        table = self.novelty.pivot(index="a", columns="b", values=measure)
        return table.loc[order["a"], order["b"]]

    @property
    def measures(self) -> list[str]:
        """The measures' names, without their standard errors."""
        return [name for name in self._columns if not name.endswith("_standard_error")]

    @property
    def _columns(self) -> list[str]:
        return [name for name in self.novelty if name not in ("a", "b", "pair", "layer_a", "layer_b")]


def compare(
    model_a: nn.Module | str,
    model_b: nn.Module | str,
    dataloader: Iterable[Any],
    measures: str | PairStage | Sequence[str | PairStage] = DEFAULT_MEASURES,
    *,
    sites: str | Sequence[str] = "residual_output",
    layers: str | int | slice | Sequence[int] = "all",
    tokenizer_a: Any = None,
    tokenizer_b: Any = None,
    align: str = "auto",
    names: tuple[str, str] = ("a", "b"),
    max_rows: int | None = MAX_ROWS,
    sample_limit: int = 4096,
    sketch: int | None = None,
    select: dict[str, Any] | None = None,
    batch_size: int = 8,
    seq_len: int = 256,
    device: str | torch.device | None = None,
    progress: bool | None = True,
    seed: int = 0,
) -> Comparison | None:
    """Compare every layer of one model with every layer of another, over the same data in one pass.

    Args:
        model_a, model_b: modules, Hugging Face ids or directories: two models, or two checkpoints of one.
        dataloader: batches that both models take; or documents (strings), with ``tokenizer_a`` and, where it is another,
            ``tokenizer_b``.
        measures: names (those of the pure functions; ``tdgeom.measures.MEASURES`` lists them, and so does the command
            line) or pair stages. Default: debiased linear CKA over *all* rows (``"linear_cka_debiased"``, short
            ``"cka"``: ``LinearCKA(estimator="debiased", source="moments")``) and ``"neighborhood_overlap"`` of a sample
            (``NeighborhoodOverlap(k=10)``).
        sites, layers: as for ``Capture``; the same for both models.
        tokenizer_a, tokenizer_b: for documents; ``tokenizer_b`` None: the same.
        align: "rows": the tokens are the same, matched by ``row_id``. "characters": tokens of the two tokenizers that end at
            the same character of the text. "document": the mean over each document's tokens. "auto": rows for one
            tokenizer (or two with one vocabulary), else characters where both are fast, else document.
        names: what the two are called: the sites are ``"a/residual_output.0"`` and so on.
        max_rows: rows to compare.
        sample_limit: rows of the uniform sample that sample-based measures see.
        sketch: random projections a site in place of exact moments, for wide models (CKA then has a standard error).
        select: further settings of ``SelectTokens``, with "rows".
        batch_size, seq_len: of documents. One tokenizer splits longer documents; with two they are cut off, with a warning.
        device: moves both models there first.
        progress: a progress bar on a terminal.
        seed: of the sample and the sketch.

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
    nets = [load_model(model) if isinstance(model, str) else model for model in (model_a, model_b)]
    if device is not None:
        nets = [net.to(device) for net in nets]
    align = _alignment(align, tokenizer_a, tokenizer_b)
    stages = _measures(measures, sketch)
    prefixes = [f"{name}/" for name in names]
    captures = [
        Capture(net, sites, layers=layers, prefix=prefix, in_keys=_inputs(side, align))
        for net, prefix, side in zip(nets, prefixes, "ab")
    ]
    ours = [list(map(str, capture.sites)) for capture in captures]
    both = [*captures[0].sites, *captures[1].sites]
    rows = (
        SelectTokens(both, **dict(select or {}))
        if align == "rows"
        else AlignedRows(ours[0], ours[1], align=align)  # type: ignore[arg-type]
    )
    if select and align != "rows":
        raise ValueError(f"compare: select= is for align='rows', got {select} with align={align!r}.")
    pairs = list(product(*ours))
    pipeline = TensorDictSequential(
        *captures, rows, *_reductions(stages, both, pairs, sample_limit, sketch, seed)
    )
    loader = _loader(dataloader, tokenizer_a, tokenizer_b, align, batch_size, seq_len)
    result = run(pipeline, loader, max_rows=max_rows, keep=["between"], progress=None if progress else False)
    if result is None:
        return None
    return _comparison(result, nets, captures, names, align, stages, seed, sample_limit, sketch)


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


def _measures(measures: str | PairStage | Sequence[str | PairStage], sketch: int | None) -> list[PairStage]:
    given = [measures] if isinstance(measures, (str, nn.Module)) else list(measures)
    wrong = [type(one).__name__ for one in given if not isinstance(one, (str, PairStage))]
    if wrong or not given:
        raise TypeError(
            f"compare: measures are names such as 'linear_cka_debiased' or pair stages such as tg.LinearCKA(), got "
            f"{wrong or 'none'}."
        )
    named = named_stages([one for one in given if isinstance(one, str)], sketch=sketch is not None)
    stages = [*named, *(one for one in given if isinstance(one, PairStage))]
    exact = [type(stage).__name__ for stage in stages if getattr(stage, "source", None) == "moments"]
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


def _reductions(
    stages: Sequence[PairStage],
    sites: Sequence[str],
    pairs: list[tuple[str, str]],
    sample_limit: int,
    sketch: int | None,
    seed: int,
) -> list[TensorDictModuleBase]:
    """What the measures read, then the measures."""
    roots = {key_tuple(key)[0] for stage in stages for key in stage.in_keys}
    needed: list[TensorDictModuleBase] = []
    if "cross_moments" in roots:
        needed.append(StreamingCrossMoments(sites, pairs=pairs, sketch=sketch, seed=seed))
    if roots & {"sample", "neighbors"}:
        needed.append(RowSample(sites, size=sample_limit, seed=seed))
    if "neighbors" in roots:
        k = max(int(getattr(stage, "k", 10)) for stage in stages)
        needed.append(ForEach(NearestNeighbors(k), sites))
    return [*needed, *(ForEachPair(stage, sites, pairs=pairs) for stage in stages)]


def _loader(
    dataloader: Iterable[Any], tokenizer_a: Any, tokenizer_b: Any, align: str, batch_size: int, seq_len: int
) -> Iterable[Any]:
    if align in ("characters", "document"):
        return PairedTexts(
            dataloader,
            tokenizer_a,
            tokenizer_b,
            align=align,  # type: ignore[arg-type]
            batch_size=batch_size,
            seq_len=seq_len,
        )
    if tokenizer_a is not None:
        return TextBatches(dataloader, tokenizer_a, batch_size=batch_size, seq_len=seq_len)
    if isinstance(dataloader, list | tuple) and dataloader and isinstance(dataloader[0], str):
        raise ValueError("compare: documents (strings) need tokenizer_a=; or give tokenized batches.")
    return dataloader


def _comparison(
    result: TensorDict,
    nets: Sequence[nn.Module],
    captures: Sequence[Capture],
    names: tuple[str, str],
    align: str,
    stages: Sequence[PairStage],
    seed: int,
    sample_limit: int,
    sketch: int | None,
) -> Comparison:
    metrics = []
    for name, net, capture in zip(names, nets, captures):
        own = [str(site) for site in capture.sites]
        depths = relative_depths(own)
        key, label = model_identity(net)
        for site in own:
            place = {"model": name, "model_key": key, "model_label": label, "site": site, **site_parts(site)}
            metrics.append({**place, "relative_depth": depths[site]})
    models = {
        name: {
            "id": model_identity(net)[1],
            "class": type(net).__name__,
            "config": config_summary(net),
            "parameter_count": sum(parameter.numel() for parameter in net.parameters()),
            "hook_targets": {str(site): path for site, path in capture.module_paths.items()},
            "capture": CaptureSpec.of(capture).to_dict(),
        }
        for name, net, capture in zip(names, nets, captures)
    }
    return Comparison(
        metrics=pd.DataFrame(metrics),
        novelty=to_frame(result, "between"),
        metadata={
            "artifact_schema_version": SCHEMA_VERSION,
            "models": models,
            "align": align,
            "rows_observed": int(result["run", "rows"]),
            "batches_observed": int(result["run", "batches"]),
            "dropped_rows": int(result["run", "dropped_rows"]),
            "stopped": result["run", "stopped"],
            "settings": {
                "measures": [stage_settings(stage) for stage in stages],
                "sample_limit": sample_limit,
                "sketch": sketch,
                "seed": seed,
            },
            "software": software_versions(),
        },
        result=result,
    )
