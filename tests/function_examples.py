"""One call of every function of ``tdgeom.functional`` on one data set: for the tests that hold them all to one rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdgeom import functional as F

N, D, E = 40, 6, 4


@dataclass
class Call:
    """A function of tensors alone, and the tensors of one data set."""

    function: Callable[..., Any]
    inputs: Callable[[int], tuple[Tensor, ...]]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(seed: int, width: int = D, n: int = N) -> Tensor:
    """(n, width) correlated float64 rows with an offset."""
    noise = torch.randn(n + width, width, generator=generator(seed), dtype=torch.float64)
    return noise[:n] @ noise[n:] + 0.5


def other(seed: int) -> Tensor:
    return rows(seed + 50, E)


def labels(seed: int) -> Tensor:
    return (rows(seed)[:, 0] > 0.5).long()


def spectrum(seed: int) -> Tensor:
    return (
        torch.rand(30, generator=generator(seed), dtype=torch.float64).sort(descending=True).values.square()
    )


def distances(seed: int) -> Tensor:
    return F.nearest_neighbors(rows(seed), 20).distance


def covariance(seed: int) -> Tensor:
    return torch.cov(rows(seed).T)


def basis(seed: int, columns: int = 3) -> Tensor:
    return torch.linalg.qr(rows(seed, n=D)).Q[:, :columns]


def table(seed: int) -> Tensor:
    return F.nearest_neighbors(rows(seed), 5).index


def groups() -> Tensor:
    return torch.arange(N) // 4


one = lambda seed: (rows(seed),)
pair = lambda seed: (rows(seed), other(seed))
twins = lambda seed: (rows(seed), rows(seed + 50))
near = lambda seed: (distances(seed),)
values = lambda seed: (spectrum(seed),)

CALLS: dict[str, Call] = {
    # dimension
    "ca_pca": Call(lambda x: F.ca_pca(x, k=9), one),
    "ca_pca_dimension": Call(F.ca_pca_dimension, values),
    "global_pca": Call(lambda x: F.global_pca(x, rule="participation_ratio"), one),
    "gride": Call(lambda x: F.gride(x, range_max=8), one),
    "gride_from_distances": Call(lambda d: F.gride_from_distances(d, range_max=8, compat="dadapy"), near),
    "levina_bickel": Call(lambda x: F.levina_bickel(x, k=6), one),
    "levina_bickel_from_distances": Call(lambda d: F.levina_bickel_from_distances(d, k=6), near),
    "local_knn": Call(lambda x: F.local_knn(x, k=6), one),
    "local_knn_from_distances": Call(lambda d: F.local_knn_from_distances(d, k=6), near),
    "local_pca": Call(lambda x: F.local_pca(x, k=9), one),
    "mom": Call(lambda x: F.mom(x, k=6), one),
    "mom_from_distances": Call(lambda d: F.mom_from_distances(d, k=6), near),
    "participation_ratio": Call(
        F.participation_ratio,
        lambda seed: (torch.tensor(N), covariance(seed), (rows(seed) - rows(seed).mean(0)).square().sum(-1).square().sum()),
    ),
    "pca_dimension": Call(lambda v: F.pca_dimension(v, rule="broken_stick"), values),
    "tle": Call(lambda x: F.tle(x, k=6), one),
    "tle_from_neighbors": Call(
        lambda x, d, i: F.tle_from_neighbors(x, d, i, k=5), lambda seed: (rows(seed), distances(seed)[:, :5], table(seed))
    ),
    "twonn": Call(F.twonn, one),
    "twonn_curve": Call(F.twonn_curve, near),
    "twonn_from_distances": Call(F.twonn_from_distances, near),
    # neighbours
    "approximate_neighbors": Call(lambda x: F.approximate_neighbors(x, 4), one),
    "common_neighbors": Call(F.common_neighbors, lambda seed: (table(seed), table(seed + 50))),
    "conditional_ranks": Call(F.conditional_ranks, lambda seed: (other(seed), table(seed))),
    "distinct_neighbors": Call(lambda x: F.distinct_neighbors(x, 4), one),
    "information_imbalance": Call(lambda x, y: F.information_imbalance(x, y, k=2), pair),
    "jaccard_knn": Call(lambda x, y: F.jaccard_knn(x, y, k=5), pair),
    "label_overlap": Call(lambda x, y: F.label_overlap(x, y, k=5, balanced=True), lambda seed: (rows(seed), labels(seed))),
    "label_overlap_of": Call(
        lambda i, y: F.label_overlap_of(i, y, class_fraction=0.1), lambda seed: (table(seed), labels(seed))
    ),
    "nearest_neighbors": Call(lambda x: F.nearest_neighbors(x, 4, metric="cosine"), one),
    "neighborhood_overlap": Call(lambda x, y: F.neighborhood_overlap(x, y, k=5), pair),
    # similarity
    **{
        name: Call(getattr(F, name), pair)
        for name in (
            "angular_shape", "cca_mean", "cca_r2", "distance_correlation", "linear_cka", "linear_cka_debiased",
            "linear_r2_ab", "linear_r2_ba", "procrustes", "pwcca_ab", "pwcca_ba", "rbf_cka", "rsa", "rv_coefficient", "svcca",
        )
    },
    "cknna": Call(F.cknna, twins),
    "linear_cka_null": Call(F.linear_cka_null, pair),
    "linear_cka_sampled": Call(F.linear_cka_sampled, pair),
    "linear_cka_sampled_error": Call(
        F.linear_cka_sampled_error, lambda seed: tuple(rows(seed + side, 12) + 3 * rows(seed, 1) for side in (1, 2))
    ),
    "participation_ratio_sampled": Call(F.participation_ratio_sampled, one),
    "soft_matching": Call(F.soft_matching, pair),
    "feature_subspace_novelty": Call(F.feature_subspace_novelty, lambda seed: (basis(seed), basis(seed + 50))),
    "layer_cosine_sim": Call(F.layer_cosine_sim, twins),
    "rdm": Call(F.rdm, one),
    # logits
    "kl_divergence": Call(F.kl_divergence, twins),
    "logit_diff": Call(lambda v: F.logit_diff(v, 1, 0), one),
    "token_probability": Call(lambda v: F.token_probability(v, 2), one),
    # spectrum and samples
    "alpha_req": Call(F.alpha_req, values),
    "cosine_similarity": Call(F.cosine_similarity, one),
    "covariance": Call(F.covariance, one),
    "eigen_spectrum": Call(lambda c: F.eigen_spectrum(c, k=2), lambda seed: (covariance(seed),)),
    "entropy_dimension": Call(F.entropy_dimension, values),
    "rows_to_settle": Call(lambda v: F.rows_to_settle(v, torch.arange(len(v), 0, -1, device="cpu")), values),
    "settling": Call(lambda v: F.settling(v, torch.arange(len(v), 0, -1, device="cpu")), values),
    "ledoit_wolf": Call(
        F.ledoit_wolf,
        lambda seed: (torch.tensor(N), covariance(seed), (rows(seed) - rows(seed).mean(0)).square().sum(-1).square().sum()),
    ),
    "noise_rank": Call(lambda v: F.noise_rank(v, N), values),
    "oracle_approximating": Call(
        lambda c: F.oracle_approximating(torch.tensor(N, device="cpu"), c), lambda seed: (covariance(seed),)
    ),
    "numerical_rank": Call(F.numerical_rank, values),
    "log_spectrum_slope": Call(F.log_spectrum_slope, values),
    "normalized": Call(lambda x: F.normalized(x, "feature_standardized"), one),
    "rankme": Call(F.rankme, lambda seed: (torch.tensor(N), rows(seed).mean(0), covariance(seed))),
    "router_load": Call(F.router_load, lambda seed: (torch.randint(1, 9, (8,), generator=generator(seed)),)),
    "sample_eigenvalues": Call(F.sample_eigenvalues, one),
    "components_interpolated": Call(lambda v: F.components_interpolated(v, 0.9), values),
    "error_interval": Call(
        lambda x, e: F.error_interval(x, e, 19, scale="log"), lambda seed: (spectrum(seed)[:3], spectrum(seed)[3:6])
    ),
    "group_jackknife": Call(lambda v: F.group_jackknife(v, 2 + torch.arange(29, device="cpu")), values),
    "sample_metrics": Call(F.sample_metrics, one),
    "spectrum_metrics": Call(F.spectrum_metrics, values),
    # concepts and probes
    "bilinear_ridge": Call(
        lambda x, y, t: F.bilinear_ridge(x, y, t, [1.0]), lambda seed: (*pair(seed), labels(seed).double()[:, None])
    ),
    "concept_basis": Call(lambda c, m: F.concept_basis(c, m, 2), lambda seed: (covariance(seed), rows(seed).mean(0))),
    "erase": Call(F.erase, lambda seed: (rows(seed), basis(seed, 1), basis(seed, 1), rows(seed).mean(0))),
    "interpolate": Call(lambda a, b: F.interpolate(a, b, 0.3, spherical=True), lambda seed: tuple(rows(seed)[:2])),
    "label_moments": Call(F.label_moments, lambda seed: (rows(seed), labels(seed).double()[:, None])),
    "linear_decision": Call(F.linear_decision, lambda seed: (rows(seed), rows(seed)[:2], rows(seed)[0, :2])),
    "logistic_probe": Call(lambda x, y: F.logistic_probe(x, y, 2), lambda seed: (rows(seed), labels(seed))),
    "project": Call(F.project, lambda seed: (rows(seed), basis(seed), rows(seed).mean(0))),
    "reconstruct": Call(F.reconstruct, lambda seed: (rows(seed, 3), basis(seed), rows(seed).mean(0))),
    "ridge_loo": Call(lambda x, t: F.ridge_loo(x, t, [1.0]), lambda seed: (rows(seed), labels(seed).double()[:, None])),
    "top_activating": Call(lambda z, i: F.top_activating(z, i, 3), lambda seed: (rows(seed), torch.arange(N))),
    "top_rows": Call(lambda z, i: F.top_rows(z, i, 3), lambda seed: (rows(seed), torch.arange(N))),
}  # fmt: skip

# No function of the rows of one data set.
OTHERS = {
    **dict.fromkeys(
        ("class_means", "fisher_basis", "fold_errors", "lda_probe", "leace", "mean_difference", "pool_folds", "ridge_probe",
         "within_scatter"),
        "reads the moments of labelled rows, a mapping; stages compute those",
    ),
    **dict.fromkeys(
        ("aggregate_positions", "group_attention", "lens_measures", "position_mask", "selection_mask"),
        "works on a batch of sequences, whose leading dimension is the batch",
    ),
    **dict.fromkeys(
        ("adjusted_p_values", "clustered_error", "control_labels", "document_shuffles", "joint_p_values",
         "fold_index", "hash_ids", "holdout_mask", "permutation_null", "probe_scores",
         "row_groups", "token_context"),
        "works on ids, groups or decisions of one run",
    ),
    **dict.fromkeys(
        ("procrustes_bounds", "rotated_null", "shuffled_null", "subspace_overlap_corrected"),
        "deals the documents of one data set, or turns it",
    ),
}  # fmt: skip
