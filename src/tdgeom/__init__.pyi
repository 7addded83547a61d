# The public names, grouped by theme: type checkers read them here, and __init__.py loads each when it is first asked for.
# A new name gets one line here and none elsewhere: from .ROOM.FILE import NAME as NAME

import tdgeom.cli.demo
import tdgeom.rows.text

__version__: str

# the spine
from .core.stage import Stage as Stage
from .core.pair_stage import PairStage as PairStage
from .core.streaming_stage import StreamingStage as StreamingStage
from .core.for_each import ForEach as ForEach
from .core.for_each_pair import ForEachPair as ForEachPair
from .core.pipeline import Pipeline as Pipeline
from .core.pipeline import merge_ as merge_
from .core.pipeline import reset as reset
from .core.pipeline import sync_ as sync_
from .run.checkpoint import checkpoints_kept as checkpoints_kept
from .run.run import run as run
from .run.to_frame import to_frame as to_frame

# the whole analysis
from .analysis.analyze_model import analyze_model as analyze_model
from .analysis.compare import compare as compare
from .analysis.comparison import Comparison as Comparison
from .analysis.default_pipeline import analysis_pipeline as analysis_pipeline
from .analysis.analysis_settings import AnalysisSettings as AnalysisSettings
from .analysis.results import AnalysisResults as AnalysisResults
from .analysis.reports import write_report as write_report
from .analysis.saving import NotSavedError as NotSavedError
from .analysis.saved_results import load_results as load_results
from .analysis.merge_states import merge_states as merge_states
from .analysis.saved_results import save_results as save_results
from .analysis.exports import to_xarray as to_xarray

# around the model
from .model.capture import Capture as Capture
from .model.sites import Site as Site
from .model.calls.checked_sites import available_sites as available_sites
from .model.calls.hidden_states import hidden_state_sites as hidden_state_sites
from .model.verification.verify_sites import verify_sites as verify_sites
from .rows.select_tokens import SelectTokens as SelectTokens

# edits of the model
from .model.intervene import Intervene as Intervene
from .model.edits.edit import Edit as Edit
from .model.edits.edit import Steer as Steer
from .model.edits.other_runs import ActivationAddition as ActivationAddition
from .model.edits.other_runs import Patch as Patch
from .model.edits.ablate import Ablate as Ablate
from .model.edits.directions import ProjectOut as ProjectOut
from .model.edits.directions import ProjectOnto as ProjectOnto
from .model.edits.edit import Scale as Scale
from .model.edits.attention_edits import BlockAttention as BlockAttention
from .model.patching.activation_patching import activation_patching as activation_patching
from .model.patching.path_patch import PathPatch as PathPatch
from .model.patching.path_patching import path_patching as path_patching
from .model.patching.attribution_patching import attribution_patching as attribution_patching

# captures kept small
from .model.capture_spec import CaptureSpec as CaptureSpec
from .model.aggregate import AggregateActs as AggregateActs
from .model.aggregate import GroupAttention as GroupAttention

# readings of the stream
from .model.lens.logit_lens import LogitLens as LogitLens
from .model.lens.tuned_lens import TunedLens as TunedLens
from .model.lens.logit_lens import logit_lens as logit_lens
from .analysis.logit_attribution import logit_attribution as logit_attribution
from .rows.token_context import ContextWindow as ContextWindow
from .stream.exemplars import MaxActivating as MaxActivating
from .stream.exemplars import describe_exemplars as describe_exemplars
from .plot.attention_view import AttentionView as AttentionView
from .plot.attention_view import attention_view as attention_view

# positions
from .model.positions import Between as Between
from .model.positions import SpecialTokens as SpecialTokens
from .model.positions import RandomPositions as RandomPositions
from .model.positions import partition as partition

# streams
from .stream.covariance import StreamingCovariance as StreamingCovariance
from .stream.cross_moments import StreamingCrossMoments as StreamingCrossMoments
from .stream.sketch import StreamingSketch as StreamingSketch
from .stream.mean import StreamingMean as StreamingMean
from .stream.row_sample import RowSample as RowSample
from .stream.collect import Collect as Collect

# measures of one site
from .measures.eigen_spectrum import EigenSpectrum as EigenSpectrum
from .measures.spectrum_metrics import SpectrumMetrics as SpectrumMetrics
from .measures.spectrum_metrics import RankMe as RankMe
from .measures.sample_metrics import SampleMetrics as SampleMetrics
from .measures.sample_metrics import SampleSpectrum as SampleSpectrum
from .measures.normalization import NormalizationAblation as NormalizationAblation
from .measures.router import RouterLoad as RouterLoad
from .measures.shrinkage import ShrunkCovariance as ShrunkCovariance
from .measures.significance.noise_rank import NoiseRank as NoiseRank

# measures between sites
from .measures.similarity.linear_cka import LinearCKA as LinearCKA
from .measures.similarity.linear_cka import RV as RV
from .measures.similarity.subspace import SubspaceNovelty as SubspaceNovelty
from .measures.similarity.subspace import LayerCosine as LayerCosine
from .measures.similarity.cca import CCA as CCA
from .measures.similarity.cca import SVCCA as SVCCA
from .measures.similarity.cca import PWCCA as PWCCA
from .measures.similarity.procrustes import Procrustes as Procrustes
from .measures.similarity.linear_r2 import LinearR2 as LinearR2
from .measures.similarity.kernel_alignment import RBFCKA as RBFCKA
from .measures.similarity.rsa import RSA as RSA
from .measures.similarity.cknna import CKNNA as CKNNA
from .measures.similarity.kernel_alignment import DistanceCorrelation as DistanceCorrelation
from .measures.similarity.matching import SoftMatching as SoftMatching
from .measures.similarity.sampled_cka import SampledCKA as SampledCKA

# what similarity is by chance
from .measures.significance.cka_null import CKANull as CKANull
from .measures.significance.calibrated import Calibrated as Calibrated

# has a number settled
from .measures.significance.convergence import Convergence as Convergence
from .run.curves import convergence as convergence
from .analysis.beyond_errors import difference as difference
from .analysis.intervals import intervals as intervals
from .run.curves import rows_needed as rows_needed

# neighbourhoods
from .measures.neighbors.nearest_neighbors import NearestNeighbors as NearestNeighbors
from .measures.neighbors.foreign_tables import neighbors_from as neighbors_from
from .measures.neighbors.neighborhood_overlap import NeighborhoodOverlap as NeighborhoodOverlap
from .measures.neighbors.neighborhood_overlap import JaccardKNN as JaccardKNN
from .measures.neighbors.label_overlap import LabelOverlap as LabelOverlap
from .measures.neighbors.information_imbalance import InformationImbalance as InformationImbalance

# intrinsic dimension
from .measures.dimension.twonn import TwoNN as TwoNN
from .measures.dimension.gride import Gride as Gride
from .measures.dimension.likelihood import LevinaBickel as LevinaBickel
from .measures.dimension.likelihood import MOM as MOM
from .measures.dimension.tle import TLE as TLE
from .measures.dimension.local import LocalKNN as LocalKNN
from .measures.dimension.local import LocalPCA as LocalPCA
from .measures.dimension.pca import GlobalPCA as GlobalPCA
from .measures.dimension.ca_pca import CAPCA as CAPCA
from .measures.dimension.pca import ParticipationRatio as ParticipationRatio
from .measures.dimension.decimation import Decimation as Decimation

# standard errors
from .stream.replicates import Replicates as Replicates
from .stream.grouped_covariance import GroupedCovariance as GroupedCovariance
from .measures.leave_out import SampleGroups as SampleGroups
from .measures.leave_out import LeaveOut as LeaveOut
from .measures.leave_out import LeaveOutPair as LeaveOutPair
from .measures.leave_out_spectrum import LeaveOutSpectrum as LeaveOutSpectrum
from .measures.spectrum_errors import SpectrumErrors as SpectrumErrors
from .measures.jackknife import Jackknife as Jackknife

# profiles over layers, and what they are compared with
from .run.profiles import intrinsic_dimension_profile as intrinsic_dimension_profile
from .run.profiles import overlap_profile as overlap_profile
from .model.untrained import untrained_copy as untrained_copy

# probes
from .probing.probing import Probing as Probing
from .probing.probe import Probe as Probe
from .probing.linear import LinearProbe as LinearProbe
from .probing.mean_difference import MeanDifferenceProbe as MeanDifferenceProbe
from .probing.estimators import SklearnProbe as SklearnProbe
from .probing.estimators import TorchProbe as TorchProbe
from .probing.bilinear import BilinearProbe as BilinearProbe
from .probing.bilinear import LowRankBilinearProbe as LowRankBilinearProbe
from .probing.predict import ProbePredict as ProbePredict
from .probing.predict import ProbeScore as ProbeScore
from .probing.label_moments import StreamingLabelMoments as StreamingLabelMoments

# concepts
from .concepts.bases import ConceptBasis as ConceptBasis
from .concepts.bases import FisherBasis as FisherBasis
from .concepts.coordinates import Project as Project
from .concepts.coordinates import Reconstruct as Reconstruct
from .concepts.coordinates import Interpolate as Interpolate
from .concepts.erasure import LEACE as LEACE
from .concepts.erasure import Erase as Erase

# over training
from .training.geometry_watch import GeometryWatch as GeometryWatch
from .training.geometry_callback import GeometryCallback as GeometryCallback
from .training.lightning_callback import lightning_callback as lightning_callback
from .training.sweep import sweep as sweep
from .training.sweep_results import Sweep as Sweep
from .training.schedule import log_spaced_steps as log_spaced_steps
from .training.stage_metric import as_metric as as_metric
from .training.geometry_card import GeometryCard as GeometryCard
from .training.geometry_card import geometry_card as geometry_card
from .training.alarms import Alarm as Alarm
from .training.alarms import AlarmRule as AlarmRule
from .training.alarms import ChangeAlarms as ChangeAlarms

# keeping activations and runs
from .store.activation_store import ActivationStore as ActivationStore
from .store.runs import Runs as Runs
from .store.store_activations import StoreActivations as StoreActivations

# the rest
from .core.warnings import UndefinedMeasureWarning as UndefinedMeasureWarning
from .core.warnings import FewRowsWarning as FewRowsWarning
from .core.warnings import UnresolvedMeasureWarning as UnresolvedMeasureWarning
from .core.rank_failures import RankFailed as RankFailed
from .core.one_rank import alone as alone
from . import functional as functional
from . import plot as plot

# short names of two files, documented and importable (tdgeom.text, tdgeom.demo)
text = tdgeom.rows.text
demo = tdgeom.cli.demo
