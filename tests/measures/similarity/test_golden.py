"""Every measure that an independent tool or a NumPy closed form has a number for, at 1e-6."""

from __future__ import annotations

import numpy as np
import pytest

from tdgeom.measures.similarity.cca import CCA, cca_r2
from tdgeom.measures.similarity.kernel_alignment import RBFCKA
from tdgeom.measures.similarity.linear_cka import LinearCKA, linear_cka, rv_coefficient
from tdgeom.measures.similarity.linear_r2 import LinearR2
from tdgeom.measures.similarity.procrustes import Procrustes
from tdgeom.measures.similarity.rsa import RSA

STAGES = {
    "cka_linear_debiased": LinearCKA(estimator="debiased"),
    "cka_rbf_biased_sigma_median": RBFCKA(),
    "rsa_correlation_rdm_spearman": RSA(),
    "rsa_euclidean_rdm_pearson": RSA(kind="euclidean", comparison="pearson"),
    "rv_coefficient": LinearCKA(),
    "linear_regression_r2": LinearR2(),
}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("i", range(3))
def test_closed_forms(layers, reference, name, i):
    value = STAGES[name](sample_a=layers[i], sample_b=layers[i + 1])
    np.testing.assert_allclose(value, reference["closed_form"][name][i], rtol=1e-9)


@pytest.mark.parametrize("i", range(3))
def test_shape_distances(layers, reference, i):
    squared, angle = Procrustes()(sample_a=layers[i], sample_b=layers[i + 1])
    closed = reference["closed_form"]
    assert squared.item() == pytest.approx(closed["procrustes_distance_squared_unit_norm"][i], rel=1e-9)
    assert angle.item() == pytest.approx(closed["angular_shape_distance"][i], rel=1e-9)


def test_linear_cka_and_cca_of_all_pairs(layers, reference):
    for name, measure, tool in (
        ("cka_linear_biased", linear_cka, "repsim"),
        ("cca_mean_of_squared_correlations", cca_r2, "repsim"),
        ("linear_cka_float64_same_formula", linear_cka, "representation-geometry"),
    ):
        found = [[measure(x, y).item() for y in layers] for x in layers]
        np.testing.assert_allclose(found, reference[tool][name], rtol=1e-9, err_msg=name)


def test_float32_rows_agree_to_1e6(layers, reference):
    for i in range(3):
        x, y = layers[i].float(), layers[i + 1].float()
        biased, debiased = LinearCKA(estimator="both")(sample_a=x, sample_b=y)
        expected = reference["representation-geometry"]["linear_cka_float64_same_formula"][i][i + 1]
        assert biased.item() == pytest.approx(expected, rel=1e-6)
        assert debiased.item() == pytest.approx(reference["closed_form"]["cka_linear_debiased"][i], rel=1e-6)
        assert RBFCKA()(sample_a=x, sample_b=y).item() == pytest.approx(
            reference["closed_form"]["cka_rbf_biased_sigma_median"][i], rel=1e-6
        )


def test_cca_stage_writes_both_names(layers, reference):
    mean, r2 = CCA()(sample_a=layers[0], sample_b=layers[1])
    assert r2.item() == pytest.approx(reference["repsim"]["cca_mean_of_squared_correlations"][0][1], rel=1e-9)
    assert r2**0.5 > mean > r2


def test_rv_is_declared_an_alias():
    assert rv_coefficient is linear_cka
