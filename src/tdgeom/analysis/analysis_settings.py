"""What is asked of an analysis, as one frozen object that the pipeline, the pass, the tables and the metadata read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from tensordict.nn import TensorDictModuleBase

from tdgeom.core.pair_stage import PairStage
from tdgeom.core.stage_settings import Configured, plain_setting
from tdgeom.measures.listed_measures import listed_measures
from tdgeom.measures.normalization import NormalizationAblation
from tdgeom.measures.registry import named_stages
from tdgeom.model.calls.repeated_calls import CallsSpec, check_calls
from tdgeom.model.sites import LayerSpec
from tdgeom.stream.replicates import error_groups

__all__ = [
    "DIAGNOSTICS",
    "FAMILIES",
    "AnalysisSettings",
    "ComparisonSettings",
    "select_settings",
    "stage_record",
]

FAMILIES = ("spectrum", "sample", "novelty", "router")
DIAGNOSTICS = ("normalization_ablation",)
MAX_ROWS = 100_000

Metrics = str | TensorDictModuleBase | Sequence[str | TensorDictModuleBase] | None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every analysis is asked: where it reads, how many rows, and the seed of their sample."""

    sites: str | Sequence[str] = "residual_input"
    layers: LayerSpec = "all"
    calls: CallsSpec = None
    max_rows: int | None = MAX_ROWS
    sample_size: int = 4096
    seed: int = 0
    select: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Every setting that changes a number, as the metadata keep it; the sites themselves stand there already."""
        return {
            "calls": self.calls,
            "sample_size": self.sample_size,
            "seed": self.seed,
            "select": {name: plain_setting(value) for name, value in self.select.items()},
        }


@dataclass(frozen=True, kw_only=True)
class AnalysisSettings(Settings):
    """What an analysis is asked, checked once and frozen; ``analyze_model`` makes it of its arguments of the same names.

    Args:
        metrics, diagnostics: which measures: families, names of measures, stages. sites, layers, calls, output_router_logits:
            where.
        max_rows, sample_size, select, seed: of which rows. novelty_k, neighbors: how many directions and neighbours.
        errors: whether measures get standard errors, or over how many groups of documents.
        convergence: also on nested prefixes of the sample. significance: every measure of two sites beside its null.
        held: what is made though no measure may read it, for the caller: of "sample", "eigenvectors", "eigenvalues".

    Attributes: ``families``, the families among the metrics; ``stages``, the named measures and the stages of one's own.

    Raises:
        ValueError: an unknown family, measure or diagnostic. TypeError: a metric that is neither a name nor a TensorDict module.

        >>> AnalysisSettings(metrics=["sample", "spectrum"]).families
        ('spectrum', 'sample')
    """

    metrics: Metrics = "default"
    diagnostics: str | NormalizationAblation | Sequence[str | NormalizationAblation] | None = None
    output_router_logits: bool | str = "auto"
    novelty_k: int = 32
    neighbors: bool | int | None = False
    errors: bool | int = False
    convergence: bool = False
    significance: bool = False
    held: Sequence[str] = ()

    families: tuple[str, ...] = field(init=False)
    stages: tuple[TensorDictModuleBase, ...] = field(init=False)

    def __post_init__(self) -> None:
        if check_calls(self.calls) == "all":
            raise ValueError(
                "analyze_model: calls='all' has several values for one row. Remedy: calls='first', 'last' or a number."
            )
        given = listed_measures("analyze_model", self.metrics)
        families = ("default", *FAMILIES)
        names = [one for one in given if isinstance(one, str) and one in families]
        measures = [one for one in given if isinstance(one, str) and one not in families]
        named = named_stages(measures, also=families)
        everything = not given or "default" in names
        asked: Any = self.diagnostics or ()
        one_thing = isinstance(asked, str) or not isinstance(asked, Iterable)
        listed = [asked] if one_thing else list(asked)
        own = [one for one in listed if isinstance(one, NormalizationAblation)]
        diagnostics = tuple(one for one in listed if not isinstance(one, NormalizationAblation))
        if unknown := [one for one in diagnostics if one not in DIAGNOSTICS]:
            raise ValueError(
                f"analyze_model: unknown diagnostics {unknown}; there is {list(DIAGNOSTICS)}, by name, or with variants of "
                f"your own tg.NormalizationAblation(variants=...). Other stages go into metrics=['default', stage]."
            )
        found = {
            "families": tuple(name for name in FAMILIES if everything or name in names),
            "stages": (*named, *(_module(one) for one in given if not isinstance(one, str)), *own),
            "diagnostics": diagnostics,
            "neighbors": 100 if self.neighbors is True else (self.neighbors or None),
            "errors": error_groups(self.errors, "analyze_model"),
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def record(self) -> dict[str, Any]:
        """Every setting that changes a number, as the metadata keep it."""
        return {
            "metrics": [*self.families, *(type(stage).__name__ for stage in self.stages)],
            "extra_stages": [stage_record(stage) for stage in self.stages],
            "diagnostics": list(cast(Any, self.diagnostics or ())),
            "novelty_k": self.novelty_k,
            "neighbors": self.neighbors,
            "errors": error_record(self.errors),
            "convergence": self.convergence,
            "significance": self.significance,
            "ablation_variants": list(NormalizationAblation().variants) if self.diagnostics else [],
            **super().record(),
        }


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings(Settings):
    """What ``compare`` is asked; its arguments say what each is."""

    stages: Sequence[PairStage]
    align: str
    sketch: int | None = None
    errors: bool | int = False
    significance: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "errors", error_groups(self.errors, "compare"))

    def record(self) -> dict[str, Any]:
        """Every setting that changes a number, as the metadata keep it."""
        return {
            "metrics": [stage_record(stage) for stage in self.stages],
            "sketch": self.sketch,
            "significance": self.significance,
            "errors": error_record(int(self.errors)),
            **super().record(),
        }


def error_record(groups: int) -> dict[str, Any] | None:
    """What the metadata say of standard errors."""
    return {"method": "delete-a-group jackknife", "groups": groups, "by": "document"} if groups else None


def select_settings(owner: str, select: Any) -> dict[str, Any]:
    """Settings of ``SelectTokens``, as a mapping."""
    if select is not None and not isinstance(select, Mapping):
        meant = {"mean": "pool"}.get(select, "positions") if isinstance(select, str) else "positions"
        raise TypeError(
            f"{owner}: select is a mapping of SelectTokens' settings, got {select!r:.80}. Write select={{{meant!r}: ...}}."
        )
    own = [name for name in ("sites", "documents") if name in (select or {})]
    if own:
        raise ValueError(
            f"{owner}: select={{{own[0]!r}: ...}} is not offered: {owner} gives SelectTokens its {own[0]} itself (documents "
            f"where errors=, significance= or labels ask for them). select takes which positions become rows, such as "
            f"{{'positions': 'last'}} or {{'skip_first': 1}}, and also=."
        )
    return dict(select or {})


def _module(given: Any) -> TensorDictModuleBase:
    if not TensorDictModuleBase.is_tdmodule_compatible(given):
        raise TypeError(
            f"analyze_model: metrics= takes family names and TensorDict modules, got {type(given).__name__}. Wrap a function in "
            f"TensorDictModule(function, in_keys=['sample'], out_keys=[('spectrum', 'name')])."
        )
    return given


def stage_record(stage: TensorDictModuleBase) -> dict[str, Any]:
    """A stage by its name, what it was made with, and its keys, as plain data."""
    made = stage.settings() if isinstance(stage, Configured) else {"module": getattr(stage, "module", None)}
    return {
        "stage": type(stage).__name__,
        **{name: plain_setting(value) for name, value in made.items()},
        "in_keys": list(stage.in_keys),
        "out_keys": list(stage.out_keys),
    }
