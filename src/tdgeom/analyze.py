"""``analyze_model``: the default pipeline over a model, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import nn

from tdgeom._analysis_metadata import run_metadata as recorded
from tdgeom._tables import (
    Identity,
    diagnostics_table,
    eigenvalue_arrays,
    metrics_table,
    novelty_table,
    router_table,
)
from tdgeom.ablation import NormalizationAblation
from tdgeom.compose import ForEach, ForEachPair, pair_list
from tdgeom.hooks import Capture, available_sites
from tdgeom.keys import key_tuple
from tdgeom.models import load_model, model_identity
from tdgeom.neighbors import NearestNeighbors
from tdgeom.results import AnalysisResults
from tdgeom.router import RouterLoad
from tdgeom.run import run
from tdgeom.run.plan import make_plan
from tdgeom.sample_metrics import SampleMetrics, SampleSpectrum
from tdgeom.similarity import LayerCosine, LinearCKA, SubspaceNovelty
from tdgeom.spectrum import EigenSpectrum, SpectrumMetrics
from tdgeom.stage import PairStage
from tdgeom.stream.covariance import StreamingCovariance
from tdgeom.stream.sample import RowSample
from tdgeom.streaming import StreamingStage
from tdgeom.tokens import SelectTokens
from tdgeom.untrained import untrained_copy, with_baseline

__all__ = ["FAMILIES", "analysis_pipeline", "analyze_model"]

FAMILIES = ("spectrum", "sample", "novelty", "router")
DIAGNOSTICS = ("normalization_ablation",)
SHARED_PRODUCTS = ("sample_eigenvalues", "sample_covariance", "sample_unit_covariance")
HELD = ("moments", "eigenvectors", "sample", "sample_row_id", *SHARED_PRODUCTS)


def analysis_pipeline(
    capture: Capture,
    sites: Sequence[str],
    *,
    families: Sequence[str] = FAMILIES,
    extra: Sequence[TensorDictModuleBase] = (),
    diagnostics: Sequence[str] = (),
    routers: Sequence[str] = (),
    router_top_k: int = 2,
    sample_limit: int = 4096,
    novelty_k: int = 32,
    neighbors: int | None = None,
    seed: int = 0,
    select: Mapping[str, Any] | None = None,
) -> TensorDictSequential:
    """The pipeline that ``analyze_model`` runs: only the stages that the families and extra stages need.

    Args:
        capture: the hooking context that reads ``sites`` and ``routers``.
        sites: sites whose geometry is measured.
        families: any of "spectrum", "sample", "novelty", "router".
        extra: stages of one's own; each runs at every site (a pair stage at every consecutive pair, a ``ForEachPair`` at its
            own pairs).
        diagnostics: any of "normalization_ablation".
        routers: sites of router logits, for the family "router".
        router_top_k: experts a token is routed to.
        sample_limit: rows of the uniform sample.
        novelty_k: leading eigenvectors compared between sites.
        neighbors: nearest neighbours in a table of the sample's rows, for stages with ``source="neighbors"``; None: no table.
        seed: seed of the sample.
        select: further settings of ``SelectTokens`` (positions, skip_first, pool, ...); what its ``also=`` carries the
            sample holds too.
    """
    pairs = pair_list(sites)
    also = [str(name) for name in dict(select or {}).get("also", ())]
    ends: list[nn.Module] = []
    if neighbors is not None:
        ends.append(ForEach(NearestNeighbors(neighbors), sites))
    if "spectrum" in families:
        ends.append(ForEach(SpectrumMetrics(), sites))
    if "sample" in families:
        ends.append(ForEach(SampleMetrics(), sites))
    if "normalization_ablation" in diagnostics:
        ends.append(ForEach(NormalizationAblation(), sites))
    if "novelty" in families and pairs:
        ends += [
            ForEachPair(stage, sites) for stage in (SubspaceNovelty(k=novelty_k), LinearCKA(), LayerCosine())
        ]
    streams: list[nn.Module] = []
    for stage in extra:
        if isinstance(stage, ForEachPair):
            ends.append(stage)
        elif isinstance(stage, PairStage):
            ends.append(ForEachPair(stage, sites))
        else:
            (streams if isinstance(stage, StreamingStage) else ends).append(ForEach(stage, sites))
    needed = {key_tuple(key)[0] for end in ends for key in end.in_keys}
    decompose: list[nn.Module] = []
    if needed & {"eigenvalues", "eigenvectors"}:
        decompose.append(ForEach(EigenSpectrum(k=novelty_k), sites))
    if {"sample"} & needed and ("sample" in families and "normalization_ablation" in diagnostics):
        decompose.append(ForEach(SampleSpectrum(), sites))
    if needed & {"moments", "eigenvalues", "eigenvectors"}:
        streams.append(ForEach(StreamingCovariance(), sites))
    if "sample" in needed:
        streams.append(RowSample(sites, size=sample_limit, seed=seed, also=also))
    if routers and "router" in families:
        streams.append(ForEach(RouterLoad(top_k=router_top_k), routers))
    return TensorDictSequential(
        capture, SelectTokens([*sites, *routers], **dict(select or {})), *streams, *decompose, *ends
    )


def analyze_model(
    model_name: str | nn.Module | None = None,
    dataloader: Iterable[Any] | None = None,
    *,
    model: nn.Module | None = None,
    max_tokens: int | None = 100_000,
    metrics: str | TensorDictModuleBase | Sequence[str | TensorDictModuleBase] | None = "default",
    diagnostics: Sequence[str] | None = None,
    layers: str | int | slice | Sequence[int] = "all",
    hook_point: str = "residual_input",
    sites: str | Sequence[str] | None = None,
    save_mode: str | None = None,
    save_dir: str | None = None,
    sample_limit: int = 4096,
    novelty_k: int = 32,
    device: str | torch.device | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    output_router_logits: bool | str = "auto",
    run_name: str | None = None,
    tokenizer_name: str | None = None,
    dataset_name: str | None = None,
    run_metadata: Mapping[str, Any] | None = None,
    progress: bool | None = True,
    seed: int = 0,
    select: Mapping[str, Any] | None = None,
    neighbors: bool | int = False,
    untrained: bool | nn.Module = False,
    checkpoint: str | Path | None = None,
    every: int = 100,
    overwrite: bool = False,
) -> AnalysisResults | None:
    """Measure the representation geometry of a model over a dataloader.

    Builds ``analysis_pipeline``, runs it with ``run``, and returns tables.

    Args:
        model_name: a Hugging Face id, a local directory, or a module.
        dataloader: an iterable of batches, see ``run``.
        model: a loaded module; takes precedence, ``model_name`` then only labels it.
        max_tokens: rows to measure; reaching it is recorded in the metadata.
        metrics: "default" or None for all families ("spectrum", "sample", "novelty", "router"), or a list of families
            and of stages of one's own: any TensorDict module whose inputs the pipeline has becomes columns.
        diagnostics: ["normalization_ablation"] or None.
        layers: "all", a list (negative counts from the end), a slice or "0,3,7".
        hook_point: the kind of site, when ``sites`` is not given.
        sites: kinds or concrete site names, see ``Capture``.
        save_mode: None, "bundle", "csv" or "json".
        save_dir: where the bundle goes.
        sample_limit: rows of the uniform sample.
        novelty_k: leading eigenvectors compared between consecutive sites.
        device: moves the model there first.
        model_kwargs: passed to ``from_pretrained``.
        trust_remote_code: run code that comes with a checkpoint; off unless asked.
        output_router_logits: measure router load; "auto" where the model has routers.
        run_name, tokenizer_name, dataset_name, run_metadata: recorded in the metadata.
        progress: a progress bar on a terminal; False for none.
        seed: seed of the row sample.
        select: further settings of ``SelectTokens``, such as {"skip_first": 1}.
        neighbors: keep a neighbour table of the sample at every site (100 neighbours, or this many), with what
            ``select={"also": [...]}`` carries: in ``results.neighbors`` and in the bundle.
        untrained: measure the same model with re-initialised weights too (or the module given here), in the same tables:
            column ``weights`` says which. The loader must be one that can be read twice.
        checkpoint, every: as for ``run``: a file that keeps the state, and batches between two writes. Further stacks and the
            untrained model have files of their own beside it.
        overwrite: replace an earlier bundle in ``save_dir``.

    Returns:
        AnalysisResults. Column ``layer_norm_depth`` = layer / last analysed layer; ``relative_depth`` = layer / last layer
        of the model's stack. In a process group the results are on rank 0, None elsewhere.

    Raises:
        ValueError: an unknown family or diagnostic, no model or loader, an empty loader.
    """
    if dataloader is None:
        raise ValueError(
            "analyze_model needs a dataloader: an iterable of tokenized batches, such as a list of dicts."
        )
    families, extra = _families(metrics)
    wanted = [diagnostics] if isinstance(diagnostics, str) else list(diagnostics or [])
    if unknown := sorted(set(wanted) - set(DIAGNOSTICS)):
        raise ValueError(f"unknown diagnostics {unknown}; there is {list(DIAGNOSTICS)}.")
    net, label = _model(model_name, model, trust_remote_code, model_kwargs)
    if device is not None and not getattr(net, "hf_device_map", None):
        net.to(device)
    settings = {
        "families": families,
        "extra": extra,
        "diagnostics": wanted,
        "sample_limit": sample_limit,
        "novelty_k": novelty_k,
        "seed": seed,
        "select": dict(select or {}),
    }
    settings["neighbors"] = 100 if neighbors is True else (neighbors or None)
    place = {
        "layers": layers,
        "sites": hook_point if sites is None else sites,
        "routers": output_router_logits,
    }
    options = {"max_tokens": max_tokens, "metrics": metrics, "progress": progress, "every": every}
    if untrained is not False and isinstance(dataloader, Iterator):
        raise ValueError(
            "untrained= reads the data twice, but the dataloader is an iterator that can be read once. Give a list or a "
            "DataLoader."
        )
    results = _measured(net, label, dataloader, settings, place, checkpoint=checkpoint, **options)
    if untrained is not False:
        other = untrained if isinstance(untrained, nn.Module) else untrained_copy(net, seed=seed)
        beside = None if checkpoint is None else f"{checkpoint}.untrained"
        baseline = _measured(other, label, dataloader, settings, place, checkpoint=beside, **options)
        results = None if results is None or baseline is None else with_baseline(results, baseline)
    if results is None:
        return None  # the result is on rank 0
    results.metadata |= {
        "hook_point": hook_point if sites is None else None,
        "output_router_logits": output_router_logits,
        "run_name": run_name,
        "tokenizer": tokenizer_name,
        "dataset": dataset_name,
        **({"run_metadata": dict(run_metadata)} if run_metadata else {}),
    }
    if save_mode is not None:
        results.save(save_dir, save_mode, overwrite=overwrite)
    return results


def _measured(
    net: nn.Module,
    label: str | None,
    dataloader: Iterable[Any],
    settings: Mapping[str, Any],
    place: Mapping[str, Any],
    *,
    max_tokens: int | None,
    metrics: Any,
    progress: bool | None,
    checkpoint: str | Path | None,
    every: int,
) -> AnalysisResults | None:
    """One model's analysis: a pass for each stack, and the tables of all."""
    asked = Capture(net, place["sites"], layers=place["layers"])
    routers: list[Any] = []
    if "router" in settings["families"]:
        routers = _router_sites(net, asked, place["layers"], place["routers"])
    identity = Identity(
        *model_identity(net, label), novelty_k=settings["novelty_k"], depth=_stack_depths(net)
    )
    frames = []
    for stack, group in _by_stack(asked.sites, dataloader).items():
        own_routers = [site for site in routers if site.stack == stack]
        options: dict[str, Any] = {"max_rows": max_tokens, "progress": None if progress else False}
        if checkpoint is not None:
            options |= {"checkpoint": f"{checkpoint}.{stack}" if frames else checkpoint, "every": every}
        frames.append((_run_stack(net, group, own_routers, dataloader, settings, options), group))
    if any(result is None for result, _ in frames):
        return None
    extra = settings["extra"]
    tables = [_taken_out(result, group) for result, group in frames] if settings["neighbors"] else []
    stacks = {str(group[0].stack): result for result, group in frames}
    return AnalysisResults(
        metrics=_joined(metrics_table(result, group, identity, extra) for result, group in frames),
        novelty=_joined(novelty_table(result, group, identity) for result, group in frames),
        router=_joined(router_table(result, identity) for result, _ in frames),
        diagnostics={
            name: _joined(diagnostics_table(result, group, identity) for result, group in frames)
            for name in settings["diagnostics"]
        },
        eigenvalues={
            name: values
            for result, group in frames
            for name, values in eigenvalue_arrays(result, group, len(frames) > 1).items()
        },
        metadata={
            **recorded(net, label, asked, frames, settings, max_tokens, metrics),
            "router_sites": [str(site) for site in routers],
        },
        neighbors=_one_or_by_stack(dict(zip(stacks, tables))),
        result=_one_or_by_stack(stacks),
    )


def _one_or_by_stack(results: Mapping[str, TensorDict]) -> TensorDict | None:
    if len(results) <= 1:
        return next(iter(results.values()), None)
    return TensorDict(dict(results), batch_size=[])


def _taken_out(result: TensorDict, sites: Sequence[str]) -> TensorDict:
    """The neighbour tables of a result, with the sample's labels and row ids but without its rows."""
    tables = TensorDict({"neighbors": result.get("neighbors")}, batch_size=[])
    for name, value in result.get("sample").items():
        if name not in sites:
            tables.set(("sample", name), value)
    tables.set("sample_row_id", result.get("sample_row_id"))
    for root in ("neighbors", "sample", "sample_row_id"):
        result.del_(root)
    return tables


def _families(metrics: Any) -> tuple[list[str], list[TensorDictModuleBase]]:
    chosen = [metrics] if isinstance(metrics, str | nn.Module) else list(metrics or [])
    names = [one for one in chosen if isinstance(one, str)]
    extra = [one for one in chosen if not isinstance(one, str)]
    if unknown := [name for name in names if name not in (*FAMILIES, "default")]:
        raise ValueError(
            f"unknown metric families {unknown}; there is 'default' or any of {list(FAMILIES)}, and any TensorDict module "
            f"of your own (a tg.Stage reading 'sample', 'eigenvalues' or ('moments', ...))."
        )
    for stage in extra:
        if not TensorDictModuleBase.is_tdmodule_compatible(stage):
            raise TypeError(
                f"metrics= takes family names and TensorDict modules, got {type(stage).__name__}. Wrap a function in "
                f"TensorDictModule(function, in_keys=['sample'], out_keys=[('spectrum', 'name')])."
            )
    everything = not chosen or "default" in names
    return [name for name in FAMILIES if everything or name in names], extra


def _model(
    model_name: str | nn.Module | None,
    model: nn.Module | None,
    trust_remote_code: bool,
    model_kwargs: Mapping[str, Any] | None,
) -> tuple[nn.Module, str | None]:
    if model is not None:
        return model, model_name if isinstance(model_name, str) else None
    if isinstance(model_name, nn.Module):
        return model_name, None
    if isinstance(model_name, str):
        return load_model(
            model_name, trust_remote_code=trust_remote_code, model_kwargs=model_kwargs
        ), model_name
    raise ValueError(
        "analyze_model needs a model: model_name= (an id, a directory or a module) or model= (a module)."
    )


def _stack_depths(model: nn.Module) -> dict[str | None, int]:
    """The last layer of each stack."""
    depths: dict[str | None, int] = {}
    for entry in available_sites(model):
        if entry.site.layer is not None:
            depths[entry.site.stack] = max(depths.get(entry.site.stack, 0), entry.site.layer)
    return depths


def _router_sites(model: nn.Module, asked: Capture, layers: Any, wanted: bool | str) -> list[Any]:
    if wanted is False:
        return []
    have = {entry.site.kind for entry in available_sites(model)}
    if "router_logits" in have and not any(site.kind == "router_logits" for site in asked.sites):
        return Capture(model, "router_logits", layers=layers).sites
    if wanted is True:
        raise ValueError(
            "output_router_logits=True, but the model has no router_logits site (tdgeom sites MODEL lists what it has). Use "
            "'auto' to measure routers only where there are some."
        )
    return []


def _by_stack(sites: Sequence[Any], dataloader: Iterable[Any]) -> dict[str | None, list[Any]]:
    """Sites by stack: the stacks of an encoder-decoder have rows of their own, so each gets a pass of its own."""
    groups: dict[str | None, list[Any]] = {}
    for site in sites:
        groups.setdefault(site.stack, []).append(site)
    if len(groups) > 1 and isinstance(dataloader, Iterator):
        raise ValueError(
            f"the sites belong to {len(groups)} stacks {list(groups)}, whose positions differ, so each needs a pass of its own, "
            f"but the dataloader is an iterator that can be read once. Give a list or a DataLoader, or sites of one stack."
        )
    return groups


def _run_stack(
    model: nn.Module,
    sites: list[Any],
    routers: list[Any],
    dataloader: Iterable[Any],
    settings: Mapping[str, Any],
    run_options: Mapping[str, Any],
) -> TensorDict | None:
    """One pass over the sites of one stack: the result without its bulky intermediates, with each site's width."""
    options = dict(settings)
    if sites[0].stack is not None and "decoder" in sites[0].stack:
        options["select"] = {"mask_key": "decoder_attention_mask", **options["select"]}
    top_k = int(getattr(getattr(model, "config", None), "num_experts_per_tok", None) or 2)
    pipeline = analysis_pipeline(
        Capture(model, [*map(str, sites), *map(str, routers)]),
        sites,
        routers=routers,
        router_top_k=top_k,
        **options,
    )
    plan = make_plan(pipeline)
    roots = {key_tuple(key)[0] for unit in (*plan.stream, *plan.end) for key in unit.out_keys} - set(HELD)
    if settings["neighbors"]:
        roots |= {"sample", "sample_row_id"}
    result = run(pipeline, dataloader, keep=sorted(roots), **run_options)
    if result is not None:
        result.set("sample_rows", torch.tensor(min(settings["sample_limit"], int(result["run", "rows"]))))
        for site, width in _widths(pipeline, sites).items():
            result.set(("hidden_dim", site), torch.tensor(width))
    return result


def _widths(pipeline: TensorDictSequential, sites: Sequence[str]) -> dict[str, int]:
    """How wide each site's rows were, from the streaming state that saw them."""
    widths: dict[str, int] = {}
    for unit in pipeline.modules():
        if isinstance(unit, RowSample):
            widths |= {
                str(site): int(unit.get_buffer(name).shape[-1]) for site, name in zip(sites, unit.held)
            }
        elif isinstance(getattr(unit, "module", None), StreamingCovariance):
            widths[unit.where] = int(unit.module.mean.shape[0])
    return widths


def _joined(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    tables = [table for table in tables if not table.empty]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
