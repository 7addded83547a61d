"""Exponential forgetting: every sum against NumPy with the weights written out, and what reads such moments."""

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
from tdgeom.core.streaming_stage import refuse_ordered

WAYS = st.lists(st.integers(1, 59), max_size=4, unique=True)


def random_rows(n=60, d=5, seed=0, offset=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset


def weights_of(n, halflife):
    return 0.5 ** (np.arange(n)[::-1] / halflife)


def closed_form(x, halflife, y=None):
    """Weighted mean, covariance by reliability weights, effective sample size."""
    x, w = np.asarray(x), weights_of(len(x), halflife)
    y = x if y is None else np.asarray(y)
    u, v = x - np.average(x, axis=0, weights=w), y - np.average(y, axis=0, weights=w)
    covariance = (w[:, None] * u).T @ v / (w.sum() - (w**2).sum() / w.sum())
    return np.average(x, axis=0, weights=w), covariance, w.sum() ** 2 / (w**2).sum()


def parts(rows, cuts):
    return torch.tensor_split(rows, sorted(cuts))


def three(halflife):
    """The three stages, each with what it reads of two sites' rows."""
    cross = tg.StreamingCrossMoments(["x", "y"], halflife=halflife)
    return [
        (tg.StreamingCovariance(halflife=halflife), lambda x, y: TensorDict(tokens=x)),
        (tg.StreamingMean(halflife=halflife), lambda x, y: TensorDict(tokens=x)),
        (cross, lambda x, y: TensorDict({("tokens", "x"): x, ("tokens", "y"): y})),
    ]


def check(stage, x, y, halflife):
    td = stage.publish(TensorDict())
    mean, covariance, effective = closed_form(x, halflife)
    scale = dict(rtol=1e-9, atol=1e-10 * float(np.abs(covariance).max()))
    if isinstance(stage, tg.StreamingMean):
        np.testing.assert_allclose(td["mean", "mean"], mean, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(td["mean", "variance"], np.diag(covariance), **scale)
        found, count = td["mean", "effective_sample_size"], td["mean", "count"]
    elif isinstance(stage, tg.StreamingCovariance):
        np.testing.assert_allclose(td["moments", "mean"], mean, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(td["moments", "covariance"], covariance, **scale)
        found, count = td["moments", "effective_sample_size"], td["moments", "count"]
        assert list(stage.out_keys)[-1] == ("moments", "effective_sample_size")
    else:
        np.testing.assert_allclose(td["cross_moments", "x", "covariance"], covariance, **scale)
        cross = closed_form(x, halflife, y)[1]
        np.testing.assert_allclose(td["cross_moments", "x->y", "cross_covariance"], cross, **scale)
        np.testing.assert_allclose(
            td["cross_moments", "y", "mean"], closed_form(y, halflife)[0], rtol=1e-12, atol=1e-12
        )
        found, count = td["cross_moments", "x->y", "effective_sample_size"], td["cross_moments", "x", "count"]
    assert float(found) == pytest.approx(effective, rel=1e-12) and int(count) == len(x)


@settings(max_examples=15)
@given(WAYS, st.sampled_from([0.3, 1, 7.5, 1e6]), st.sampled_from([0.0, 1000.0]))
def test_any_batches_give_the_closed_form(cuts, halflife, offset):
    x, y = random_rows(offset=offset), random_rows(d=3, seed=1, offset=-offset)
    for stage, made in three(halflife):
        for a, b in zip(parts(x, cuts), parts(y, cuts)):
            stage.update(made(a, b))
        check(stage, x, y, halflife)


@settings(max_examples=15)
@given(WAYS, st.sampled_from([2, 40.0]))
def test_what_came_later_is_merged_into_what_came_before(cuts, halflife):
    x, y = random_rows(), random_rows(d=3, seed=1)
    for stage, made in three(halflife):
        for a, b in zip(parts(x, cuts), parts(y, cuts)):
            later, _ = next((one, m) for one, m in three(halflife) if type(one) is type(stage))
            later.update(made(a, b))
            stage.merge_(later)
        check(stage, x, y, halflife)


def test_a_long_half_life_is_none_at_all():
    x = random_rows()
    for stage, made in three(1e9):
        plain = type(stage)(["x", "y"]) if isinstance(stage, tg.StreamingCrossMoments) else type(stage)()
        weighted, alike = stage(made(x, x)), plain(made(x, x))
        assert set(weighted.keys(True, True)) > set(alike.keys(True, True))
        for key in plain.out_keys:
            if key[-1] not in ("norm4", "norm2_x", "norm2_product", "x_norm2y", "y_norm2x"):
                torch.testing.assert_close(weighted[key], alike[key], rtol=1e-6, atol=1e-9)


def test_the_covariance_is_unbiased():
    halflife, tries = 3.0, 4000
    x = torch.randn(
        tries, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).mT.contiguous()
    variance = tg.StreamingMean(halflife=halflife)(tokens=x)[1]  # of 4,000 features alike
    assert abs(float(variance.mean()) - 1) < 4 * float(variance.std()) / tries**0.5


def test_a_state_goes_on_where_it_was_saved_and_nowhere_else():
    x, y = random_rows(), random_rows(d=3, seed=1)
    for (stage, made), (again, _), (other, _) in zip(three(5), three(5.0), three(6)):
        stage.update(made(x[:40], y[:40]))
        again.load_state_dict(stage.state_dict())
        again.update(made(x[40:], y[40:]))
        check(again, x, y, 5)
        with pytest.raises(RuntimeError, match=r"halflife is 5.0 there and 6.0 here"):
            other.load_state_dict(stage.state_dict())
        with pytest.raises(ValueError, match="cannot merge"):
            other.merge_(stage)


@pytest.mark.slow
def test_one_graph_by_value_and_by_state():
    x = random_rows().float()
    for stage in (tg.StreamingCovariance(halflife=9), tg.StreamingMean(halflife=9)):
        graph = torch.compile(stage.update, backend="eager", fullgraph=True)
        for part in x.split(20):
            graph(TensorDict(tokens=part))
        check(stage, x, x, 9)


def test_float32_products_say_how_far_off_they_are():
    x = random_rows(400, 20, offset=50.0)
    td = tg.StreamingCovariance(halflife=100, precision="float32")(TensorDict(tokens=x))
    exact = closed_form(x, 100)[1]
    error = np.abs(td["moments", "covariance"].numpy() - exact) / np.sqrt(
        np.outer(np.diag(exact), np.diag(exact))
    )
    assert 0 < error.max() < float(td["moments", "relative_error"]) < 1e-5


@pytest.mark.parametrize("halflife", [0, -3, float("inf"), float("nan"), True, "ten"])
def test_what_is_no_number_of_rows_is_refused(halflife):
    for make in (tg.StreamingCovariance, tg.StreamingMean, lambda **s: tg.StreamingCrossMoments(["x"], **s)):
        with pytest.raises(ValueError, match="halflife counts the rows"):
            make(halflife=halflife)


def test_a_sketch_and_groups_of_documents_need_rows_that_weigh_alike():
    with pytest.raises(ValueError, match="sketch is for a CKA of rows of equal weight"):
        tg.StreamingCrossMoments(["x"], halflife=3, sketch=64)
    with pytest.raises(ValueError, match="Replicates leaves out groups of documents that weigh alike"):
        tg.Replicates(tg.StreamingMean(halflife=3))


def test_jobs_and_ranks_that_share_the_data_out_are_refused(tmp_path):
    stage = tg.ForEach(tg.StreamingCovariance(halflife=3), ["x"])
    batches = [{("tokens", "x"): random_rows(8)}] * 2
    with pytest.raises(ValueError, match="2 processes that share the data out have none that came later"):
        tg.run(TensorDictSequential(stage), batches, shard="1/2", state=tmp_path / "state")
    with pytest.raises(ValueError, match="2 processes"):
        refuse_ordered(tg.StreamingMean(halflife=3), 2, "StreamingMean.sync_()")
    refuse_ordered(tg.StreamingMean(), 2, "StreamingMean.sync_()")


def test_a_run_weighs_rows_by_their_place_in_the_stream():
    x = random_rows(300)
    pipeline = TensorDictSequential(
        tg.StreamingCovariance(halflife=30), tg.EigenSpectrum(k=2), tg.SpectrumMetrics(), tg.RankMe()
    )
    for size in (7, 300):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", tg.FewRowsWarning)
            warnings.simplefilter("ignore", tg.UndefinedMeasureWarning)
            result = tg.run(pipeline, [{"tokens": part} for part in x.split(size)], block_rows=64)
        mean, covariance, effective = closed_form(x, 30)
        np.testing.assert_allclose(result["moments", "covariance"], covariance, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(result["eigenvalues"], np.linalg.eigvalsh(covariance)[::-1], rtol=1e-9)
        # RankMe of the weighted rows: each row times the root of its weight
        w = weights_of(300, 30)
        u = x.numpy() - mean
        scatter = (w[:, None] * u).T @ u / (w.sum() - (w**2).sum() / w.sum())
        s = np.sqrt(np.linalg.eigvalsh((effective - 1) * scatter + effective * np.outer(mean, mean)))
        direct = np.linalg.svd(np.sqrt(w)[:, None] * x.numpy(), compute_uv=False)
        np.testing.assert_allclose(np.sort(s)[::-1] / s.sum(), direct / direct.sum(), rtol=1e-9)
        p = direct / direct.sum()
        assert float(result["spectrum", "rankme"]) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)


def test_few_rows_are_those_that_still_weigh():
    x = random_rows(2000, 8)
    pipeline = TensorDictSequential(
        tg.StreamingCovariance(halflife=10), tg.EigenSpectrum(k=2), tg.SpectrumMetrics(), tg.RankMe()
    )
    with pytest.warns(tg.FewRowsWarning, match="few rows, 28"), warnings.catch_warnings():
        warnings.simplefilter("ignore", tg.UndefinedMeasureWarning)
        result = pipeline(TensorDict(tokens=x))
    assert bool(result["spectrum", "few_rows"])


EQUAL = {
    "ParticipationRatio": lambda: tg.ParticipationRatio(),
    "ShrunkCovariance": lambda: tg.ShrunkCovariance(),
    "NoiseRank": lambda: tg.NoiseRank(),
}


@pytest.mark.parametrize("name", EQUAL)
def test_measures_whose_formulas_count_rows_alike_refuse(name):
    td = tg.EigenSpectrum(k=2)(tg.StreamingCovariance(halflife=10)(TensorDict(tokens=random_rows())))
    with pytest.raises(ValueError, match=f"{name} reads moments of rows that weigh less with age"):
        EQUAL[name]()(td)


def crossed(halflife=10, n=200):
    x, y = random_rows(n), random_rows(n, 3, seed=1)
    y[:, :3] += x[:, :3]
    stage = tg.StreamingCrossMoments(["x", "y"], halflife=halflife)
    return x, y, stage(TensorDict({("tokens", "x"): x, ("tokens", "y"): y}))


@pytest.mark.parametrize(
    "stage",
    [tg.LinearCKA(estimator="debiased", source="moments"), tg.CKANull(source="moments", by="row")],
    ids=repr,
)
def test_cka_by_chance_is_not_known_of_weighted_rows(stage):
    with pytest.raises(ValueError, match="reads moments of rows that weigh less with age"):
        tg.ForEachPair(stage, ["x", "y"])(crossed()[2])


def test_linear_measures_of_weighted_moments_are_those_of_weighted_rows():
    x, y, td = crossed(halflife=60)
    w = weights_of(200, 60)
    rows = [np.sqrt(w)[:, None] * (z.numpy() - closed_form(z, 60)[0]) for z in (x, y)]
    for stage in (tg.LinearCKA, tg.Procrustes, tg.CCA, tg.LinearR2):
        td = tg.ForEachPair(stage(source="moments"), ["x", "y"])(td)
    found = td["between", "x->y"]
    a, b = rows
    cka = np.square(a.T @ b).sum() / np.sqrt(np.square(a.T @ a).sum() * np.square(b.T @ b).sum())
    nuclear = np.linalg.svd(a.T @ b, compute_uv=False).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    rho = np.linalg.svd(np.linalg.qr(a)[0].T @ np.linalg.qr(b)[0], compute_uv=False)
    explained = np.square(np.linalg.qr(a)[0].T @ b).sum() / np.square(b).sum()
    assert float(found["linear_cka"]) == pytest.approx(cka, rel=1e-9)
    assert float(found["procrustes"]) == pytest.approx(2 - 2 * nuclear, rel=1e-8)
    assert float(found["cca_mean"]) == pytest.approx(rho.mean(), rel=1e-9)
    assert float(found["linear_r2_ab"]) == pytest.approx(explained, rel=1e-9)


def test_maps_between_sites_warn_by_the_rows_that_still_weigh():
    _, _, td = crossed(halflife=1)
    with pytest.warns(tg.FewRowsWarning, match="CCA: few rows, 3"):
        tg.ForEachPair(tg.CCA(source="moments"), ["x", "y"])(td)
