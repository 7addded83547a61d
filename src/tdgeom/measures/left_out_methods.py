"""Shorter ways to a measure without each group of rows, by the stage that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.measures.sample_metrics import SampleMetrics
from tdgeom.measures.sample_without_groups import sample_metrics_without
from tdgeom.measures.similarity.linear_cka import LinearCKA
from tdgeom.measures.similarity.pairs_without_groups import PairSide, cosine_without, linear_cka_without
from tdgeom.measures.similarity.subspace import LayerCosine

__all__ = ["PAIR_METHODS", "SITE_METHODS", "PairSide", "SiteMethod", "pair_method"]


class SiteMethod(NamedTuple):
    """A function (stage, inputs, group, groups, further inputs) -> the stage's outputs with replicates, or None: not here."""

    call: Callable[..., list[Tensor] | None]
    reads: Mapping[Key, str] = {}


SITE_METHODS: dict[type, SiteMethod] = {
    SampleMetrics: SiteMethod(sample_metrics_without, {("replicates", "basis"): "E E"}),
}

PAIR_METHODS: dict[type, Callable[..., list[Tensor] | None]] = {
    LinearCKA: linear_cka_without,
    LayerCosine: cosine_without,
}


def pair_method(stage: Any) -> Callable[..., list[Tensor] | None] | None:
    """The method of a stage's class, or of the nearest class above it that has one."""
    return next((found for kind in type(stage).__mro__ if (found := PAIR_METHODS.get(kind))), None)
