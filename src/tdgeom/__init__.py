"""tdgeom: the geometry of neural representations, measured by TensorDict modules that compose."""

from tdgeom import functional, plot
from tdgeom._warnings import UndefinedMeasureWarning
from tdgeom.ablation import NormalizationAblation
from tdgeom.analyze import analysis_pipeline, analyze_model
from tdgeom.attention_view import AttentionView, attention_view
from tdgeom.comparison import Comparison, compare
from tdgeom.compose import ForEach, ForEachPair
from tdgeom.concepts import LEACE, ConceptBasis, Erase, FisherBasis, Interpolate, Project, Reconstruct
from tdgeom.dimension import (
    CAPCA,
    MOM,
    TLE,
    Decimation,
    GlobalPCA,
    Gride,
    LevinaBickel,
    LocalKNN,
    LocalPCA,
    ParticipationRatio,
    TwoNN,
)
from tdgeom.exemplars import ContextWindow, MaxActivating, describe_exemplars
from tdgeom.frames import to_frame
from tdgeom.hooks import (
    Ablate,
    ActivationAddition,
    AggregateActs,
    Between,
    BlockAttention,
    Capture,
    CaptureSpec,
    Edit,
    GroupAttention,
    Intervene,
    Patch,
    ProjectOnto,
    ProjectOut,
    RandomPositions,
    Scale,
    Site,
    SpecialTokens,
    Steer,
    available_sites,
    hidden_state_sites,
)
from tdgeom.lens import LogitLens, logit_lens
from tdgeom.neighbors import (
    InformationImbalance,
    JaccardKNN,
    LabelOverlap,
    NearestNeighbors,
    NeighborhoodOverlap,
)
from tdgeom.patching import activation_patching
from tdgeom.probing import (
    BilinearProbe,
    LinearProbe,
    LowRankBilinearProbe,
    MeanDifferenceProbe,
    Probe,
    ProbePredict,
    ProbeScore,
    Probing,
    SklearnProbe,
    StreamingLabelMoments,
    TorchProbe,
)
from tdgeom.profiles import intrinsic_dimension_profile, overlap_profile
from tdgeom.results import AnalysisResults
from tdgeom.router import RouterLoad
from tdgeom.run import run
from tdgeom.sample_metrics import SampleMetrics, SampleSpectrum
from tdgeom.similarity import (
    CCA,
    CKNNA,
    PWCCA,
    RBFCKA,
    RSA,
    RV,
    SVCCA,
    DistanceCorrelation,
    LayerCosine,
    LinearCKA,
    LinearR2,
    Procrustes,
    SoftMatching,
    SubspaceNovelty,
)
from tdgeom.spectrum import EigenSpectrum, RankMe, SpectrumMetrics
from tdgeom.stage import PairStage, Stage
from tdgeom.store import ActivationStore, Runs, StoreActivations
from tdgeom.stream.collect import Collect
from tdgeom.stream.covariance import StreamingCovariance
from tdgeom.stream.cross import StreamingCrossMoments
from tdgeom.stream.mean import StreamingMean
from tdgeom.stream.sample import RowSample
from tdgeom.stream.sketch import StreamingSketch
from tdgeom.streaming import StreamingStage
from tdgeom.tokens import SelectTokens
from tdgeom.tuned_lens import TunedLens
from tdgeom.untrained import untrained_copy

__version__ = "0.1.0"

__all__ = [
    # the spine
    "Stage",
    "PairStage",
    "StreamingStage",
    "ForEach",
    "ForEachPair",
    "run",
    "to_frame",
    # the whole analysis
    "analyze_model",
    "compare",
    "Comparison",
    "analysis_pipeline",
    "AnalysisResults",
    # around the model
    "Capture",
    "Site",
    "available_sites",
    "hidden_state_sites",
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
    "functional",
    "plot",
]
