"""Similarity between the representations of two sites."""

from tdgeom.similarity.cka import RV, LinearCKA, linear_cka, linear_cka_debiased, rv_coefficient
from tdgeom.similarity.subspace import (
    LayerCosine,
    SubspaceNovelty,
    feature_subspace_novelty,
    layer_cosine_sim,
)

__all__ = [
    "RV", "LayerCosine", "LinearCKA", "SubspaceNovelty", "feature_subspace_novelty", "layer_cosine_sim",
    "linear_cka", "linear_cka_debiased", "rv_coefficient",
]
