"""Complex rows are refused in words: no measure drops an imaginary part."""

from __future__ import annotations

import pytest
import torch

import tdgeom as tg
from tdgeom import functional as F

ROWS = torch.randn(40, 6, dtype=torch.complex64) + 5j
SQUARE = ROWS.mH @ ROWS
PAIRS = (
    "linear_cka", "linear_cka_debiased", "cca_mean", "cca_r2", "svcca", "pwcca_ab", "pwcca_ba", "procrustes", "angular_shape",
    "linear_r2_ab", "linear_r2_ba", "rbf_cka", "rsa", "cknna", "distance_correlation", "soft_matching", "layer_cosine_sim",
    "feature_subspace_novelty",
)  # fmt: skip
FUNCTIONS = {
    **{f"{name}, first": lambda name=name: getattr(F, name)(ROWS, ROWS.real) for name in PAIRS},
    **{f"{name}, second": lambda name=name: getattr(F, name)(ROWS.real, ROWS) for name in PAIRS},
    "rdm": lambda: F.rdm(ROWS),
    "sample_metrics": lambda: F.sample_metrics(ROWS),
    "sample_eigenvalues": lambda: F.sample_eigenvalues(ROWS),
    "cosine_similarity": lambda: F.cosine_similarity(ROWS),
    "normalized": lambda: F.normalized(ROWS, "feature_standardized"),
    "eigen_spectrum": lambda: F.eigen_spectrum(SQUARE),
    "rankme": lambda: F.rankme(torch.tensor(40), ROWS.mean(0), SQUARE),
    "spectrum_metrics": lambda: F.spectrum_metrics(SQUARE[0]),
    "log_spectrum_slope": lambda: F.log_spectrum_slope(SQUARE[0]),
    "alpha_req": lambda: F.alpha_req(SQUARE[0]),
    "a variant of one's own": lambda: tg.NormalizationAblation(variants={"spectral": torch.fft.fft})(
        sample=ROWS.real
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_refused(name):
    with pytest.raises(
        TypeError, match="expected real numbers, got complex.*real and imaginary parts as features"
    ):
        FUNCTIONS[name]()
