"""What ``SampleSpectrum`` shares is used for the rows it is of, and for no others."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential

import tdgeom as tg
from tdgeom import functional as F
from tdgeom.measures.sample_metrics import PRODUCTS
from tdgeom.numerics.hashing import fingerprint

sample_metrics_file = importlib.import_module("tdgeom.measures.sample_metrics")
READERS = pytest.mark.parametrize("stage", [tg.SampleMetrics, tg.NormalizationAblation])


def rows(n=40, d=6, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) @ torch.diag(
        torch.arange(1.0, d + 1)
    )


def assert_same(found, expected, stage, rtol=1e-5, atol=1e-7):
    for key in stage().out_keys:
        torch.testing.assert_close(found[key], expected[key], rtol=rtol, atol=atol, equal_nan=True)


@READERS
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("zero_rows", [0, 3])
def test_what_is_shared_is_used_and_changes_nothing(stage, zero_rows, offset):
    sample = torch.randn(40, 6) + offset
    sample[:zero_rows] = 0
    alone = stage()(TensorDict(sample=sample))
    assert_same(stage()(tg.SampleSpectrum()(TensorDict(sample=sample))), alone, stage)
    # That it is used shows where it is falsified under the fingerprint of the same rows.
    false = tg.SampleSpectrum()(TensorDict(sample=torch.eye(40, 6) + torch.rand(6)))
    false.update(TensorDict(sample=sample, sample_fingerprint=fingerprint(sample)))
    found = stage()(false)
    differ = {key[-1] if len(key) == 2 else key[1] for key in stage().out_keys if found[key] != alone[key]}
    if stage is tg.SampleMetrics:
        assert {"sv_stable_rank", "top_feature_share"} <= differ
        assert ("cos_sim_std" in differ) == (zero_rows == 0)  # the shared one counts rows without direction
    else:
        assert {"raw", "token_l2", "token_rms", "feature_standardized"} <= differ


def test_given_eigenvalues_serve_raw():
    sample = rows()
    mark = {"sample_fingerprint": fingerprint(sample)}
    stage = tg.NormalizationAblation
    alone = stage()(TensorDict(sample=sample))
    shared = stage()(TensorDict(sample=sample, sample_eigenvalues=F.sample_eigenvalues(sample), **mark))
    assert_same(shared, alone, stage, rtol=1e-12, atol=0)
    false = stage()(TensorDict(sample=sample, sample_eigenvalues=torch.ones(6), **mark))
    assert float(false["ablation", "raw", "d_pr"]) == pytest.approx(6)
    assert false["ablation", "token_l2", "d_pr"] == alone["ablation", "token_l2", "d_pr"]


CHANGES = {
    "standardised": lambda x: (x - x.mean(0)) / x.std(0),
    "another order of features": lambda x: x.flip(-1),
    "rotated": lambda x: (
        x @ torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    ),
    "fewer rows": lambda x: x[:-1],
    "one value": lambda x: x.index_put((torch.tensor(7), torch.tensor(2)), torch.tensor(50.0)),
    "one row doubled in place of another": lambda x: torch.cat([x[:-1], x[:1]]),
    "narrower": lambda x: x[:, :3],
    "wider": lambda x: torch.cat([x, x[:, :1] ** 2], 1),
    "one of a batch": lambda x: torch.stack([x, x + x.square()]),
    "float64": lambda x: x.double() + 1e-9,
}


@READERS
@pytest.mark.parametrize("change", CHANGES)
def test_products_of_an_earlier_sample_are_not_used(stage, change):
    td = tg.SampleSpectrum()(TensorDict(sample=rows()))
    td["sample"] = CHANGES[change](rows())
    alone = stage()(TensorDict(sample=td["sample"]))
    assert_same(stage()(td), alone, stage, rtol=0, atol=0)


@READERS
def test_products_without_the_fingerprint_are_not_used(stage):
    false = TensorDict(sample=rows(), sample_eigenvalues=torch.ones(6), sample_covariance=torch.eye(6))
    assert_same(stage()(false), stage()(TensorDict(sample=rows())), stage, rtol=0, atol=0)


@READERS
def test_a_stage_between_that_changes_the_sample(stage):
    halved = TensorDictModule(
        lambda x: x * torch.linspace(0.5, 2, 6), in_keys=["sample"], out_keys=["sample"]
    )
    td = TensorDictSequential(tg.SampleSpectrum(), halved, stage())(TensorDict(sample=rows()))
    assert_same(td, stage()(TensorDict(sample=rows() * torch.linspace(0.5, 2, 6))), stage, rtol=0, atol=0)


@READERS
def test_a_batch_of_samples_and_each_of_them_alone(stage):
    samples = torch.stack([rows(seed=0), rows(seed=1)])
    td = tg.SampleSpectrum()(TensorDict(sample=samples))
    assert td["sample_fingerprint"].shape == (2,)
    together = stage()(td)
    for i in range(2):
        one = stage()(TensorDict({key: td[key][i] for key in ("sample", *PRODUCTS)}))
        for key in stage().out_keys:
            torch.testing.assert_close(together[key][i], one[key], rtol=1e-5, atol=1e-7, equal_nan=True)


def test_the_default_analysis_decomposes_each_sample_once(monkeypatch):
    from tdgeom.measures import sample_metrics

    seen = []
    covariance_of = sample_metrics.covariance_of
    monkeypatch.setattr(sample_metrics, "covariance_of", lambda x: seen.append(1) or covariance_of(x))
    td = tg.SampleSpectrum()(TensorDict(sample=rows()))
    assert len(seen) == 2  # of the rows and of the unit rows
    tg.SampleMetrics()(td)
    tg.NormalizationAblation()(td)
    assert len(seen) == 2


@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 9), st.sampled_from(
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int16, torch.uint8, torch.bool]
))  # fmt: skip
def test_fingerprints(seed, n, d, dtype):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(2, n, d, generator=g) * 3).to(dtype)
    mark = fingerprint(x)
    assert mark.shape == (2,) and mark.dtype == torch.int64
    assert torch.equal(mark, fingerprint(x.mT.contiguous().mT)) and mark[1] == fingerprint(x[1])
    place = tuple(int(torch.randint(size, (), generator=g)) for size in x.shape)
    other = x.clone()
    other[place] = other[place].logical_not() if dtype == torch.bool else other[place] + 1
    same = fingerprint(other) == mark
    assert bool(same[1 - place[0]]) and not bool(same[place[0]])
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(fingerprint(x), mark)
    finally:
        torch.set_num_threads(threads)


def test_fingerprints_under_vmap_and_compile():
    x = torch.randn(3, 50, 4)
    assert torch.equal(torch.vmap(fingerprint)(x), fingerprint(x))
    assert torch.equal(torch.compile(fingerprint, fullgraph=True, backend="aot_eager")(x), fingerprint(x))
    assert fingerprint(x.requires_grad_()).requires_grad is False


def moments_of(x, **settings):
    return tg.StreamingCovariance(**settings)(TensorDict(tokens=x)).select("moments")


def products_beside(sample, moments, monkeypatch):
    """What ``SampleSpectrum`` writes beside these moments, and how many products of rows it took."""
    whole = tg.EigenSpectrum(k=2)(moments.clone())
    taken, own = [], sample_metrics_file.covariance_of
    monkeypatch.setattr(sample_metrics_file, "covariance_of", lambda rows: taken.append(rows) or own(rows))
    found = tg.SampleSpectrum()(whole.update(TensorDict(sample=sample)))
    monkeypatch.undo()
    return found, len(taken)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_sample_of_all_rows_has_their_covariance_and_takes_no_product_of_its_own(offset, monkeypatch):
    x = rows(200, 12) + offset
    x[:, 3] = 0.1  # a constant feature has no variance, also where the stream's mean is rounded
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    found, taken = products_beside(x[order], moments_of(x), monkeypatch)
    exact = torch.from_numpy(np.cov(x.double().numpy().T))
    assert taken == 1  # of the unit rows
    torch.testing.assert_close(found["sample_covariance"], exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        found["sample_eigenvalues"], torch.linalg.eigvalsh(exact).flip(-1).clamp(min=0), rtol=1e-9, atol=1e-8
    )
    assert found["sample_covariance"][3].abs().max() == 0
    alone = tg.NormalizationAblation()(TensorDict(sample=x[order]))
    assert_same(tg.NormalizationAblation()(found), alone, tg.NormalizationAblation, rtol=1e-7, atol=1e-9)


OTHERS = {
    **{name: change for name, change in CHANGES.items() if name not in ("float64", "one of a batch")},
    "as many other rows": lambda x: rows(len(x), x.shape[-1], seed=5),
    "scaled": lambda x: 1.0001 * x,
    "moved": lambda x: x + 1e-3,
}


@pytest.mark.parametrize("change", OTHERS)
def test_moments_of_other_rows_are_not_the_samples(change, monkeypatch):
    x = rows()
    found, taken = products_beside(x, moments_of(OTHERS[change](x)), monkeypatch)
    assert taken == 2
    for key, value in zip(tg.SampleSpectrum().out_keys, tg.SampleSpectrum()(sample=x)):
        assert torch.equal(found[key], value)


@pytest.mark.parametrize("settings", [{"halflife": 20.0}, {"precision": "float32"}])
def test_moments_that_forget_or_are_rounded_are_not_the_samples(settings, monkeypatch):
    assert products_beside(rows(), moments_of(rows(), **settings), monkeypatch)[1] == 2


def test_cka_takes_a_covariance_of_its_rows_and_of_no_others():
    sites = ["a", "b"]
    td = TensorDict(sample={"a": rows(), "b": rows(seed=1) + 0.3 * rows() + 7})
    cka = tg.ForEachPair(tg.LinearCKA(estimator="both"), sites)
    alone = cka(td.clone())
    shared = tg.ForEach(tg.SampleSpectrum(), sites)(td.clone())
    for key, value in cka(shared.clone()).select(*cka.out_keys).items(True, True):
        torch.testing.assert_close(value, alone[key], rtol=1e-12, atol=1e-12)
    shared["sample_covariance", "a"] *= 2
    biased = ("between", "a->b", "linear_cka")
    torch.testing.assert_close(cka(shared.clone())[biased], alone[biased] / 2, rtol=1e-12, atol=0)
    shared["sample", "a"] = shared["sample", "a"].flip(0)
    shared["sample", "b"] = shared["sample", "b"].flip(0)
    assert torch.isclose(cka(shared)[biased], alone[biased], rtol=1e-12, atol=0)


def test_each_feature_in_an_order_of_its_own_is_another_sample(monkeypatch):
    """The same means and variances, and another covariance: the usual null of shuffled features."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 2, generator=generator) @ torch.randn(2, 8, generator=generator)
    shuffled = torch.stack([x[torch.randperm(300, generator=generator), j] for j in range(8)], 1)
    found, taken = products_beside(shuffled, moments_of(x), monkeypatch)
    assert taken == 2
    exact = torch.from_numpy(np.cov(shuffled.double().numpy().T))
    torch.testing.assert_close(found["sample_covariance"], exact, rtol=1e-9, atol=1e-12)
