"""Shorter ways to a measure without each group of rows, by the stage that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.measures.ablation_without_groups import ablation_without
from tdgeom.measures.dimension.decimation import Decimation
from tdgeom.measures.dimension.estimate import DimensionStage
from tdgeom.measures.dimension.subsets_of_groups import (
    decimation_without,
    dimension_without,
    pair_of_subsets,
)
from tdgeom.measures.neighbors.information_imbalance import InformationImbalance
from tdgeom.measures.neighbors.label_overlap import LabelOverlap
from tdgeom.measures.neighbors.neighborhood_overlap import JaccardKNN, NeighborhoodOverlap
from tdgeom.measures.neighbors.overlap_without_groups import label_overlap_without, overlap_without
from tdgeom.measures.normalization import NormalizationAblation
from tdgeom.measures.sample_metrics import SampleMetrics
from tdgeom.measures.sample_without_groups import sample_metrics_without
from tdgeom.measures.similarity.cknna import CKNNA
from tdgeom.measures.similarity.linear_cka import LinearCKA
from tdgeom.measures.similarity.pairs_without_groups import PairSide, cosine_without, linear_cka_without
from tdgeom.measures.similarity.subspace import LayerCosine

__all__ = ["PAIR_METHODS", "SITE_METHODS", "PairSide", "SiteMethod", "pair_method", "told_apart"]


class SiteMethod(NamedTuple):
    """A function (stage, inputs, group, groups, further inputs) -> the stage's outputs with replicates, or None: not here."""

    call: Callable[..., list[Tensor] | None]
    reads: Mapping[Key, str] = {}


SITE_METHODS: dict[type, SiteMethod] = {
    SampleMetrics: SiteMethod(sample_metrics_without, {("replicates", "basis"): "E E"}),
    DimensionStage: SiteMethod(dimension_without),
    Decimation: SiteMethod(decimation_without),
    NormalizationAblation: SiteMethod(ablation_without),
    LabelOverlap: SiteMethod(label_overlap_without),
}

PAIR_METHODS: dict[type, Callable[..., list[Tensor] | None]] = {
    LinearCKA: linear_cka_without,
    LayerCosine: cosine_without,
    NeighborhoodOverlap: overlap_without,
    JaccardKNN: overlap_without,
    CKNNA: pair_of_subsets,
    InformationImbalance: pair_of_subsets,
}


def told_apart(stage: Any) -> bool:
    """Whether the spread of replicates is the measure's: not where neighbours are looked at and no method here knows how.

    A neighbour that is left out leaves its place to another, and that is most of what such a measure then moves by.
    """
    kind = type(stage)
    known = any(one in SITE_METHODS or one in PAIR_METHODS for one in kind.__mro__) or hasattr(
        stage, "leave_out"
    )
    return known or not kind.__module__.startswith(_OF_NEIGHBOURS)


_OF_NEIGHBOURS = (
    "tdgeom.measures.neighbors",
    "tdgeom.measures.dimension",
    "tdgeom.measures.similarity.cknna",
)


def pair_method(stage: Any) -> Callable[..., list[Tensor] | None] | None:
    """The method of a stage's class, or of the nearest class above it that has one."""
    return next((found for kind in type(stage).__mro__ if (found := PAIR_METHODS.get(kind))), None)
