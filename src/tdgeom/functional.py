"""The pure functions behind the stages: tensors in, tensors out, batched over leading dimensions.

NumPy arrays, pandas tables, lists of numbers and whatever else ``numpy.asarray`` makes an array of are taken in place of a
tensor, as stages take them; tensors come out (``float(value)``, ``value.numpy()``).
"""

from tdgeom.concepts.bases import concept_basis, fisher_basis
from tdgeom.concepts.coordinates import interpolate, project, reconstruct
from tdgeom.concepts.erasure import erase, leace
from tdgeom.measures.dimension.ca_pca import ca_pca, ca_pca_dimension
from tdgeom.measures.dimension.gride import gride, gride_from_distances
from tdgeom.measures.dimension.likelihood import (
    levina_bickel,
    levina_bickel_from_distances,
    mom,
    mom_from_distances,
)
from tdgeom.measures.dimension.local import local_knn, local_knn_from_distances, local_pca
from tdgeom.measures.dimension.pca import global_pca, participation_ratio, pca_dimension
from tdgeom.measures.dimension.tle import tle, tle_from_neighbors
from tdgeom.measures.dimension.twonn import twonn, twonn_curve, twonn_from_distances
from tdgeom.measures.eigen_spectrum import eigen_spectrum
from tdgeom.measures.jackknife import error_interval, group_jackknife
from tdgeom.measures.neighbors.approximate import approximate_neighbors
from tdgeom.measures.neighbors.information_imbalance import conditional_ranks, information_imbalance
from tdgeom.measures.neighbors.label_overlap import label_overlap, label_overlap_of
from tdgeom.measures.neighbors.nearest_neighbors import distinct_neighbors, nearest_neighbors
from tdgeom.measures.neighbors.neighborhood_overlap import common_neighbors, jaccard_knn, neighborhood_overlap
from tdgeom.measures.normalization import normalized
from tdgeom.measures.router import router_load
from tdgeom.measures.sample_metrics import cosine_similarity, sample_eigenvalues, sample_metrics
from tdgeom.measures.shrinkage import ledoit_wolf, oracle_approximating
from tdgeom.measures.significance.calibrated import joint_p_values, shuffled_null
from tdgeom.measures.significance.cka_null import linear_cka_null
from tdgeom.measures.significance.convergence import rows_to_settle, settling
from tdgeom.measures.significance.documents import document_shuffles
from tdgeom.measures.significance.many_tests import adjusted_p_values
from tdgeom.measures.significance.noise_rank import noise_rank
from tdgeom.measures.significance.rotation_null import rotated_null
from tdgeom.measures.similarity.cca import cca_mean, cca_r2, pwcca_ab, pwcca_ba, svcca
from tdgeom.measures.similarity.cknna import cknna
from tdgeom.measures.similarity.held_out import procrustes_bounds, subspace_overlap_corrected
from tdgeom.measures.similarity.kernel_alignment import distance_correlation, rbf_cka
from tdgeom.measures.similarity.linear_cka import linear_cka, linear_cka_debiased, rv_coefficient
from tdgeom.measures.similarity.linear_r2 import linear_r2_ab, linear_r2_ba
from tdgeom.measures.similarity.matching import soft_matching
from tdgeom.measures.similarity.procrustes import angular_shape, procrustes
from tdgeom.measures.similarity.rsa import rdm, rsa
from tdgeom.measures.similarity.sampled_cka import linear_cka_sampled_error
from tdgeom.measures.similarity.sampled_features import linear_cka_sampled, participation_ratio_sampled
from tdgeom.measures.similarity.subspace import feature_subspace_novelty, layer_cosine_sim
from tdgeom.measures.spectrum_errors import components_interpolated
from tdgeom.measures.spectrum_metrics import (
    alpha_req,
    entropy_dimension,
    log_spectrum_slope,
    rankme,
    spectrum_metrics,
)
from tdgeom.model.aggregate import aggregate_positions, group_attention
from tdgeom.model.lens.logit_lens import lens_measures
from tdgeom.model.positions import position_mask
from tdgeom.numerics.array_arguments import taking_arrays
from tdgeom.numerics.hashing import hash_ids
from tdgeom.numerics.logit_metrics import kl_divergence, logit_diff, token_probability
from tdgeom.numerics.numerical_rank import numerical_rank
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
from tdgeom.probing.control_task import control_labels
from tdgeom.probing.label_moments import label_moments, pool_folds
from tdgeom.probing.linear import logistic_probe
from tdgeom.probing.predict import linear_decision
from tdgeom.probing.scores import clustered_error, permutation_null, probe_scores
from tdgeom.probing.splits import fold_index, holdout_mask, row_groups
from tdgeom.rows.select_tokens import selection_mask
from tdgeom.rows.token_context import token_context
from tdgeom.stream.covariance import covariance
from tdgeom.stream.exemplars import top_activating, top_rows

__all__ = [
    "adjusted_p_values",
    "aggregate_positions",
    "alpha_req",
    "angular_shape",
    "approximate_neighbors",
    "bilinear_ridge",
    "ca_pca",
    "ca_pca_dimension",
    "cca_mean",
    "cca_r2",
    "cknna",
    "class_means",
    "clustered_error",
    "common_neighbors",
    "components_interpolated",
    "concept_basis",
    "conditional_ranks",
    "control_labels",
    "cosine_similarity",
    "covariance",
    "distance_correlation",
    "distinct_neighbors",
    "document_shuffles",
    "eigen_spectrum",
    "entropy_dimension",
    "erase",
    "error_interval",
    "feature_subspace_novelty",
    "fisher_basis",
    "fold_errors",
    "fold_index",
    "global_pca",
    "gride",
    "gride_from_distances",
    "group_attention",
    "group_jackknife",
    "hash_ids",
    "holdout_mask",
    "information_imbalance",
    "interpolate",
    "jaccard_knn",
    "joint_p_values",
    "kl_divergence",
    "label_moments",
    "label_overlap",
    "label_overlap_of",
    "layer_cosine_sim",
    "lda_probe",
    "leace",
    "ledoit_wolf",
    "lens_measures",
    "levina_bickel",
    "levina_bickel_from_distances",
    "linear_cka",
    "linear_cka_debiased",
    "linear_cka_null",
    "linear_cka_sampled",
    "linear_cka_sampled_error",
    "linear_decision",
    "linear_r2_ab",
    "linear_r2_ba",
    "local_knn",
    "local_knn_from_distances",
    "local_pca",
    "log_spectrum_slope",
    "logistic_probe",
    "logit_diff",
    "mean_difference",
    "mom",
    "mom_from_distances",
    "nearest_neighbors",
    "neighborhood_overlap",
    "noise_rank",
    "normalized",
    "numerical_rank",
    "oracle_approximating",
    "participation_ratio",
    "participation_ratio_sampled",
    "pca_dimension",
    "permutation_null",
    "pool_folds",
    "position_mask",
    "probe_scores",
    "procrustes",
    "procrustes_bounds",
    "project",
    "pwcca_ab",
    "pwcca_ba",
    "rankme",
    "rbf_cka",
    "rdm",
    "reconstruct",
    "ridge_loo",
    "ridge_probe",
    "router_load",
    "row_groups",
    "rows_to_settle",
    "rsa",
    "rv_coefficient",
    "sample_eigenvalues",
    "sample_metrics",
    "selection_mask",
    "settling",
    "rotated_null",
    "shuffled_null",
    "soft_matching",
    "spectrum_metrics",
    "subspace_overlap_corrected",
    "svcca",
    "tle",
    "tle_from_neighbors",
    "token_context",
    "token_probability",
    "top_activating",
    "top_rows",
    "twonn",
    "twonn_curve",
    "twonn_from_distances",
    "within_scatter",
]

_taking = {function: taking_arrays(function, __name__) for function in {globals()[name] for name in __all__}}
for _name in __all__:
    globals()[_name] = _taking[globals()[_name]]
