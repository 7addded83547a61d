"""The pipeline of the default analysis: only the stages that the measures asked for need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import nn

from tdgeom.core.for_each import ForEach, ForEachPair, pair_list
from tdgeom.core.keys import key_tuple
from tdgeom.core.stage import PairStage
from tdgeom.core.streaming_stage import StreamingStage
from tdgeom.measures.neighbors.nearest_neighbors import NearestNeighbors
from tdgeom.measures.normalization import NormalizationAblation
from tdgeom.measures.router import RouterLoad
from tdgeom.measures.sample_metrics import SampleMetrics, SampleSpectrum
from tdgeom.measures.similarity.cka import LinearCKA
from tdgeom.measures.similarity.subspace import LayerCosine, SubspaceNovelty
from tdgeom.measures.spectrum import EigenSpectrum, SpectrumMetrics
from tdgeom.model.capture import Capture
from tdgeom.rows.select_tokens import SelectTokens
from tdgeom.stream.covariance import StreamingCovariance
from tdgeom.stream.row_sample import RowSample

__all__ = ["DIAGNOSTICS", "FAMILIES", "HELD", "analysis_pipeline"]

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
