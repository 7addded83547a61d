"""Intrinsic dimension: how many coordinates a set of rows needs, at which scale, and how sure that is."""

from tdgeom.dimension._estimate import DimensionEstimate, DimensionStage
from tdgeom.dimension.ca_pca import CAPCA, ca_pca, ca_pca_dimension
from tdgeom.dimension.decimation import Decimation
from tdgeom.dimension.gride import Gride, gride, gride_from_distances
from tdgeom.dimension.likelihood import (
    MOM,
    LevinaBickel,
    levina_bickel,
    levina_bickel_from_distances,
    mom,
    mom_from_distances,
)
from tdgeom.dimension.local import (
    LocalKNN,
    LocalPCA,
    local_knn,
    local_knn_from_distances,
    local_pca,
)
from tdgeom.dimension.pca import GlobalPCA, ParticipationRatio, global_pca, participation_ratio, pca_dimension
from tdgeom.dimension.tle import TLE, tle, tle_from_neighbors
from tdgeom.dimension.twonn import TwoNN, twonn, twonn_curve, twonn_from_distances

__all__ = [
    "CAPCA",
    "MOM",
    "TLE",
    "Decimation",
    "DimensionEstimate",
    "DimensionStage",
    "GlobalPCA",
    "Gride",
    "LevinaBickel",
    "LocalKNN",
    "LocalPCA",
    "ParticipationRatio",
    "TwoNN",
    "ca_pca",
    "ca_pca_dimension",
    "global_pca",
    "gride",
    "gride_from_distances",
    "levina_bickel",
    "levina_bickel_from_distances",
    "local_knn",
    "local_knn_from_distances",
    "local_pca",
    "mom",
    "mom_from_distances",
    "participation_ratio",
    "pca_dimension",
    "tle",
    "tle_from_neighbors",
    "twonn",
    "twonn_curve",
    "twonn_from_distances",
]
