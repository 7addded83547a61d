"""One model's analysis: a pass for each stack of blocks, and the tables of all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torch import nn

from tdgeom.analysis.default_pipeline import HELD, analysis_pipeline
from tdgeom.analysis.metadata import run_metadata as recorded
from tdgeom.analysis.result_tables import (
    Identity,
    diagnostics_table,
    eigenvalue_arrays,
    metrics_table,
    novelty_table,
    router_table,
)
from tdgeom.analysis.results import AnalysisResults
from tdgeom.core.keys import Key, key_tuple
from tdgeom.model.capture import Capture
from tdgeom.model.loading import model_identity
from tdgeom.model.structure.resolve import available_sites
from tdgeom.run.plan import make_plan
from tdgeom.run.run import run
from tdgeom.stream.covariance import StreamingCovariance
from tdgeom.stream.row_sample import RowSample

__all__ = ["measured"]


def measured(
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
    in_keys: Sequence[Key] | None,
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
        options: dict[str, Any] = {
            "max_rows": max_tokens,
            "progress": None if progress else False,
            "in_keys": in_keys,
        }
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
