"""Probes: what is linearly (or not) in a representation."""

from tdgeom.probing.base import Probe
from tdgeom.probing.bilinear import BilinearProbe, LowRankBilinearProbe
from tdgeom.probing.estimators import SklearnProbe, TorchProbe
from tdgeom.probing.linear import LinearProbe
from tdgeom.probing.mean_difference import MeanDifferenceProbe
from tdgeom.probing.moments import StreamingLabelMoments
from tdgeom.probing.predict import ProbePredict, ProbeScore
from tdgeom.probing.probing import Probing

__all__ = [
    "BilinearProbe",
    "LinearProbe",
    "LowRankBilinearProbe",
    "MeanDifferenceProbe",
    "Probe",
    "ProbePredict",
    "ProbeScore",
    "Probing",
    "SklearnProbe",
    "StreamingLabelMoments",
    "TorchProbe",
]
