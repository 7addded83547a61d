"""Spectrum measures against closed forms and independent NumPy."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

import tdgeom as tg
from tdgeom import functional as F
from tdgeom.measures.spectrum_metrics import SPECTRUM_METRICS


def decaying(d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(d, generator=generator, dtype=torch.float64).pow(3).add(1e-4).sort(descending=True).values
    )


def reference(values):
    """Every measure by METRICS' definition, in NumPy."""
    values = np.asarray(values, dtype=np.float64)
    d, p = len(values), values / values.sum()
    entropy = lambda q: np.exp(-(q[q > 0] * np.log(q[q > 0])).sum())
    roots = np.sqrt(values) / np.sqrt(values).sum()
    ranks = np.arange(10, min(200, d))
    slope = np.polyfit(ranks, np.log(values[ranks]), 1)[0] if len(ranks) > 5 else np.nan
    ranks = np.arange(11, min(100, d) + 1)
    if len(ranks) > 5:
        design = np.stack([np.log(ranks), np.ones(len(ranks))], 1) / np.sqrt(ranks)[:, None]
        alpha = -np.linalg.lstsq(design, np.log(values[ranks - 1]) / np.sqrt(ranks), rcond=None)[0][0]
    else:
        alpha = np.nan
    shares = np.cumsum(p)
    k = {level: next(i + 1 for i, s in enumerate(shares) if s >= level / 100) for level in (90, 95, 99)}
    d_pr = values.sum() ** 2 / (values**2).sum()
    return {
        "d_pr": d_pr,
        "d_pr_norm": d_pr / d,
        "d_entropy": entropy(p),
        "d_entropy_norm": entropy(p) / d,
        "effective_rank": entropy(roots),
        "stable_rank": values.sum() / values[0],
        "top1_share": p[0],
        "top10_share": p[:10].sum(),
        "top32_share": p[:32].sum(),
        "k90": k[90],
        "k95": k[95],
        "k99": k[99],
        "log_spectrum_slope_10_200": slope,
        "alpha_req": alpha,
        "isoscore": (d_pr - 1) / (d - 1),
        "near_rank1": float(p[0] >= 0.99 and k[90] <= 1),
    }


@pytest.mark.parametrize("d", [2, 7, 16, 17, 48, 150, 300])
def test_every_measure_against_numpy(d):
    values = decaying(d)
    expected = reference(values)
    found = F.spectrum_metrics(values)
    assert set(expected) == set(SPECTRUM_METRICS) == set(found) - {"numerical_rank"}
    assert int(found["numerical_rank"]) == d
    for name in SPECTRUM_METRICS:
        assert float(found[name]) == pytest.approx(expected[name], rel=1e-10, nan_ok=True), name


def test_a_flat_spectrum():
    found = F.spectrum_metrics(torch.full((50,), 3.0))
    for name in ("d_pr", "d_entropy", "effective_rank", "stable_rank"):
        assert float(found[name]) == pytest.approx(50)
    assert float(found["isoscore"]) == pytest.approx(1)
    assert [int(found[k]) for k in ("k90", "k95", "k99")] == [45, 48, 50]
    assert float(found["log_spectrum_slope_10_200"]) == pytest.approx(0, abs=1e-12)
    assert not found["near_rank1"]


def test_one_direction():
    found = F.spectrum_metrics(torch.tensor([5.0] + [0.0] * 30))
    for name in ("d_pr", "d_entropy", "effective_rank", "stable_rank", "top1_share", "top10_share"):
        assert float(found[name]) == pytest.approx(1)
    assert float(found["isoscore"]) == pytest.approx(0, abs=1e-15)
    assert [int(found[k]) for k in ("k90", "k95", "k99")] == [1, 1, 1] and bool(found["near_rank1"])
    assert found["log_spectrum_slope_10_200"].isnan() and found["alpha_req"].isnan()


def test_one_feature_has_no_isoscore():
    found = F.spectrum_metrics(torch.tensor([2.0]))
    assert found["isoscore"].isnan() and float(found["d_pr"]) == 1 and bool(found["near_rank1"])


def test_known_slopes():
    ranks = torch.arange(300.0, dtype=torch.float64)
    assert float(F.log_spectrum_slope(torch.exp(-0.03 * ranks))) == pytest.approx(-0.03, rel=1e-10)
    assert float(F.alpha_req((ranks + 1) ** -0.7)) == pytest.approx(0.7, rel=1e-10)
    assert float(F.alpha_req((ranks + 1) ** -0.7, first=3, last=40)) == pytest.approx(0.7, rel=1e-10)


def test_alpha_ranks_are_settable_and_matter():
    values = decaying(120)
    stage = tg.SpectrumMetrics(alpha_ranks=(5, 60))
    value = dict(zip(SPECTRUM_METRICS, stage(eigenvalues=values)))["alpha_req"]
    ranks = np.arange(5, 61)
    design = np.stack([np.log(ranks), np.ones(len(ranks))], 1) / np.sqrt(ranks)[:, None]
    expected = -np.linalg.lstsq(design, np.log(values.numpy()[4:60]) / np.sqrt(ranks), rcond=None)[0][0]
    assert float(value) == pytest.approx(expected, rel=1e-10)
    assert float(value) != pytest.approx(float(F.alpha_req(values)), rel=1e-3)


def test_slopes_need_more_than_five_points():
    for d, defined in ((15, False), (16, True)):
        values = F.spectrum_metrics(decaying(d))
        assert bool(values["log_spectrum_slope_10_200"].isfinite()) is defined
        assert bool(values["alpha_req"].isfinite()) is defined


def test_slopes_leave_rounding_zeros_out():
    values = torch.exp(-0.1 * torch.arange(60.0, dtype=torch.float64))
    values[40:] = 1e-19
    assert float(F.log_spectrum_slope(values)) == pytest.approx(-0.1, rel=1e-8)


@given(st.integers(0, 10_000), st.integers(-20, 20))
def test_scale_changes_nothing(seed, exponent):
    values = decaying(40, seed)
    plain, scaled = F.spectrum_metrics(values), F.spectrum_metrics(values * 10.0**exponent)
    for name in SPECTRUM_METRICS:
        assert float(scaled[name]) == pytest.approx(float(plain[name]), rel=1e-9), name


@given(st.integers(0, 10_000), st.integers(2, 60))
def test_ranges(seed, d):
    found = F.spectrum_metrics(decaying(d, seed))
    for name in ("d_pr", "d_entropy", "effective_rank", "stable_rank"):
        assert 1 - 1e-9 <= float(found[name]) <= d + 1e-9
    assert 1 <= int(found["k90"]) <= int(found["k95"]) <= int(found["k99"]) <= d
    assert (
        float(found["top1_share"]) <= float(found["top10_share"]) <= float(found["top32_share"]) <= 1 + 1e-12
    )
    assert float(found["stable_rank"]) <= float(found["d_pr"]) + 1e-9 <= float(found["d_entropy"]) + 2e-9
    assert float(found["d_entropy"]) <= float(found["effective_rank"]) + 1e-9


@pytest.mark.parametrize(("value", "says"), [(0.0, "has no variance"), (torch.nan, "is NaN")])
def test_no_variance_is_nan_and_minus_one_with_one_warning(value, says):
    values = torch.full((20,), value)
    with pytest.warns(tg.UndefinedMeasureWarning, match=rf"'eigenvalues' {says}") as caught:
        td = tg.SpectrumMetrics()(TensorDict(eigenvalues=values))
    assert len(caught) == 1
    for name in SPECTRUM_METRICS:
        value = td["spectrum", name]
        if name in ("k90", "k95", "k99"):
            assert int(value) == -1
        elif name == "near_rank1":
            assert not bool(value)
        else:
            assert value.isnan(), name


def test_one_degenerate_layer_leaves_the_others_alone():
    values = torch.stack([decaying(20), torch.zeros(20, dtype=torch.float64)])
    with pytest.warns(tg.UndefinedMeasureWarning):
        td = tg.SpectrumMetrics()(TensorDict(eigenvalues=values))
    expected = F.spectrum_metrics(values[0])
    for name in SPECTRUM_METRICS:
        assert float(td["spectrum", name][0]) == pytest.approx(float(expected[name]), rel=1e-12)
    assert td["spectrum", "d_pr"][1].isnan() and int(td["spectrum", "k90"][1]) == -1


@pytest.mark.parametrize("d", [5, 150])
def test_the_order_of_the_eigenvalues_does_not_matter(d):
    values = decaying(d)
    expected = reference(values)
    shuffled = values[torch.randperm(d, generator=torch.Generator().manual_seed(d))]
    for given_order in (values.flip(0), shuffled):  # ascending is what torch.linalg.eigvalsh gives
        found = F.spectrum_metrics(given_order)
        for name in expected:
            assert float(found[name]) == pytest.approx(expected[name], rel=1e-9, nan_ok=True), name
        slopes = (F.log_spectrum_slope, F.alpha_req)
        assert [float(f(given_order).nan_to_num()) for f in slopes] == [
            float(f(values).nan_to_num()) for f in slopes
        ]


def test_rows_in_place_of_eigenvalues_are_refused():
    rows = torch.tensor([[3.0, -2.0, 1.0], [1.0, 0.5, 0.2]])
    with pytest.raises(
        ValueError,
        match=r"'eigenvalues' to hold the eigenvalues of a covariance.*got -2 \(shape \(2, 3\)\).*EigenSpectrum",
    ):
        tg.SpectrumMetrics()(eigenvalues=rows)


def test_tiny_negative_eigenvalues_count_as_zero():
    values = decaying(20)
    found = F.spectrum_metrics(torch.cat([values, torch.tensor([-1e-18])]))
    expected = F.spectrum_metrics(torch.cat([values, torch.tensor([0.0])]))
    for name in SPECTRUM_METRICS:
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-12, nan_ok=True), name


# ------------------------------------------------------------------------------------------ EigenSpectrum


@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_with_fewer_rows_than_features_no_rounding_is_counted(offset):
    rows = torch.randn(40, 120) + offset
    td = tg.StreamingCovariance()(TensorDict(tokens=rows))
    tg.SpectrumMetrics()(tg.EigenSpectrum()(td))
    singular = np.linalg.svd((rows - rows.mean(0)).double().numpy(), compute_uv=False)[:39]
    share = singular / singular.sum()
    expected = np.exp(-(share * np.log(share)).sum())
    assert float(td["spectrum", "effective_rank"]) == pytest.approx(expected, rel=1e-5)
    assert (td["eigenvalues"][39:] == 0).all() and (td["eigenvalues"][:39] > 0).all()


def test_the_count_of_each_of_a_batch():
    covariance = torch.eye(4).expand(2, 4, 4)
    values, _ = tg.EigenSpectrum()(moments_covariance=covariance, moments_count=torch.tensor([3, 9]))
    assert values.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigen_spectrum_against_numpy(dtype):
    rows = torch.randn(200, 12, dtype=torch.float64) * torch.linspace(0.1, 3, 12).double()
    covariance = torch.from_numpy(np.cov(rows.numpy().T)).to(dtype)
    values, vectors = F.eigen_spectrum(covariance, k=5)
    assert values.dtype == vectors.dtype == torch.float64 and vectors.shape == (12, 5)
    expected = np.linalg.eigvalsh(covariance.double().numpy())[::-1]
    np.testing.assert_allclose(values, expected, rtol=1e-10)
    residual = covariance.double() @ vectors - vectors * values[:5]
    assert residual.abs().max() < 1e-10 * values[0]
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(5, dtype=torch.float64))
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()


def test_more_vectors_than_features_gives_them_all():
    values, vectors = tg.EigenSpectrum(k=32)(moments_covariance=torch.eye(3))
    assert values.shape == (3,) and vectors.shape == (3, 3)


def test_rank_deficient_covariance_has_no_negative_eigenvalue():
    rows = torch.randn(5, 40, dtype=torch.float64)
    values, _ = F.eigen_spectrum(F.covariance(rows))
    assert (values >= 0).all() and (values[4:] < 1e-12 * values[0]).all()


def test_an_undefined_covariance_gives_nan():
    values, vectors = tg.EigenSpectrum(k=2)(moments_covariance=torch.full((4, 4), torch.nan))
    assert values.isnan().all() and values.shape == (4,)
    assert vectors.isnan().all() and vectors.shape == (4, 2)


def test_one_undefined_layer_leaves_the_others_alone():
    good = torch.diag(torch.tensor([1.0, 3.0, 2.0]))
    values, vectors = F.eigen_spectrum(torch.stack([good, torch.full((3, 3), torch.nan)]), k=1)
    assert values[0].tolist() == [3.0, 2.0, 1.0] and vectors[0].flatten().tolist() == [0, 1, 0]
    assert values[1].isnan().all() and vectors[1].isnan().all()


def test_eigen_spectrum_errors():
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        tg.EigenSpectrum(k=0)
    with pytest.raises(ValueError, match=r"same D, got 3 and 4 \(shape \(3, 4\)\)"):
        tg.EigenSpectrum()(moments_covariance=torch.zeros(3, 4))
    with pytest.raises(
        ValueError, match=r"expects \('moments', 'covariance'\) of shape \(..., D, D\), got \(3,\)"
    ):
        tg.EigenSpectrum()(moments_covariance=torch.zeros(3))


def test_chain_rule_through_the_spectrum():
    rows = torch.randn(30, 4, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0, 4.0])

    def measures(x):
        values, _ = F.eigen_spectrum(F.covariance(x), k=2)
        found = F.spectrum_metrics(values)
        names = ("d_pr", "d_entropy", "effective_rank", "stable_rank", "top1_share", "isoscore")
        return torch.stack([found[name] for name in names])

    assert torch.autograd.gradcheck(measures, (rows.requires_grad_(),))


# ------------------------------------------------------------------------------------------ RankMe


@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_rankme_against_singular_values_of_the_rows(offset):
    rows = torch.randn(80, 9, dtype=torch.float64) * torch.linspace(0.2, 2, 9).double() + offset
    s = np.linalg.svd(rows.numpy(), compute_uv=False)
    q = s / s.sum()
    count, mean, covariance, *_ = tg.StreamingCovariance()(tokens=rows)
    assert float(tg.RankMe()(count, mean, covariance)) == pytest.approx(
        np.exp(-(q * np.log(q)).sum()), rel=1e-9
    )


def test_rankme_of_centred_rows_is_the_effective_rank():
    rows = torch.randn(80, 9, dtype=torch.float64)
    rows = rows - rows.mean(0)
    count, mean, covariance, *_ = tg.StreamingCovariance()(tokens=rows)
    values, _ = F.eigen_spectrum(covariance)
    expected = F.spectrum_metrics(values)["effective_rank"]
    torch.testing.assert_close(F.rankme(count, mean, covariance), expected, rtol=1e-9, atol=0)


def test_rankme_batches_over_layers():
    rows = torch.randn(3, 50, 5, dtype=torch.float64) + 1
    means, covariances = rows.mean(1), F.covariance(rows)
    together = F.rankme(torch.full((3,), 50), means, covariances)
    one_by_one = [float(F.rankme(torch.tensor(50), m, c)) for m, c in zip(means, covariances)]
    assert together.tolist() == pytest.approx(one_by_one, rel=1e-12)
    assert F.rankme(torch.tensor(50), means, covariances).tolist() == pytest.approx(one_by_one, rel=1e-12)


def test_rankme_of_rows_of_zeros_is_undefined_and_says_so():
    with pytest.warns(tg.UndefinedMeasureWarning, match="RankMe"):
        value = tg.RankMe()(torch.tensor(5), torch.zeros(3), torch.zeros(3, 3))
    assert value.isnan()


def test_no_warning_on_an_ordinary_spectrum():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tg.SpectrumMetrics()(eigenvalues=decaying(30))
