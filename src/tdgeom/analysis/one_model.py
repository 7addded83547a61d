"""One model's analysis: a pass for each stack of blocks, and the tables of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import nn

from tdgeom.analysis.analysis_settings import AnalysisSettings
from tdgeom.analysis.analysis_state import AnalysisState, Described
from tdgeom.analysis.default_pipeline import HELD, analysis_pipeline
from tdgeom.analysis.metadata import analysis_metadata, row_unit, with_run
from tdgeom.analysis.null_stages import with_joint_p
from tdgeom.analysis.result_tables import (
    Measured,
    ablation_rows,
    eigenvalue_arrays,
    metrics_rows,
    novelty_rows,
    router_rows,
    table,
)
from tdgeom.analysis.results import AnalysisResults
from tdgeom.core.keys import key_tuple
from tdgeom.core.renamed import RenamedStream
from tdgeom.core.warnings import gathered
from tdgeom.model.calls.checked_sites import available_sites
from tdgeom.model.capture import Capture
from tdgeom.model.loading import model_identity
from tdgeom.model.sites import Site
from tdgeom.run.plan import make_plan
from tdgeom.run.run import run
from tdgeom.stream.covariance import StreamingCovariance
from tdgeom.stream.grouped_covariance import GroupedCovariance
from tdgeom.stream.row_sample import RowSample

__all__ = ["Passes", "analyzed", "by_stack", "kept_roots", "measured_passes", "router_sites"]

# what is handed out as neighbour tables
TABLES = ("neighbors", "sample_carried", "sample_row_id")


def analyzed(
    model: nn.Module,
    label: str | None,
    dataloader: Iterable[Any],
    settings: AnalysisSettings,
    *,
    checkpoint: str | Path | None = None,
    leave: tuple[Path, Mapping[str, Any]] | None = None,
    held: dict[str, TensorDict] | None = None,
    read_by: Callable[[Capture], TensorDictModuleBase] | None = None,
    **run_options: Any,
) -> AnalysisResults | None:
    """One model's analysis, on rank 0: a pass for each stack, and the tables of all; further options go to ``run``.

    ``leave``: a file that gets the state instead of results (None is returned), and what else its metadata will say. ``held``
    gets, by stack, what ``settings.held`` names. ``read_by`` makes of a Capture what runs in its place.
    """
    asked = Capture(model, settings.sites, layers=settings.layers, calls=settings.calls)
    routers = router_sites(model, asked, settings)
    name = dict(zip(("model_key", "model_label"), model_identity(model, label)))
    depths: dict[str | None, int] = {}
    for entry in available_sites(model):
        depths[entry.site.stack] = max(depths.get(entry.site.stack, 0), entry.site.layer or 0)
    blocks = {stack: depths[stack] + 1 for stack in _stacks_of_blocks(model)}

    def pipeline_of(stack: str | None, own: Sequence[Site]) -> TensorDictSequential:
        beside = [site for site in routers if site.stack == stack]
        return _stack_pipeline(model, own, beside, settings, read_by)

    told = analysis_metadata(model, label, asked, settings, blocks)
    told["router_sites"] = [str(site) for site in routers]
    found = measured_passes(
        by_stack(asked.sites, dataloader),
        pipeline_of,
        dataloader,
        settings,
        Described(name, depths, row_unit(asked, settings.select)),
        checkpoint,
        None if leave is None else AnalysisState(leave[0], settings, {**told, **leave[1]}),
        **run_options,
    )
    if held is not None:
        held |= found.held
    if not found.passes:
        return None
    return found.results(settings, with_run(told, [one.result for one in found.passes], settings))


@dataclass
class Passes:
    """The passes of one analysis, with what was warned of, and the neighbour tables and what else is held taken out."""

    passes: list[Measured]
    said: list[str]
    neighbors: dict[str, TensorDict]
    held: dict[str, TensorDict] = field(default_factory=dict)

    def add(
        self,
        stack: str | None,
        sites: Sequence[Site],
        pipeline: TensorDictSequential,
        result: TensorDict,
        settings: AnalysisSettings,
        described: Described,
    ) -> None:
        """What one pass gave."""
        with_joint_p(result)
        if settings.neighbors:
            self.neighbors[str(stack)] = _taken_out(result, TABLES)
        if settings.held:
            held = _taken_out(result, _held_roots(settings))
            for root in set(settings.held) - set(HELD) & set(result.keys()):  # which the tables read too
                held.set(root, result.get(root).clone())
            self.held[str(stack)] = held
        sample = min(settings.sample_size, int(result["run", "rows"]))
        depth, widths = described.depths.get(stack, 0), _widths(pipeline, sites)
        self.passes.append(
            Measured(result, sites, described.name, depth, widths, sample, settings.novelty_k, described.unit)
        )

    def results(self, settings: AnalysisSettings, metadata: Mapping[str, Any]) -> AnalysisResults:
        """The tables of all passes."""
        return AnalysisResults(
            metrics=table(metrics_rows, self.passes),
            novelty=table(novelty_rows, self.passes),
            router=table(router_rows, self.passes),
            diagnostics=self._ablations(),
            eigenvalues=eigenvalue_arrays(self.passes),
            metadata={**metadata, "warnings": list(dict.fromkeys(self.said))},
            neighbors=_one_or_by_stack(self.neighbors),
            result=_one_or_by_stack({str(one.sites[0].stack): one.result for one in self.passes}),
        )

    def _ablations(self) -> dict[str, pd.DataFrame]:
        """The table of normalisations, whether asked for by name or with variants of one's own."""
        measured = [one for one in self.passes if "ablation" in one.result.keys()]
        return {"normalization_ablation": table(ablation_rows, measured)} if measured else {}


def measured_passes(
    groups: Mapping[str | None, Sequence[Site]],
    pipeline_of: Callable[[str | None, Sequence[Site]], TensorDictSequential],
    dataloader: Iterable[Any],
    settings: AnalysisSettings,
    described: Described,
    checkpoint: str | Path | None = None,
    leave: AnalysisState | None = None,
    **run_options: Any,
) -> Passes:
    """A pass for each stack; of none on ranks other than the first, nor where all that is wanted is their state."""
    found = Passes([], [], {})
    for number, (stack, sites) in enumerate(groups.items()):
        pipeline = pipeline_of(stack, sites)
        beside = f"{checkpoint}.{stack}" if checkpoint is not None and number else checkpoint
        to = None if leave is None else leave.of_pass(stack, list(groups), sites, pipeline, described)
        kept = kept_roots(pipeline, settings)
        with gathered() as told:
            result = run(
                pipeline,
                dataloader,
                max_rows=settings.max_rows,
                keep=kept,
                checkpoint=beside,
                state=to,
                **run_options,
            )
        found.said += told.texts()
        if result is not None and to is None:
            found.add(stack, sites, pipeline, result, settings, described)
    return found


def _stacks_of_blocks(model: nn.Module) -> list[str | None]:
    return list(
        dict.fromkeys(entry.site.stack for entry in available_sites(model) if entry.site.layer is not None)
    )


def _one_or_by_stack(results: Mapping[str, TensorDict]) -> TensorDict | None:
    if len(results) <= 1:
        return next(iter(results.values()), None)
    return TensorDict(dict(results), batch_size=[])


def _taken_out(result: TensorDict, roots: Iterable[str]) -> TensorDict:
    """Some roots of a result: of the neighbour tables with the sample's labels and row ids."""
    return TensorDict({root: result.pop(root) for root in roots if root in result.keys()}, batch_size=[])


def _held_roots(settings: AnalysisSettings) -> list[str]:
    """What a caller asked for, without what the tables read too, and the row ids of a sample."""
    ids = ["sample_row_id"] if "sample" in settings.held else []
    return [*(root for root in settings.held if root in HELD), *ids]


def router_sites(model: nn.Module, asked: Capture, settings: AnalysisSettings) -> list[Site]:
    """The routers whose load is measured beside the sites asked for."""
    wanted = settings.output_router_logits
    if wanted is False or "router" not in settings.families:
        return []
    have = {entry.site.kind for entry in available_sites(model)}
    if "router_logits" in have and not any(site.kind == "router_logits" for site in asked.sites):
        return Capture(model, "router_logits", layers=settings.layers).sites
    if wanted is True:
        raise ValueError(
            "analyze_model: output_router_logits=True, but the model has no router_logits site (tdgeom sites MODEL "
            "lists what it has). Use 'auto' to measure routers only where there are some."
        )
    return []


def by_stack(sites: Sequence[Site], dataloader: Iterable[Any]) -> dict[str | None, list[Site]]:
    """Sites by stack: the stacks of an encoder-decoder have rows of their own, so each gets a pass of its own."""
    groups: dict[str | None, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.stack, []).append(site)
    if len(groups) > 1 and isinstance(dataloader, Iterator):
        raise ValueError(
            f"analyze_model: the sites belong to {len(groups)} stacks {list(groups)}, whose positions differ, so each needs "
            f"a pass of its own, but the dataloader is an iterator that can be read once. Give a list or a DataLoader, or "
            f"sites of one stack."
        )
    return groups


def _stack_pipeline(
    model: nn.Module,
    sites: Sequence[Site],
    routers: Sequence[Site],
    settings: AnalysisSettings,
    read_by: Callable[[Capture], TensorDictModuleBase] | None,
) -> TensorDictSequential:
    """The pipeline over the sites of one stack."""
    if "decoder" in (sites[0].stack or ""):
        select = {"mask_key": "decoder_attention_mask", **settings.select}
        settings = replace(settings, select=select)
    top_k = int(getattr(getattr(model, "config", None), "num_experts_per_tok", None) or 2)
    capture = Capture(model, [*map(str, sites), *map(str, routers)], calls=settings.calls)
    reads = capture if read_by is None else read_by(capture)
    return analysis_pipeline(reads, sites, settings, routers=routers, router_top_k=top_k)


def kept_roots(pipeline: TensorDictSequential, settings: AnalysisSettings) -> list[str]:
    """The roots of a pass that its tables read: all but the bulky ones between."""
    plan = make_plan(pipeline)
    roots = {key_tuple(key)[0] for unit in (*plan.stream, *plan.end) for key in unit.out_keys}
    asked = {*(TABLES if settings.neighbors else ()), *_held_roots(settings)}
    return sorted(roots - set(HELD) | roots & asked)


def _widths(pipeline: TensorDictSequential, sites: Sequence[str]) -> dict[str, int]:
    """How wide each site's rows were, from the streaming state that saw them."""
    widths: dict[str, int] = {}
    for unit in pipeline.modules():
        if isinstance(unit, RowSample):
            widths |= {site: unit.get_buffer(f"rows_{i}").shape[-1] for i, site in enumerate(sites)}
        elif isinstance(unit, RenamedStream) and isinstance(
            unit.module, StreamingCovariance | GroupedCovariance
        ):
            widths[unit.where] = unit.module.get_buffer("mean").shape[-1]
    return widths
