"""Which tool's number each measure equals: the table that tests/test_peers.py holds true and that the site's pages show.

A row's ``ours`` is an expression, evaluated as it is shown, on ``layers`` (4, 600, 48) and ``labels`` (600,) of data/golden;
``x`` and ``y`` are the first two layers in float64, ``a`` and ``b`` three consecutive pairs, (3, 600, 48) each. ``reference``
is where the other tool's number stands in tests/data/golden/reference.json, or an expression that asks a tool that is installed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import sklearn.covariance
import sklearn.decomposition
import sklearn.discriminant_analysis
import sklearn.linear_model
import torch

import tdgeom as tg
from tdgeom import functional as F

GOLDEN = Path(__file__).parent / "data" / "golden"
TIGHT, FLOAT32_TOOL = 1e-6, 1e-4


@dataclass(frozen=True)
class Peer:
    """One row of the table."""

    measure: str  # a public name: a function of tdgeom.functional, a stage, or a metric of one
    tool: str  # a tool of reference.json, or an installed one
    theirs: str  # their call
    ours: str  # our expression
    reference: str  # "key/key" in reference.json under the tool, or an expression
    tolerance: float = TIGHT  # relative
    note: str = ""


def metrics(key: str, names: str, ours: str, theirs: str, tolerance: float = TIGHT) -> list[Peer]:
    """A row for each metric that representation-geometry has by the same name."""
    return [
        Peer(name, "representation-geometry", theirs, f'{ours}["{name}"]', f"{key}/{name}", tolerance)
        for name in names.split()
    ]


SKLEARN_LABEL = "(labels < 2).long()"
PEERS: list[Peer] = [
    *metrics(
        "spectrum",
        "d_pr d_pr_norm d_entropy d_entropy_norm stable_rank top1_share top10_share top32_share k90 k95 "
        "log_spectrum_slope_10_200",
        "F.spectrum_metrics(F.sample_eigenvalues(layers))",
        "analyze_model(...), spectrum",
    ),
    *metrics(
        "sample_metrics",
        "sv_effective_rank sv_stable_rank sv_participation_ratio cos_sim_mean cos_sim_std ve_4 ve_8 ve_16 ve_32",
        "F.sample_metrics(layers)",
        "analyze_model(...), activation sample",
        FLOAT32_TOOL,
    ),
    *(
        Peer(
            "NormalizationAblation",
            "representation-geometry",
            f"normalisation ablation, {variant}",
            f'F.spectrum_metrics(F.sample_eigenvalues(F.normalized(layers, "{variant}")))["d_pr"]',
            f"ablation/{variant}/d_pr",
            FLOAT32_TOOL,
        )
        for variant in ("raw", "token_l2", "token_rms", "feature_standardized")
    ),
    Peer("SampleSpectrum", "scikit-learn", "PCA().fit(x).explained_variance_", "F.sample_eigenvalues(x)",
         "sklearn.decomposition.PCA().fit(x.numpy()).explained_variance_"),
    Peer("ShrunkCovariance", "scikit-learn", "LedoitWolf().fit(x).covariance_",
         "F.ledoit_wolf(torch.tensor(600), F.covariance(x), norm4)[0]",
         "sklearn.covariance.LedoitWolf().fit(x.numpy()).covariance_", note="it divides by N"),
    Peer("linear_cka", "repsim", "CKA, linear, biased", "F.linear_cka(layers[:, None], layers[None])", "cka_linear_biased"),
    Peer("linear_cka", "representation-geometry", "linear CKA, its formula in float64",
         "F.linear_cka(layers[:, None], layers[None])", "linear_cka_float64_same_formula"),
    Peer("linear_cka", "tdhook", "CkaEstimator()", "F.linear_cka(a, b)", "cka_biased", FLOAT32_TOOL),
    Peer("linear_cka_debiased", "closed_form", "HSIC of Song et al. 2012 in NumPy", "F.linear_cka_debiased(a, b)",
         "cka_linear_debiased",
         note="repsim's `song` and `lange` estimators keep terms of the diagonal and differ"),
    Peer("rbf_cka", "closed_form", "SciPy's distances, NumPy", "F.rbf_cka(a, b)", "cka_rbf_biased_sigma_median"),
    Peer("cca_r2", "repsim", "CCA", "F.cca_r2(layers[:, None], layers[None])", "cca_mean_of_squared_correlations",
         note="repsim's CCA is the mean of *squared* correlations"),
    Peer("procrustes", "closed_form", "NumPy, unit Frobenius norm", "F.procrustes(a, b)",
         "procrustes_distance_squared_unit_norm"),
    Peer("procrustes", "SciPy", "procrustes(x, y)[2] = disparity", "1 - (1 - F.procrustes(x, y) / 2) ** 2",
         "scipy.spatial.procrustes(x.numpy(), y.numpy())[2]", note="its disparity lets y be scaled too: 1 - (1 - ours/2)²"),
    Peer("angular_shape", "closed_form", "NumPy, unit Frobenius norm", "F.angular_shape(a, b)", "angular_shape_distance"),
    Peer("rsa", "closed_form", "SciPy: pdist and spearmanr", "F.rsa(a, b)", "rsa_correlation_rdm_spearman"),
    Peer("rsa", "closed_form", "SciPy: pdist and pearsonr", 'F.rsa(a, b, "euclidean", "pearson")', "rsa_euclidean_rdm_pearson"),
    Peer("linear_r2_ab", "scikit-learn", 'LinearRegression().fit(x, y), r2 "variance_weighted"', "F.linear_r2_ab(x, y)",
         'sklearn.metrics.r2_score(y.numpy(), sklearn.linear_model.LinearRegression().fit(x.numpy(), y.numpy())'
         '.predict(x.numpy()), multioutput="variance_weighted")'),
    Peer("feature_subspace_novelty", "representation-geometry", "feature_subspace_novelty, k = 16",
         "F.feature_subspace_novelty(*(F.eigen_spectrum(F.covariance(side), 16)[1] for side in (a, b)))",
         "novelty/feature_subspace_novelty"),
    Peer("layer_cosine_sim", "representation-geometry", "layer_cosine_sim", "F.layer_cosine_sim(a, b)",
         "novelty/layer_cosine_sim", FLOAT32_TOOL),
    Peer("neighborhood_overlap", "dadapy", "return_data_overlap(k=30)", "F.neighborhood_overlap(a, b, k=30)", "data_overlap_k30"),
    Peer("neighborhood_overlap", "dadapy", "return_data_overlap(k=10)", "F.neighborhood_overlap(a, b, k=10)", "data_overlap_k10"),
    Peer("jaccard_knn", "closed_form", "SciPy's distances, sets", "F.jaccard_knn(a, b, k=10)", "jaccard_k10_euclidean"),
    Peer("information_imbalance_ab", "dadapy", "return_information_imbalace, all ranks",
         "torch.stack(F.information_imbalance(a, b), -1)", "information_imbalance_full",
         note="with `maxk` below N - 1 DADApy draws the missing ranks at random: another number"),
    Peer("information_imbalance_ab", "tdhook", "InformationImbalanceEstimator()", "F.information_imbalance(a, b)[0]",
         "information_imbalance_a_to_b", FLOAT32_TOOL),
    Peer("label_overlap", "dadapy", "return_label_overlap(k=10, weighted=False)", "F.label_overlap(layers, labels, k=10)",
         "label_overlap_k10_unweighted"),
    Peer("label_overlap", "dadapy", "return_label_overlap(k=10)", "F.label_overlap(layers, labels, k=10, balanced=True)",
         "label_overlap_k10_class_balanced", note="DADApy's default is the class-balanced one, ours the plain one"),
    Peer("twonn", "dadapy", "compute_id_2NN(), fit", "F.twonn(layers).estimate", "two_nn_fit_0.9/0"),
    Peer("twonn", "dadapy", 'compute_id_2NN(algorithm="ml")', 'F.twonn(layers, method="ml").estimate', "two_nn_ml/0"),
    Peer("twonn", "scikit-dimension", "id.TwoNN().fit(x).dimension_", "F.twonn(layers).estimate", "two_nn_linear"),
    Peer("twonn", "tdhook", "TwoNnDimensionEstimator()", "F.twonn(layers, discard=0).estimate",
         "two_nn_discards_only_last_point", note="it discards the last point only: `discard=0`"),
    Peer("gride", "dadapy", "return_id_scaling_gride(range_max=64)", 'F.gride(layers, range_max=64, compat="dadapy").estimate',
         "gride_range64/ids", note="`compat` cuts extreme ratios as DADApy does; without it every row counts"),
    Peer("gride", "dadapy", "the same, errors", 'F.gride(layers, range_max=64, compat="dadapy").standard_error',
         "gride_range64/errors"),
    Peer("levina_bickel", "scikit-dimension", "id.MLE(K=20)", "F.levina_bickel(layers, k=20).estimate", "mle_k20"),
    Peer("mom", "scikit-dimension", "id.MOM(), 20 neighbours", "F.mom(layers, k=20).estimate", "mom_k20"),
    Peer("local_knn", "tdhook", "LocalKnnDimensionEstimator(k=10), mean", "F.local_knn(layers, k=10).estimate",
         "local_knn_k10_mean"),
    Peer("global_pca", "scikit-dimension", 'id.lPCA(ver="FO")', "F.global_pca(layers).estimate", "lpca_fo"),
    Peer("global_pca", "scikit-dimension", 'id.lPCA(ver="participation_ratio")',
         'F.global_pca(layers, rule="participation_ratio").estimate', "lpca_participation_ratio"),
    Peer("MeanDifferenceProbe", "tdhook", "mean difference, intercept",
         f'tg.MeanDifferenceProbe(normalize=True).fit(layers[0], {SKLEARN_LABEL}).fitted["intercept"]',
         "mean_difference_labels_lt2/intercept", FLOAT32_TOOL),
    Peer("LinearProbe", "scikit-learn", "RidgeClassifier(alpha=1).fit(x, y).coef_",
         f'tg.LinearProbe(alpha=1.0).fit(x, {SKLEARN_LABEL}).fitted["weight"][1]',
         f"sklearn.linear_model.RidgeClassifier(alpha=1).fit(x.numpy(), {SKLEARN_LABEL}.numpy()).coef_.squeeze()"),
    Peer("ConceptBasis", "scikit-learn", "PCA(10).fit(x).explained_variance_ratio_",
         'F.concept_basis(F.covariance(x))["explained_variance"]',
         "sklearn.decomposition.PCA(10).fit(x.numpy()).explained_variance_ratio_"),
    Peer("FisherBasis", "scikit-learn", 'LinearDiscriminantAnalysis("eigen").explained_variance_ratio_',
         'F.fisher_basis(F.label_moments(x, torch.nn.functional.one_hot(labels).double()))["explained_variance"]',
         'sklearn.discriminant_analysis.LinearDiscriminantAnalysis(solver="eigen").fit(x.numpy(), labels.numpy())'
         ".explained_variance_ratio_"),
]  # fmt: skip


def names() -> dict[str, Any]:
    """What the expressions may use."""
    held = np.load(GOLDEN / "inputs.npz")
    layers, labels = torch.from_numpy(held["layers"]).double(), torch.from_numpy(held["labels"])
    return {
        "F": F, "tg": tg, "torch": torch, "sklearn": sklearn, "scipy": scipy, "layers": layers, "labels": labels,
        "x": layers[0], "y": layers[1], "a": layers[:3], "b": layers[1:],
        "norm4": (layers[0] - layers[0].mean(0)).square().sum(-1).square().sum(),
    }  # fmt: skip


def tools() -> dict[str, Any]:
    """Tool -> what it returns, as reference.json holds it."""
    return json.loads((GOLDEN / "reference.json").read_text(encoding="utf-8"))["tools"]


def expected(peer: Peer, known: dict[str, Any], given: dict[str, Any]) -> Any:
    """The other tool's numbers."""
    if peer.tool not in known:
        return eval(peer.reference, given)
    found: Any = known[peer.tool]
    for key in peer.reference.split("/"):
        found = (
            [one[int(key) if key.isdigit() else key] for one in found]
            if isinstance(found, list)
            else found[key]
        )
    return found


def version(tool: str, known: dict[str, Any]) -> str:
    """The version that the numbers are of."""
    if tool in known:
        return known[tool].get("version", "")
    return {"scikit-learn": sklearn.__version__, "SciPy": scipy.__version__}[tool]
