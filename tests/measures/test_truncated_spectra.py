"""Spectra of which only the leading part is known: what reads them uses what is known, or says what it lacks."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

import tdgeom as tg
from tdgeom import functional as F
from tdgeom.measures.spectrum_metrics import SPECTRUM_MARKS, SPECTRUM_METRICS

OF_D_PR = ("d_pr", "d_pr_norm", "isoscore")
OF_THE_LEADING = ("stable_rank", "top1_share", "top10_share", "top32_share")
OF_ALL = ("d_entropy", "d_entropy_norm", "effective_rank")


def rows(n=4000, d=150, decay=1.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, d + 1, dtype=torch.float64) ** (-decay / 2)
    mixed = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0]
    return torch.randn(n, d, generator=g, dtype=torch.float64) * scales @ mixed + 3


def decaying(d, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(d, generator=g, dtype=torch.float64).sort(descending=True).values + 0.01


def read_from_a_sketch(x, **settings):
    pipeline = TensorDictSequential(tg.StreamingSketch(**settings), tg.SpectrumMetrics(source="sketch"))
    return tg.run(pipeline, [{"tokens": part} for part in x.split(700)], progress=False)["spectrum"]


@pytest.mark.parametrize("decay", [1.0, 2.0])
def test_what_a_sketch_knows_against_a_full_decomposition(decay):
    x = rows(decay=decay)
    truth = F.spectrum_metrics(torch.linalg.eigvalsh(torch.cov(x.mT)))
    with pytest.warns(
        tg.UndefinedMeasureWarning, match="40 leading of 150 eigenvalues, which leave d_ent"
    ) as caught:
        found = read_from_a_sketch(x, k=40, size=120, probes=64)
    assert len(caught) == 1
    assert set(found.keys()) == {*SPECTRUM_METRICS, *SPECTRUM_MARKS}
    for name in OF_D_PR:
        assert float(found[name]) == pytest.approx(float(truth[name]), rel=0.05), name
    for name in OF_THE_LEADING:
        assert float(found[name]) == pytest.approx(float(truth[name]), rel=0.03), name
    for name in ("top1_share", "top10_share", "top32_share"):
        assert found[name] <= truth[name] + 1e-9, name
    for name in (*OF_ALL, "log_spectrum_slope_10_200", "alpha_req"):
        assert found[name].isnan() and name in str(caught[0].message), name
    for name in ("k90", "k95", "k99"):
        reached = int(truth[name]) <= 35
        assert (
            abs(int(found[name]) - int(truth[name])) <= 1 if reached else int(found[name]) in (-1, 38, 39, 40)
        )
    assert bool(found["near_rank1"]) == bool(truth["near_rank1"])


def test_a_rank_one_stream_is_seen_as_one():
    x = rows()[:, :1] * torch.ones(60, dtype=torch.float64) + 1e-3 * rows()[:, :60]
    with pytest.warns(tg.UndefinedMeasureWarning, match="2 leading of 60"):
        found = read_from_a_sketch(x, k=2, size=16)
    assert bool(found["near_rank1"]) and int(found["k99"]) == 1


def test_a_sketch_that_knows_every_eigenvalue_gives_every_measure():
    x = rows(d=30)
    expected = F.spectrum_metrics(torch.linalg.eigvalsh(torch.cov(x.mT)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_from_a_sketch(x, k=32, size=64)
    for name in SPECTRUM_METRICS:
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-6), name


def test_slopes_within_the_known_part_are_given():
    values = decaying(150)
    known = torch.where(torch.arange(150) < 120, values, torch.nan)
    whole, part = F.spectrum_metrics(values), F.spectrum_metrics(known, total_variance=values.sum())
    assert part["alpha_req"] == whole["alpha_req"]  # ranks 11 to 100
    assert part["log_spectrum_slope_10_200"].isnan()  # ranks 10 to 149


@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(1, 59))
def test_nothing_unknown_is_made_up(seed, d, k):
    """Given the true total and d_pr, every measure of a part is that of the whole, or undefined."""
    values = decaying(d, seed)
    whole = F.spectrum_metrics(values)
    known = torch.where(torch.arange(d) < k, values, torch.nan)[torch.randperm(d)]
    part = F.spectrum_metrics(known, total_variance=values.sum(), d_pr=whole["d_pr"])
    for name in SPECTRUM_METRICS:
        undefined = part[name].isnan() if part[name].is_floating_point() else part[name] == -1
        same = torch.isclose(part[name].double(), whole[name].double(), rtol=1e-9, atol=0, equal_nan=True)
        assert bool(undefined) or bool(same), name
    assert k >= d or part["d_entropy"].isnan()


@pytest.mark.parametrize("batched", [False, True])
def test_a_part_is_refused_where_the_whole_is_read(batched):
    part = torch.where(torch.arange(64) < 8, decaying(64), torch.nan)
    values = torch.stack([decaying(64), part]) if batched else part
    with pytest.raises(
        ValueError,
        match=r"SpectrumMetrics expects a whole spectrum at 'eigenvalues', got the 8 leading of 64.*"
        r"StreamingCovariance and EigenSpectrum.*source='sketch'",
    ):
        tg.SpectrumMetrics()(eigenvalues=values)
    with pytest.raises(ValueError, match=r"whole spectrum at \('sketch', 'eigenvalues'\)"):
        td = tg.StreamingSketch(k=8, size=16)(TensorDict(tokens=rows(300, 64)))
        tg.SpectrumMetrics(in_keys=("sketch", "eigenvalues"))(td)


@pytest.mark.parametrize("read", [F.pca_dimension, F.ca_pca_dimension, tg.GlobalPCA(source="eigenvalues")])
def test_dimensions_of_a_part_are_refused_and_of_nothing_undefined(read):
    part = torch.where(torch.arange(64) < 8, decaying(64), torch.nan)
    with pytest.raises(ValueError, match="whole spectrum at 'eigenvalues', got the 8 leading of 64"):
        read(torch.stack([decaying(64), part]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tg.UndefinedMeasureWarning)
        found = read(torch.stack([decaying(64), torch.full((64,), torch.nan)]))
    estimate = found if isinstance(found, torch.Tensor) else found[0]
    assert estimate[0] > 0 and estimate[1].isnan()


def test_a_picture_of_shares_needs_the_whole():
    pytest.importorskip("matplotlib").use("Agg")
    part = torch.where(torch.arange(64) < 8, decaying(64), torch.nan)
    with pytest.raises(ValueError, match="'x' has 8 of 64 eigenvalues .*normalize=False draws those"):
        tg.plot.spectrum({"x": part})
    line = tg.plot.spectrum({"x": part}, normalize=False).get_lines()[0]
    assert line.get_ydata().tolist() == part[:8].tolist()


def test_all_unknown_is_undefined_and_no_part():
    with pytest.warns(tg.UndefinedMeasureWarning, match="'eigenvalues' is NaN"):
        tg.SpectrumMetrics()(eigenvalues=torch.full((9,), torch.nan))
    with pytest.warns(tg.UndefinedMeasureWarning) as caught:
        found = tg.SpectrumMetrics(source="sketch")(
            tg.StreamingSketch(k=4, size=8)(TensorDict(tokens=torch.ones(30, 20)))
        )
    assert [str(one.message).split()[0] for one in caught] == ["StreamingSketch", "SpectrumMetrics:"]
    assert found["spectrum", "d_pr"].isnan() and int(found["spectrum", "k90"]) == -1


def test_at_sites_and_under_another_root():
    sites = ["x", "y"]
    pipeline = TensorDictSequential(
        tg.ForEach(tg.StreamingSketch(k=16, size=32, out_keys="s"), sites),
        tg.ForEach(
            tg.SpectrumMetrics(
                source="sketch",
                in_keys=[("s", "eigenvalues"), ("s", "total_variance"), ("s", "d_pr")],
                out_keys="found",
            ),
            sites,
        ),
    )
    x = rows(d=12)
    td = pipeline(TensorDict({("tokens", "x"): x, ("tokens", "y"): x[:, :5]}))
    for site, values in (("x", x), ("y", x[:, :5])):
        expected = F.spectrum_metrics(torch.linalg.eigvalsh(torch.cov(values.mT)))
        assert float(td["found", site, "d_entropy"]) == pytest.approx(float(expected["d_entropy"]), rel=1e-9)
    with pytest.raises(ValueError, match="source is 'eigenvalues' or 'sketch', got 'moments'"):
        tg.SpectrumMetrics(source="moments")
