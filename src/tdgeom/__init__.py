"""tdgeom: the geometry of neural representations, measured by TensorDict modules that compose."""

from tdgeom import functional
from tdgeom._warnings import UndefinedMeasureWarning
from tdgeom.ablation import NormalizationAblation
from tdgeom.analyze import analysis_pipeline, analyze_model
from tdgeom.compose import ForEach, ForEachPair
from tdgeom.frames import to_frame
from tdgeom.hooks import Capture, Site, available_sites
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
from tdgeom.results import AnalysisResults
from tdgeom.router import RouterLoad
from tdgeom.run import run
from tdgeom.sample_metrics import SampleMetrics, SampleSpectrum
from tdgeom.similarity import RV, LayerCosine, LinearCKA, SubspaceNovelty
from tdgeom.spectrum import EigenSpectrum, RankMe, SpectrumMetrics
from tdgeom.stage import PairStage, Stage, StreamingStage
from tdgeom.stream.collect import Collect
from tdgeom.stream.covariance import StreamingCovariance
from tdgeom.stream.mean import StreamingMean
from tdgeom.stream.sample import RowSample
from tdgeom.tokens import SelectTokens

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
    "analysis_pipeline",
    "AnalysisResults",
    # around the model
    "Capture",
    "Site",
    "available_sites",
    "SelectTokens",
    # streams
    "StreamingCovariance",
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
    # the rest
    "UndefinedMeasureWarning",
    "functional",
]
