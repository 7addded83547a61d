"""Intrinsic dimension: how many coordinates a set of rows needs, at which scale, and how sure that is."""

from tdgeom.dimension._estimate import DimensionEstimate
from tdgeom.dimension.gride import Gride, gride, gride_from_distances
from tdgeom.dimension.twonn import TwoNN, twonn, twonn_curve, twonn_from_distances

__all__ = [
    "DimensionEstimate",
    "Gride",
    "TwoNN",
    "gride",
    "gride_from_distances",
    "twonn",
    "twonn_curve",
    "twonn_from_distances",
]
