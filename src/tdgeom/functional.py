"""The pure functions behind the stages: tensors in, tensors out, batched over leading dimensions."""

from tdgeom.ablation import normalized
from tdgeom.probing.bilinear import bilinear_ridge
from tdgeom.probing.closed_form import (
    class_means,
    fold_errors,
    lda_probe,
    mean_difference,
    ridge_loo,
    ridge_probe,
    within_scatter,
)
from tdgeom.probing.control import control_labels
from tdgeom.probing.linear import logistic_probe
from tdgeom.probing.moments import label_moments, pool_folds
from tdgeom.probing.predict import linear_decision
from tdgeom.probing.scores import clustered_error, permutation_null, probe_scores
from tdgeom.probing.splits import fold_index, holdout_mask, row_groups
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
    "bilinear_ridge",
    "class_means",
    "clustered_error",
    "control_labels",
    "cosine_similarity",
    "covariance",
    "eigen_spectrum",
    "entropy_dimension",
    "feature_subspace_novelty",
    "fold_errors",
    "fold_index",
    "hash_ids",
    "holdout_mask",
    "label_moments",
    "layer_cosine_sim",
    "lda_probe",
    "linear_cka",
    "linear_cka_debiased",
    "linear_decision",
    "log_spectrum_slope",
    "logistic_probe",
    "mean_difference",
    "normalized",
    "permutation_null",
    "pool_folds",
    "probe_scores",
    "rankme",
    "ridge_loo",
    "ridge_probe",
    "router_load",
    "row_groups",
    "rv_coefficient",
    "sample_eigenvalues",
    "sample_metrics",
    "selection_mask",
    "spectrum_metrics",
    "within_scatter",
]
