"""The pure functions behind the stages: tensors in, tensors out, batched over leading dimensions."""

from tdgeom.ablation import normalized
from tdgeom.router import router_load
from tdgeom.sample_metrics import cosine_similarity, sample_eigenvalues, sample_metrics
from tdgeom.similarity import (
    feature_subspace_novelty,
    layer_cosine_sim,
    linear_cka,
    linear_cka_debiased,
    rv_coefficient,
)
from tdgeom.spectrum import (
    alpha_req,
    eigen_spectrum,
    entropy_dimension,
    log_spectrum_slope,
    rankme,
    spectrum_metrics,
)
from tdgeom.stream.covariance import covariance
from tdgeom.stream.sample import hash_ids
from tdgeom.tokens import selection_mask

__all__ = [
    "alpha_req",
    "cosine_similarity",
    "covariance",
    "eigen_spectrum",
    "entropy_dimension",
    "feature_subspace_novelty",
    "hash_ids",
    "layer_cosine_sim",
    "linear_cka",
    "linear_cka_debiased",
    "log_spectrum_slope",
    "normalized",
    "rankme",
    "router_load",
    "rv_coefficient",
    "sample_eigenvalues",
    "sample_metrics",
    "selection_mask",
    "spectrum_metrics",
]
