"""The pipeline of the default analysis: only the stages that the measures asked for need."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from tensordict.nn import TensorDictModuleBase, TensorDictSequential

from tdgeom.analysis.analysis_settings import AnalysisSettings
from tdgeom.analysis.error_stages import ErrorStages
from tdgeom.analysis.null_stages import null_stages
from tdgeom.core.for_each import ForEach
from tdgeom.core.for_each_pair import ForEachPair, pair_list
from tdgeom.core.guessed_names import answer_guesses
from tdgeom.core.keys import key_tuple
from tdgeom.core.pair_stage import PairStage
from tdgeom.core.renamed import is_streaming
from tdgeom.core.streaming_stage import StreamingStage
from tdgeom.measures.dimension.estimate import DimensionStage
from tdgeom.measures.dimension.gride import Gride
from tdgeom.measures.eigen_spectrum import EigenSpectrum
from tdgeom.measures.leave_out import SampleGroups
from tdgeom.measures.leave_out_spectrum import LeaveOutSpectrum
from tdgeom.measures.neighbors.nearest_neighbors import NearestNeighbors
from tdgeom.measures.normalization import NormalizationAblation
from tdgeom.measures.router import RouterLoad
from tdgeom.measures.sample_metrics import PRODUCTS, SampleMetrics, SampleSpectrum
from tdgeom.measures.significance.convergence import Convergence
from tdgeom.measures.similarity.linear_cka import LinearCKA
from tdgeom.measures.similarity.subspace import LayerCosine, SubspaceNovelty
from tdgeom.measures.spectrum_errors import SpectrumErrors
from tdgeom.measures.spectrum_metrics import SpectrumMetrics
from tdgeom.rows.select_tokens import SelectTokens
from tdgeom.stream.covariance import StreamingCovariance
from tdgeom.stream.cross_moments import StreamingCrossMoments
from tdgeom.stream.grouped_covariance import GroupedCovariance
from tdgeom.stream.row_sample import RowSample

__all__ = ["HELD", "analysis_pipeline"]

HELD = (
    "moments",
    "eigenvectors",
    "sample",
    "sample_carried",
    "sample_row_id",
    "cross_moments",
    "group_moments",
    "replicates",
    "sample_between",
    "sample_group",
    "sample_group_rows",
    *map(str, PRODUCTS),
)


@answer_guesses
def analysis_pipeline(
    capture: TensorDictModuleBase | None,
    sites: Sequence[str],
    settings: AnalysisSettings | None = None,
    *,
    routers: Sequence[str] = (),
    router_top_k: int = 2,
    documents: bool | None = None,
) -> TensorDictSequential:
    """The pipeline that ``analyze_model`` runs: only the stages that the metrics asked for need.

    Args:
        capture: the hooking context that reads ``sites`` and ``routers``, or what writes its keys in its place; None: the batches
            hold their rows already, as those of ``store.rows(run)`` do.
        sites: sites whose geometry is measured.
        settings: what is asked, ``AnalysisSettings(metrics=..., sample_size=..., ...)``; default all of it. A stage of one's own
            runs at every site, a pair stage at every consecutive pair, a ``ForEachPair`` at its own pairs; what
            ``select={"also": ...}`` carries the sample holds too.
        routers: sites of router logits, for the family "router".
        router_top_k: experts a token is routed to.
        documents: whether rows carry which document they are of, for errors and nulls; default where there is a ``capture``. Else
            the sequence is the document.

        >>> import torch, tdgeom as tg
        >>> capture = tg.Capture(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)), in_keys=["x"])
        >>> pipeline = analysis_pipeline(capture, capture.sites, tg.AnalysisSettings(metrics="spectrum"))
        >>> result = tg.run(pipeline, [{"x": torch.randn(50, 2)}])
        >>> sorted(result["spectrum"].keys())
        ['residual_input.0', 'residual_input.1']
    """
    settings = settings or AnalysisSettings()
    paired = "novelty" in settings.families or any(
        isinstance(stage, PairStage | ForEachPair) for stage in settings.stages
    )
    pairs = pair_list(sites) if paired else []
    also = [str(name) for name in settings.select.get("also", ())]
    errors = ErrorStages(int(settings.errors or 0))
    ends: list[TensorDictModuleBase] = []
    similarities: list[PairStage] = []
    if settings.neighbors:
        ends.append(ForEach(NearestNeighbors(settings.neighbors), sites))
    if "spectrum" in settings.families:
        ends.append(ForEach(SpectrumMetrics(), sites))
        ends += [ForEach(SpectrumErrors(parts=True), sites)] if errors.groups else []
    if "sample" in settings.families:
        ends.append(ForEach(errors.around(SampleMetrics()), sites))
    if settings.diagnostics:
        ends.append(ForEach(errors.around(NormalizationAblation()), sites))
    if "novelty" in settings.families and pairs:
        asked = {key for stage in settings.stages if isinstance(stage, PairStage) for key in stage.out_keys}
        steps = (SubspaceNovelty(k=settings.novelty_k), LinearCKA(estimator="both"), LayerCosine())
        changes = [stage for stage in steps if not asked & set(stage.out_keys)]
        ends += [ForEachPair(errors.around(stage), sites, pairs=pairs) for stage in changes]
        similarities += changes
    if settings.convergence:
        ends.append(ForEach(Convergence(_of_a_sample(settings)), sites))
    streams: list[TensorDictModuleBase] = []
    for stage in settings.stages:
        if isinstance(stage, ForEachPair):
            ends += errors.of_pairs(stage) if errors.groups else [stage]
        elif isinstance(stage, PairStage):
            whole = [errors.around(stage), *errors.beside(stage)]
            ends += [ForEachPair(one, sites, pairs=pairs) for one in whole]
            similarities.append(stage)
        else:
            streaming = isinstance(stage, StreamingStage) or (
                isinstance(stage, ForEach) and all(map(is_streaming, stage.module))
            )
            (streams if streaming else ends).append(errors.of_sites(stage, sites))
    nulls = null_stages(similarities, significance=settings.significance, seed=settings.seed) if pairs else []
    ends += [ForEachPair(stage, sites, pairs=pairs) for stage in nulls]
    needed = {*settings.held, *(key_tuple(key)[0] for end in ends for key in end.in_keys)}
    documents = (capture is not None if documents is None else documents) and bool(errors.groups or nulls)
    decompose: list[TensorDictModuleBase] = []
    if errors.groups:
        needed |= {"sample"}
        decompose.append(SampleGroups(groups=errors.groups))
    if documents:
        also = [*also, *(["document_id"] if "document_id" not in also else [])]
    if needed & {"eigenvalues", "eigenvectors"}:
        spectrum = LeaveOutSpectrum if errors.groups else EigenSpectrum
        decompose.append(ForEach(spectrum(k=settings.novelty_k), sites))
    if "sample" in settings.families and settings.diagnostics:
        decompose.append(ForEach(SampleSpectrum(), sites))  # both read it
    if needed & {"moments", "eigenvalues", "eigenvectors"}:
        moments = GroupedCovariance(groups=errors.groups) if errors.groups else StreamingCovariance()
        streams.append(ForEach(moments, sites))
    if "cross_moments" in needed:
        streams.append(StreamingCrossMoments(sites, pairs=pairs))
    if "sample" in needed:
        streams.append(RowSample(sites, size=settings.sample_size, seed=settings.seed, also=also))
    if routers and "router" in settings.families:
        streams.append(ForEach(errors.around(RouterLoad(top_k=router_top_k)), routers))
    ends += errors.jackknives([*streams, *ends])
    if capture is None:
        return TensorDictSequential(*streams, *decompose, *ends)
    rows = SelectTokens([*sites, *routers], documents=documents, **settings.select)
    return TensorDictSequential(capture, rows, *streams, *decompose, *ends)


def _of_a_sample(settings: AnalysisSettings) -> TensorDictSequential:
    """What is asked of a site that a sample alone tells, of its own covariance where the analysis reads that of all rows."""
    stages: list[TensorDictModuleBase] = []
    if {"spectrum", "sample"} & set(settings.families):
        stages.append(SampleSpectrum(in_keys=["sample"]))
    if "spectrum" in settings.families:
        stages.append(SpectrumMetrics(in_keys=["sample_eigenvalues"]))
    if "sample" in settings.families:
        stages.append(SampleMetrics())
    stages += [
        copy.deepcopy(stage)
        for stage in settings.stages
        if isinstance(stage, DimensionStage)
        and list(stage.in_keys) == ["sample"]
        and not isinstance(stage, Gride)
    ]
    if not stages:
        raise ValueError(
            "analyze_model: convergence= asks how metrics of one site change with the rows, but none is asked for. Add "
            "metrics=['spectrum', 'sample'] or a dimension by name."
        )
    return TensorDictSequential(*stages)
