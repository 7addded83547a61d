"""Similarity between the representations of two sites."""

from tdgeom.similarity.cca import CCA, PWCCA, SVCCA, cca_mean, cca_r2, pwcca_ab, pwcca_ba, svcca
from tdgeom.similarity.cka import RV, LinearCKA, linear_cka, linear_cka_debiased, rv_coefficient
from tdgeom.similarity.cknna import CKNNA, cknna
from tdgeom.similarity.kernel import RBFCKA, DistanceCorrelation, distance_correlation, rbf_cka
from tdgeom.similarity.matching import SoftMatching, soft_matching
from tdgeom.similarity.procrustes import Procrustes, angular_shape, procrustes
from tdgeom.similarity.regression import LinearR2, linear_r2_ab, linear_r2_ba
from tdgeom.similarity.rsa import RSA, rdm, rsa
from tdgeom.similarity.subspace import (
    LayerCosine,
    SubspaceNovelty,
    feature_subspace_novelty,
    layer_cosine_sim,
)

__all__ = [
    "CCA", "CKNNA", "PWCCA", "RBFCKA", "RSA", "RV", "SVCCA", "DistanceCorrelation", "LayerCosine", "LinearCKA",
    "LinearR2", "Procrustes", "SoftMatching", "SubspaceNovelty",
    "angular_shape", "cca_mean", "cca_r2", "cknna", "distance_correlation", "feature_subspace_novelty",
    "layer_cosine_sim", "linear_cka", "linear_cka_debiased", "linear_r2_ab", "linear_r2_ba", "procrustes", "pwcca_ab",
    "pwcca_ba", "rbf_cka", "rdm", "rsa", "rv_coefficient", "soft_matching", "svcca",
]  # fmt: skip
