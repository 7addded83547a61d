"""tdgeom: the geometry of neural representations, measured by TensorDict modules that compose."""

import sys

from tdgeom import functional, plot
from tdgeom.analysis.analysis_settings import AnalysisSettings
from tdgeom.analysis.analyze_model import analyze_model
from tdgeom.analysis.compare import compare
from tdgeom.analysis.comparison import Comparison
from tdgeom.analysis.default_pipeline import analysis_pipeline
from tdgeom.analysis.results import AnalysisResults
from tdgeom.cli import demo
from tdgeom.concepts.bases import ConceptBasis, FisherBasis
from tdgeom.concepts.coordinates import Interpolate, Project, Reconstruct
from tdgeom.concepts.erasure import LEACE, Erase
from tdgeom.core.for_each import ForEach
from tdgeom.core.for_each_pair import ForEachPair
from tdgeom.core.pair_stage import PairStage
from tdgeom.core.pipeline import Pipeline, merge_, reset, sync_
from tdgeom.core.stage import Stage
from tdgeom.core.streaming_stage import StreamingStage
from tdgeom.core.warnings import FewRowsWarning, UndefinedMeasureWarning, UnresolvedMeasureWarning
from tdgeom.measures.dimension.ca_pca import CAPCA
from tdgeom.measures.dimension.decimation import Decimation
from tdgeom.measures.dimension.gride import Gride
from tdgeom.measures.dimension.likelihood import MOM, LevinaBickel
from tdgeom.measures.dimension.local import LocalKNN, LocalPCA
from tdgeom.measures.dimension.pca import GlobalPCA, ParticipationRatio
from tdgeom.measures.dimension.tle import TLE
from tdgeom.measures.dimension.twonn import TwoNN
from tdgeom.measures.eigen_spectrum import EigenSpectrum
from tdgeom.measures.neighbors.foreign_tables import neighbors_from
from tdgeom.measures.neighbors.information_imbalance import InformationImbalance
from tdgeom.measures.neighbors.label_overlap import LabelOverlap
from tdgeom.measures.neighbors.nearest_neighbors import NearestNeighbors
from tdgeom.measures.neighbors.neighborhood_overlap import JaccardKNN, NeighborhoodOverlap
from tdgeom.measures.normalization import NormalizationAblation
from tdgeom.measures.router import RouterLoad
from tdgeom.measures.sample_metrics import SampleMetrics, SampleSpectrum
from tdgeom.measures.similarity.cca import CCA, PWCCA, SVCCA
from tdgeom.measures.similarity.cknna import CKNNA
from tdgeom.measures.similarity.kernel_alignment import RBFCKA, DistanceCorrelation
from tdgeom.measures.similarity.linear_cka import RV, LinearCKA
from tdgeom.measures.similarity.linear_r2 import LinearR2
from tdgeom.measures.similarity.matching import SoftMatching
from tdgeom.measures.similarity.procrustes import Procrustes
from tdgeom.measures.similarity.rsa import RSA
from tdgeom.measures.similarity.subspace import LayerCosine, SubspaceNovelty
from tdgeom.measures.spectrum_metrics import RankMe, SpectrumMetrics
from tdgeom.model.aggregate import AggregateActs, GroupAttention
from tdgeom.model.calls.checked_sites import available_sites
from tdgeom.model.calls.hidden_states import hidden_state_sites
from tdgeom.model.capture import Capture
from tdgeom.model.capture_spec import CaptureSpec
from tdgeom.model.edits.ablate import Ablate
from tdgeom.model.edits.attention_edits import BlockAttention
from tdgeom.model.edits.edit import Edit, ProjectOnto, ProjectOut, Scale, Steer
from tdgeom.model.edits.other_runs import ActivationAddition, Patch
from tdgeom.model.intervene import Intervene
from tdgeom.model.lens.logit_lens import LogitLens, logit_lens
from tdgeom.model.lens.tuned_lens import TunedLens
from tdgeom.model.patching import activation_patching
from tdgeom.model.positions import Between, RandomPositions, SpecialTokens
from tdgeom.model.sites import Site
from tdgeom.model.untrained import untrained_copy
from tdgeom.model.verification.verify_sites import verify_sites
from tdgeom.plot.attention_view import AttentionView, attention_view
from tdgeom.probing.bilinear import BilinearProbe, LowRankBilinearProbe
from tdgeom.probing.estimators import SklearnProbe, TorchProbe
from tdgeom.probing.label_moments import StreamingLabelMoments
from tdgeom.probing.linear import LinearProbe
from tdgeom.probing.mean_difference import MeanDifferenceProbe
from tdgeom.probing.predict import ProbePredict, ProbeScore
from tdgeom.probing.probe import Probe
from tdgeom.probing.probing import Probing
from tdgeom.rows import text
from tdgeom.rows.select_tokens import SelectTokens
from tdgeom.rows.token_context import ContextWindow
from tdgeom.run.profiles import intrinsic_dimension_profile, overlap_profile
from tdgeom.run.run import run
from tdgeom.run.to_frame import to_frame
from tdgeom.store.activation_store import ActivationStore
from tdgeom.store.runs import Runs
from tdgeom.store.store_activations import StoreActivations
from tdgeom.stream.collect import Collect
from tdgeom.stream.covariance import StreamingCovariance
from tdgeom.stream.cross_moments import StreamingCrossMoments
from tdgeom.stream.exemplars import MaxActivating, describe_exemplars
from tdgeom.stream.mean import StreamingMean
from tdgeom.stream.row_sample import RowSample
from tdgeom.stream.sketch import StreamingSketch

__version__ = "0.1.0"

# The room of rows and that of the command line hold these two; their short names are documented and stay importable.
sys.modules |= {f"{__name__}.text": text, f"{__name__}.demo": demo}

__all__ = [
    # the spine
    "Stage",
    "PairStage",
    "StreamingStage",
    "ForEach",
    "ForEachPair",
    "Pipeline",
    "merge_",
    "reset",
    "sync_",
    "run",
    "to_frame",
    # the whole analysis
    "analyze_model",
    "compare",
    "Comparison",
    "analysis_pipeline",
    "AnalysisSettings",
    "AnalysisResults",
    # around the model
    "Capture",
    "Site",
    "available_sites",
    "hidden_state_sites",
    "verify_sites",
    "SelectTokens",
    # edits of the model
    "Intervene",
    "Edit",
    "Steer",
    "ActivationAddition",
    "Patch",
    "Ablate",
    "ProjectOut",
    "ProjectOnto",
    "Scale",
    "BlockAttention",
    "activation_patching",
    # captures kept small
    "CaptureSpec",
    "AggregateActs",
    "GroupAttention",
    # readings of the stream
    "LogitLens",
    "TunedLens",
    "logit_lens",
    "ContextWindow",
    "MaxActivating",
    "describe_exemplars",
    "AttentionView",
    "attention_view",
    # positions
    "Between",
    "SpecialTokens",
    "RandomPositions",
    # streams
    "StreamingCovariance",
    "StreamingCrossMoments",
    "StreamingSketch",
    "StreamingMean",
    "RowSample",
    "Collect",
    # measures of one site
    "EigenSpectrum",
    "SpectrumMetrics",
    "RankMe",
    "SampleMetrics",
    "SampleSpectrum",
    "NormalizationAblation",
    "RouterLoad",
    # measures between sites
    "LinearCKA",
    "RV",
    "SubspaceNovelty",
    "LayerCosine",
    "CCA",
    "SVCCA",
    "PWCCA",
    "Procrustes",
    "LinearR2",
    "RBFCKA",
    "RSA",
    "CKNNA",
    "DistanceCorrelation",
    "SoftMatching",
    # neighbourhoods
    "NearestNeighbors",
    "neighbors_from",
    "NeighborhoodOverlap",
    "JaccardKNN",
    "LabelOverlap",
    "InformationImbalance",
    # intrinsic dimension
    "TwoNN",
    "Gride",
    "LevinaBickel",
    "MOM",
    "TLE",
    "LocalKNN",
    "LocalPCA",
    "GlobalPCA",
    "CAPCA",
    "ParticipationRatio",
    "Decimation",
    # profiles over layers, and what they are compared with
    "intrinsic_dimension_profile",
    "overlap_profile",
    "untrained_copy",
    # probes
    "Probing",
    "Probe",
    "LinearProbe",
    "MeanDifferenceProbe",
    "SklearnProbe",
    "TorchProbe",
    "BilinearProbe",
    "LowRankBilinearProbe",
    "ProbePredict",
    "ProbeScore",
    "StreamingLabelMoments",
    # concepts
    "ConceptBasis",
    "FisherBasis",
    "Project",
    "Reconstruct",
    "Interpolate",
    "LEACE",
    "Erase",
    # keeping activations and runs
    "ActivationStore",
    "Runs",
    "StoreActivations",
    # the rest
    "UndefinedMeasureWarning",
    "FewRowsWarning",
    "UnresolvedMeasureWarning",
    "functional",
    "plot",
]
