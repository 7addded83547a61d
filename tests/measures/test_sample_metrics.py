"""Sample measures against NumPy on the explicit matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

import tdgeom as tg
from tdgeom import functional as F
from tdgeom.measures.sample_metrics import SAMPLE_METRICS


def explicit_cosines(rows):
    """Mean and unbiased std over ordered pairs of different rows, from the n x n matrix."""
    rows = np.asarray(rows, dtype=np.float64)
    rows = rows[np.linalg.norm(rows, axis=1) > 0]
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = (unit @ unit.T)[~np.eye(len(rows), dtype=bool)]
    return cosine.mean(), cosine.std(ddof=1)


@given(st.integers(0, 10_000), st.integers(3, 40), st.integers(2, 40), st.sampled_from([0.0, 0.5, 20.0]))
def test_cosines_against_the_explicit_matrix(seed, n, d, offset):
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset
    mean, std = F.cosine_similarity(rows)
    expected = explicit_cosines(rows)
    assert float(mean) == pytest.approx(expected[0], abs=1e-10)
    # variance is the difference of two means of squares: its own rounding error is 1e-16
    assert float(std) ** 2 == pytest.approx(expected[1] ** 2, abs=1e-12)


def test_float32_cosines_of_nearly_parallel_rows_keep_their_spread():
    rows = torch.randn(200, 16) * 0.01 + 1
    mean, std = F.cosine_similarity(rows)
    expected = explicit_cosines(rows)
    assert float(mean) == pytest.approx(expected[0], rel=1e-6)
    assert float(std) == pytest.approx(expected[1], rel=0.05)


def test_rows_of_zeros_have_no_cosine():
    rows = torch.randn(30, 8, dtype=torch.float64)
    padded = torch.cat([rows, torch.zeros(5, 8, dtype=torch.float64)])
    for value, expected in zip(F.cosine_similarity(padded), F.cosine_similarity(rows)):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)


def test_cosines_at_any_scale():
    rows = torch.randn(20, 5)
    expected = explicit_cosines(rows)
    for scale in (1e-30, 1e-5, 1e30):
        mean, std = F.cosine_similarity(rows * scale)
        assert (float(mean), float(std)) == pytest.approx(expected, rel=1e-5)


def test_identical_and_opposite_rows():
    row = torch.randn(1, 6, dtype=torch.float64)
    mean, std = F.cosine_similarity(row.repeat(7, 1))
    assert float(mean) == pytest.approx(1) and float(std) == pytest.approx(0, abs=1e-7)
    mean, _ = F.cosine_similarity(torch.cat([row, -row]))
    assert float(mean) == pytest.approx(-1)


@pytest.mark.parametrize(("n", "d"), [(100, 12), (20, 50), (2, 3)])
def test_spectrum_measures_against_singular_values(n, d):
    rows = torch.randn(n, d, dtype=torch.float64) * torch.linspace(0.1, 4, d).double() + 3
    s = np.linalg.svd((rows - rows.mean(0)).numpy(), compute_uv=False)
    q, p = s / s.sum(), s**2 / (s**2).sum()
    q = q[q > 1e-12]
    found = F.sample_metrics(rows)
    assert float(found["sv_effective_rank"]) == pytest.approx(np.exp(-(q * np.log(q)).sum()), rel=1e-6)
    assert float(found["sv_stable_rank"]) == pytest.approx(1 / p[0], rel=1e-9)
    assert float(found["sv_participation_ratio"]) == pytest.approx(1 / (p**2).sum(), rel=1e-9)
    for k in (4, 8, 16, 32):
        assert float(found[f"ve_{k}"]) == pytest.approx(p[:k].sum(), rel=1e-9)
    norms = np.linalg.norm(rows.numpy(), axis=1)
    for name, value in (
        ("norm_mean", norms.mean()),
        ("norm_max", norms.max()),
        ("norm_q05", np.quantile(norms, 0.05)),
        ("norm_q50", np.quantile(norms, 0.5)),
        ("norm_q95", np.quantile(norms, 0.95)),
        ("top_feature_share", rows.numpy().var(0).max() / rows.numpy().var(0).sum()),
    ):
        assert float(found[name]) == pytest.approx(value, rel=1e-9), name


def test_fewer_rows_than_features_in_float32_count_no_rounding_as_dimensions():
    rows = torch.randn(64, 512)
    s = np.linalg.svd((rows - rows.mean(0)).double().numpy(), compute_uv=False)[:63]
    q = s / s.sum()
    expected = np.exp(-(q * np.log(q)).sum())
    assert float(F.sample_metrics(rows)["sv_effective_rank"]) == pytest.approx(expected, rel=1e-5)
    td = tg.NormalizationAblation()(TensorDict(sample=rows))
    assert float(td["ablation", "raw", "effective_rank"]) == pytest.approx(expected, rel=1e-5)
    assert (F.sample_eigenvalues(rows)[63:] == 0).all()
    assert float(td["ablation", "feature_standardized", "effective_rank"]) < 63


def test_a_layer_with_nan_leaves_the_others_alone():
    rows = torch.randn(2, 30, 4)
    expected = F.sample_metrics(rows[0])
    rows[1, 3, 2] = torch.nan
    found = F.sample_metrics(rows)
    for name in SAMPLE_METRICS:
        assert float(found[name][0]) == pytest.approx(float(expected[name]), rel=1e-5)
    assert found["sv_stable_rank"][1].isnan() and found["cos_sim_mean"][1].isnan()


def test_they_are_the_spectrum_metrics_of_the_sample():
    rows = torch.randn(90, 10, dtype=torch.float64) + 5
    sample = F.sample_metrics(rows)
    spectrum = F.spectrum_metrics(F.eigen_spectrum(F.covariance(rows))[0])
    for name, other in (
        ("sv_effective_rank", "effective_rank"),
        ("sv_stable_rank", "stable_rank"),
        ("sv_participation_ratio", "d_pr"),
    ):
        assert float(sample[name]) == pytest.approx(float(spectrum[other]), rel=1e-9)


def test_sample_spectrum_against_numpy():
    rows = torch.randn(30, 4, dtype=torch.float64) + 2
    values, covariance, unit, _ = (x.numpy() for x in tg.SampleSpectrum()(sample=rows))
    np.testing.assert_allclose(covariance, np.cov(rows.numpy().T), rtol=1e-12)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(np.cov(rows.numpy().T))[::-1], rtol=1e-10)
    directions = rows.numpy() / np.linalg.norm(rows.numpy(), axis=1, keepdims=True)
    np.testing.assert_allclose(unit, np.cov(directions.T), rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-5, 1e15])
def test_float32_spectrum_at_any_scale(scale):
    rows = torch.randn(60, 5)
    expected, found = F.sample_metrics(rows), F.sample_metrics(rows * scale)
    for name in ("sv_effective_rank", "sv_stable_rank", "sv_participation_ratio", "ve_4", "cos_sim_mean"):
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-4), name
    assert float(found["top_feature_share"]) == pytest.approx(float(expected["top_feature_share"]), rel=1e-4)
    assert float(found["norm_mean"]) == pytest.approx(float(expected["norm_mean"]) * scale, rel=1e-4)


@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_an_offset_costs_no_digits(offset):
    rows = torch.randn(300, 8)
    shifted = rows + offset
    exact = torch.from_numpy(np.linalg.eigvalsh(np.cov(shifted.double().numpy().T))[::-1].copy())
    torch.testing.assert_close(F.sample_eigenvalues(shifted), exact, rtol=1e-5, atol=0)


def test_batched_over_layers_equals_one_by_one():
    rows = torch.randn(2, 3, 25, 7, dtype=torch.float64)
    together = F.sample_metrics(rows)
    for i in range(2):
        for j in range(3):
            alone = F.sample_metrics(rows[i, j])
            for name in SAMPLE_METRICS:
                assert together[name].shape == (2, 3)
                assert float(together[name][i, j]) == pytest.approx(float(alone[name]), rel=1e-10), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_narrow_and_integer_rows_are_upcast_once(dtype):
    rows = (torch.randn(50, 6) * 5).to(dtype)
    expected = F.sample_metrics(rows.float() if rows.is_floating_point() else rows.double())
    for name, value in F.sample_metrics(rows).items():
        assert float(value) == float(expected[name]), name


def test_identical_rows_are_undefined_with_one_warning():
    with pytest.warns(tg.UndefinedMeasureWarning, match="all rows of 'sample' are the same") as caught:
        td = tg.SampleMetrics()(TensorDict(sample=torch.ones(6, 4)))
    assert len(caught) == 1
    for name in (
        "sv_effective_rank",
        "sv_stable_rank",
        "sv_participation_ratio",
        "ve_4",
        "top_feature_share",
    ):
        assert td["sample_metrics", name].isnan()
    assert float(td["sample_metrics", "cos_sim_mean"]) == pytest.approx(1)
    assert float(td["sample_metrics", "norm_max"]) == pytest.approx(2)


@pytest.mark.parametrize("stage", [tg.SampleMetrics, tg.SampleSpectrum, tg.NormalizationAblation])
def test_one_row_is_refused(stage):
    with pytest.raises(
        ValueError, match=rf"{stage.__name__} needs at least 2 rows, got 'sample' of shape \(1, 4\)"
    ):
        stage()(TensorDict(sample=torch.ones(1, 4)))


def test_gradients_reach_the_rows():
    rows = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)

    def measures(x):
        found = F.sample_metrics(x)
        names = ("sv_effective_rank", "sv_stable_rank", "cos_sim_mean", "cos_sim_std", "ve_4", "norm_mean")
        return torch.stack([found[name] for name in names])

    assert torch.autograd.gradcheck(measures, (rows,))
