"""Numbers resolve what float64 resolves, whatever dtype, scale, offset, batches and rank the rows have; and know what not."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

import tdgeom as tg
from tdgeom import functional as F
from tdgeom.measures.eigen_spectrum import eigenvalue_error
from tdgeom.measures.spectrum_metrics import SPECTRUM_METRICS, marked_measures
from tdgeom.numerics.numerical_rank import above_rounding, directions_that_vary, leading_parts, numerical_rank
from tdgeom.numerics.quantiles import quantiles

LEAVES = ("count", "mean", "covariance", "norm4", "norm2_x", "relative_error")


def streamed(rows, batch=512, **settings):
    """What a stream of these rows publishes."""
    stage = tg.StreamingCovariance(**settings)
    for part in rows.split(batch):
        stage.update(TensorDict(tokens=part))
    return stage.publish(TensorDict({}))


def spectrum(td):
    """Every spectrum measure of streamed moments, and RankMe."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        td = tg.RankMe()(tg.SpectrumMetrics()(tg.EigenSpectrum(k=2)(td)))
    return {name: float(value) for name, value in td["spectrum"].items()}


def effective_rank(values):
    """exp entropy of the given singular values, in NumPy."""
    p = values / values.sum()
    return float(np.exp(-(p[p > 0] * np.log(p[p > 0])).sum()))


bad_data = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1000),
        "n": st.integers(2, 80),
        "d": st.integers(1, 40),
        "rank": st.integers(1, 40),
        "scale": st.sampled_from([1e-24, 1e-12, 1e-3, 1.0, 1e3, 1e12, 1e19]),
        "offset": st.sampled_from([0.0, 1.0, 1e3, 1e6]),
        "constant": st.integers(0, 3),
        "batch": st.sampled_from([1, 7, 37, 512]),
    }
)


def rows_of(case):
    generator = torch.Generator().manual_seed(case["seed"])
    n, d, rank = case["n"], case["d"], min(case["rank"], case["d"])
    x = torch.randn(n, rank, generator=generator) @ torch.randn(rank, d, generator=generator) / rank**0.5
    x = (x + case["offset"]) * case["scale"]
    x[:, : min(case["constant"], d - 1)] = x[0, 0]
    return x.float()


@given(bad_data)
@settings(max_examples=60)
def test_float32_rows_are_the_same_numbers_as_float64(case):
    x = rows_of(case)
    narrow, wide = (spectrum(streamed(rows, case["batch"])) for rows in (x, x.double()))
    assert narrow == pytest.approx(wide, rel=1e-6, nan_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sample = [tg.SampleMetrics()(TensorDict(sample=rows))["sample_metrics"] for rows in (x, x.double())]
        ablation = [
            tg.NormalizationAblation(variants=["raw", "token_l2", "feature_standardized", "remove_top_pc"])(
                TensorDict(sample=rows)
            )["ablation"]
            for rows in (x, x.double())
        ]
    for one, other in (sample, ablation):
        for key in one.keys(True, True):
            assert float(one[key]) == pytest.approx(float(other[key]), rel=1e-4, abs=1e-9, nan_ok=True), key


@given(bad_data)
@settings(max_examples=60)
def test_moments_and_spectra_against_singular_values_in_numpy(case):
    x = rows_of(case)
    found = streamed(x, case["batch"])
    y = x.double().numpy() / case["scale"]  # NumPy squares them too
    centred = y - y.mean(0)
    norms = (centred**2).sum(1)
    expected = {
        "covariance": np.cov(y.T).reshape(y.shape[1], -1),
        "norm4": (norms**2).sum(),
        "norm2_x": norms @ centred,
    }
    spread = np.sqrt((centred**2).sum())
    for name, power in (("covariance", 2), ("norm4", 4), ("norm2_x", 3)):
        value = found["moments", name].numpy() / case["scale"] ** power
        np.testing.assert_allclose(value, expected[name], rtol=1e-7, atol=1e-9 * spread**power, err_msg=name)
    s = np.linalg.svd(centred, compute_uv=False)
    if s[0] > 0:
        measures = spectrum(found)
        assert measures["numerical_rank"] <= min(case["n"] - 1, case["d"])
        real = s[: int(measures["numerical_rank"])]
        assert measures["effective_rank"] == pytest.approx(effective_rank(real), rel=1e-5)
        assert measures["d_pr"] == pytest.approx((s**2).sum() ** 2 / (s**4).sum(), rel=1e-7)
        assert measures["rankme"] <= case["n"] * (1 + 1e-9)


@pytest.mark.parametrize("batch", [1, 37, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_five_directions_are_five(dtype, batch):
    x = (torch.randn(1024, 5) @ torch.randn(5, 300)).to(dtype)
    s = np.linalg.svd((x - x.double().mean(0)).double().numpy(), compute_uv=False)[:5]
    for factor in (1, 3):
        measures = spectrum(streamed(factor * x, batch))
        assert measures["effective_rank"] == pytest.approx(effective_rank(s), rel=1e-4)
        assert measures["rankme"] == pytest.approx(
            effective_rank(np.linalg.svd(x.double(), compute_uv=False)[:5]), rel=1e-4
        )
        assert measures["numerical_rank"] == 5 and measures["unresolved"] == 0
        assert np.isnan(measures["alpha_req"]) and np.isnan(measures["log_spectrum_slope_10_200"])
        assert float(F.sample_metrics(factor * x)["sv_effective_rank"]) == pytest.approx(
            effective_rank(s), rel=1e-4
        )


@pytest.mark.parametrize("width", [16, 64, 300])
def test_a_layer_norm_has_one_direction_less_at_any_scale(width):
    x = torch.nn.functional.layer_norm(torch.randn(2 * width + 50, width), (width,))
    exact = np.linalg.eigvalsh(np.cov(x.double().numpy().T))[::-1]
    slope = np.polyfit(np.arange(10, min(200, width - 1)), np.log(exact[10 : min(200, width - 1)]), 1)[0]
    for factor in (1, 3, 0.1, 1 / 3, 7e5, 1e-20):
        measures = spectrum(streamed(x * factor, 100))
        assert measures["numerical_rank"] == width - 1
        if width > 16:  # else five points
            assert measures["log_spectrum_slope_10_200"] == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("n", [2, 16, 64])
def test_rankme_is_no_more_than_the_rows(n):
    x = torch.randn(n, 300)
    expected = effective_rank(np.linalg.svd(x.double().numpy(), compute_uv=False))
    for batch in (n, 7):
        assert spectrum(streamed(x, batch))["rankme"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e3, 3e4, 1e5, 1e6])
def test_rankme_of_an_offset_against_singular_values(offset):
    x = torch.randn(500, 200, dtype=torch.float64) + offset
    expected = effective_rank(np.linalg.svd(x.numpy(), compute_uv=False))
    assert spectrum(streamed(x, 100))["rankme"] == pytest.approx(expected, rel=1e-5)


def test_a_massive_feature_hides_no_other():
    x = torch.randn(2000, 64) * torch.arange(1, 65.0) ** -1.5
    x[:, 7] *= 3000
    s = np.linalg.svd((x - x.double().mean(0)).double().numpy(), compute_uv=False)
    for precision in ("float64", "float32"):
        measures = spectrum(streamed(x, precision=precision))
        assert measures["effective_rank"] == pytest.approx(effective_rank(s), rel=1e-4)
        assert measures["numerical_rank"] == 64


@pytest.mark.parametrize("kind", ["white", "rank 5", "massive feature", "massive row", "binary", "offset"])
def test_float32_products_err_no_more_than_they_say_and_mark_what_that_moves(kind):
    x = torch.randn(3000, 160)
    if kind == "rank 5":
        x = x[:, :5] @ torch.randn(5, 160)
    elif kind == "massive feature":
        x[:, 3] *= 3000
    elif kind == "massive row":
        x[0] *= 1e4
    elif kind == "binary":
        x = (x > 0).float()
    elif kind == "offset":
        x = x + 1e4
    wide, narrow = (streamed(x, 1000, precision=precision) for precision in ("float64", "float32"))
    c = wide["moments", "covariance"]
    allowed = narrow["moments", "relative_error"] * torch.outer(c.diagonal(), c.diagonal()).sqrt()
    assert ((narrow["moments", "covariance"] - c).abs() <= allowed).all()
    spread = float(c.diagonal().sum() * 3000) ** 0.5
    for name, power in (("mean", 1), ("norm4", 4), ("norm2_x", 3)):
        close = {"rtol": 1e-7, "atol": 1e-9 * spread**power}
        torch.testing.assert_close(narrow["moments", name], wide["moments", name], **close)
    true, found = spectrum(wide), spectrum(narrow)
    marked = marked_measures(int(found["unresolved"]))
    assert not marked_measures(int(true["unresolved"]))
    for name in SPECTRUM_METRICS:
        if name not in marked:
            assert found[name] == pytest.approx(true[name], rel=1e-4, nan_ok=True), name
    assert ("effective_rank" in marked) == (kind in ("rank 5", "massive row"))


def test_unresolved_measures_are_told_with_the_remedy():
    td = streamed(torch.randn(600, 3) @ torch.randn(3, 160), precision="float32")
    with pytest.warns(
        tg.UnresolvedMeasureWarning, match=r"SpectrumMetrics.*effective_rank.*precision='float64'"
    ):
        tg.SpectrumMetrics()(tg.EigenSpectrum(k=2)(td))
    with pytest.warns(tg.UnresolvedMeasureWarning, match=r"RankMe.*precision='float64'"):
        tg.RankMe()(td)


def test_states_of_two_precisions_are_not_mixed_and_know_their_error():
    x = torch.randn(50, 4)
    wide, narrow = tg.StreamingCovariance(precision="float64"), tg.StreamingCovariance(precision="float32")
    for stage in (wide, narrow):
        stage.update(TensorDict(tokens=x))
    with pytest.raises(ValueError, match="precision"):
        wide.merge_(narrow)
    with pytest.raises(RuntimeError, match="precision"):
        wide.load_state_dict(narrow.state_dict())
    again = tg.StreamingCovariance(precision="float32")
    again.load_state_dict(narrow.state_dict())
    found = again.publish(TensorDict({}))["moments", "relative_error"]
    assert found == narrow.relative_error > wide.relative_error > 0
    with pytest.raises(ValueError, match="precision is 'auto', 'float64' or 'float32', got 'half'"):
        tg.StreamingCovariance(precision="half")


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_a_wide_update_is_one_graph(precision):
    x = torch.randn(40, 200)
    plain, compiled = (tg.StreamingCovariance(precision=precision) for _ in range(2))
    update = torch.compile(compiled.update, fullgraph=True, backend="aot_eager")
    for part in x.split(20):
        plain.update(TensorDict(tokens=part))
    compiled.update(TensorDict(tokens=x[:20]))
    update(TensorDict(tokens=x[20:]))
    for name, value in plain.state().items():
        torch.testing.assert_close(compiled.state()[name], value, rtol=1e-9, atol=1e-9)


def test_the_error_of_an_eigenvalue_is_that_along_its_vector():
    covariance = torch.diag(torch.tensor([1e8, 4.0, 1.0], dtype=torch.float64))
    found = eigenvalue_error(covariance, torch.tensor(1e-6, dtype=torch.float64))
    torch.testing.assert_close(found, 1e-6 * 3**0.5 * covariance.diagonal())
    assert eigenvalue_error(covariance, torch.tensor(2.0**-50)) is None
    assert numerical_rank(torch.tensor([3.0, 1.0, 0.5]), error=torch.tensor([0.1, 0.1, 0.6])) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_of_known_spectra(dtype):
    values = torch.tensor(
        [[1.0, 1e-6, 0.0], [2.0, 2e-13, 1e-14], [0.0, 0.0, 0.0], [torch.nan, 1.0, 0.0]], dtype=dtype
    )
    assert numerical_rank(values).tolist() == [2, 1, 0, -1]
    assert numerical_rank(values[:1].flip(-1), rows=2).tolist() == [1]
    assert above_rounding(values)[1].tolist() == [True, False, False]


def test_inverses_keep_features_of_small_units_and_drop_rounding():
    x = torch.randn(400, 6)
    x[:, 0] *= 1e6
    x = torch.cat(
        (x, x[:, 1:3] @ torch.randn(2, 2)), 1
    )  # two features that depend on others, but for float32's rounding
    covariance = F.covariance(x)
    assert directions_that_vary(*torch.linalg.eigh(covariance), covariance).sum() == 6


def test_shares_are_reached_to_1e_9():
    for d in (1, 2, 7, 10, 20, 30, 100, 768):
        shares = torch.full((d,), 1 / d, dtype=torch.float64)
        for percent in (50, 90, 95, 99, 100):
            assert int(leading_parts(shares, percent / 100)) == -(-d * percent // 100)


def test_quantiles_of_any_number_of_rows():
    x = torch.randn(3, 501)
    found = torch.stack(quantiles(x, (0.0, 0.05, 0.5, 0.95, 1.0)))
    expected = torch.quantile(x, torch.tensor([0.0, 0.05, 0.5, 0.95, 1.0]), dim=-1)
    torch.testing.assert_close(found, expected)


def test_dead_features_are_no_scale_for_outliers():
    for dead in (0, 34, 500):
        x = torch.cat((torch.randn(300, 30), torch.full((300, dead), 7.0)), 1)
        kept = F.normalized(x, "drop_outlier_features")
        assert torch.equal(kept, x)
        x[:, 3] *= 100
        kept = F.normalized(x, "drop_outlier_features")
        assert (kept != x).any(0).nonzero().flatten().tolist() == [3]


def test_bases_end_where_the_rows_do():
    td = streamed(torch.randn(300, 3) @ torch.randn(3, 20))
    for whiten in (False, True):
        with pytest.warns(tg.FewRowsWarning, match="ConceptBasis: few directions, 3 of the 5"):
            out = tg.ConceptBasis(n=5, whiten=whiten)(td)["concepts"]
        assert (out["basis"] != 0).any(0).tolist() == [True] * 3 + [False] * 2


def test_few_rows_are_told_and_marked():
    x = torch.randn(30, 64)
    with pytest.warns(tg.FewRowsWarning, match=r"SpectrumMetrics: few rows, 30: d_pr.*ParticipationRatio"):
        few = tg.SpectrumMetrics()(tg.EigenSpectrum(k=2)(streamed(x)))["spectrum", "few_rows"]
    with pytest.warns(tg.FewRowsWarning, match=r"SampleMetrics: few rows, 30"):
        tg.SampleMetrics()(TensorDict(sample=x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        many = tg.SpectrumMetrics()(tg.EigenSpectrum(k=2)(streamed(torch.randn(2000, 64))))[
            "spectrum", "few_rows"
        ]
    assert bool(few) and not bool(many)


def test_a_run_tells_once_what_holds_at_many_sites():
    sites = [f"x.{i}" for i in range(9)]
    batch = TensorDict(
        {("tokens", site): torch.randn(12, 30) for site in sites} | {"row_id": torch.arange(12)}
    )
    stages = (tg.StreamingCovariance(), tg.EigenSpectrum(), tg.SpectrumMetrics(), tg.RankMe())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        tg.run(TensorDictSequential(*(tg.ForEach(stage, sites) for stage in stages)), [batch])
    few = [w for w in seen if issubclass(w.category, tg.FewRowsWarning)]
    assert len(few) == 1 and few[0].filename == __file__
    text = str(few[0].message)
    assert "SpectrumMetrics: few rows, 12" in text and "RankMe: few rows, 12" in text
    assert "[at x.0, x.1, x.2, x.3, x.4, x.5 and 3 more]" in text
