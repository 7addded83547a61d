"""The sketched spectrum against a full eigendecomposition, and the bound it gives of its own error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from tdgeom.core.warnings import UndefinedMeasureWarning
from tdgeom.stream.sketch import StreamingSketch


def rows(n=600, d=300, decay=1.5, offset=0.0, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, d + 1, dtype=torch.float64) ** (-decay / 2)
    mixed = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0]
    return ((torch.randn(n, d, generator=g, dtype=torch.float64) * scales) @ mixed + offset).to(dtype)


def spectrum(x):
    values, vectors = np.linalg.eigh(np.cov(x.double().numpy().T))
    return torch.from_numpy(values[::-1].copy()), torch.from_numpy(vectors[:, ::-1].copy())


def sketched(x, size=64, batch=100, **kwargs):
    stage = StreamingSketch(size=size, **{"k": 16, **kwargs})
    for start in range(0, len(x), batch):
        stage.update(TensorDict({"tokens": x[start : start + batch]}))
    return stage


def published(stage):
    return stage.publish(TensorDict({}))["sketch"]


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_no_eigenvalue_is_too_large_or_further_off_than_the_bound(decay, seed):
    x = rows(decay=decay, seed=seed)
    truth, _ = spectrum(x)
    out = published(sketched(x, seed=seed))
    missing = truth[:16] - out["eigenvalues"][:16]
    assert missing.min() > -1e-9 * truth[0]
    assert missing.max() <= out["error_bound"]
    assert out["error_bound"] < truth.sum()


def test_the_bound_tells_a_good_sketch_from_a_bad_one():
    steep, flat = rows(decay=4.0), rows(decay=0.0)
    good, bad = published(sketched(steep)), published(sketched(flat))
    assert good["error_bound"] < 1e-2 * good["eigenvalues"][0]
    assert bad["error_bound"] > bad["eigenvalues"][0]
    truth, vectors = spectrum(steep)
    torch.testing.assert_close(good["eigenvalues"][:4], truth[:4], rtol=1e-4, atol=0)
    aligned = (good["eigenvectors"][:, :4] * vectors[:, :4]).sum(0).abs()
    assert aligned.min() > 0.999
    largest = good["eigenvectors"].gather(0, good["eigenvectors"].abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0, 10, 1000])
def test_covariance_of_low_rank_is_found_exactly(dtype, offset):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 12, generator=g, dtype=torch.float64) @ torch.randn(
        12, 200, generator=g, dtype=torch.float64
    )
    x = (x + offset).to(dtype)
    truth, _ = spectrum(x)
    out = published(sketched(x, k=12))
    torch.testing.assert_close(
        out["eigenvalues"][:12], truth[:12], rtol=1e-6 if dtype == torch.float32 else 1e-9, atol=0
    )
    assert out["error_bound"] < 1e-4 * truth[0]


@pytest.mark.parametrize("batch", [1, 64, 599, 600])
def test_total_variance_mean_and_count_are_exact(batch):
    x = rows(offset=1000)
    out = published(sketched(x, batch=batch))
    assert out["count"] == 600
    torch.testing.assert_close(out["mean"], x.mean(0), rtol=1e-12, atol=0)
    assert out["total_variance"].item() == pytest.approx(np.trace(np.cov(x.numpy().T)), rel=1e-10)


@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
def test_participation_ratio_is_unbiased_and_knows_its_error(decay):
    x = rows(decay=decay)
    truth, _ = spectrum(x)
    expected = truth.sum() ** 2 / truth.square().sum()
    runs = [published(sketched(x, size=32, batch=600, seed=seed)) for seed in range(40)]
    values = torch.stack([run["d_pr"] for run in runs])
    errors = torch.stack([run["d_pr_standard_error"] for run in runs])
    assert (values.mean() - expected).abs() < 3.5 * values.std() / 40**0.5
    assert 0.6 < errors.square().mean().sqrt() / values.std() < 1.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_order_and_merging_change_nothing(dtype):
    x = rows(offset=100, dtype=dtype)
    whole = published(sketched(x, batch=600))
    turned = x[torch.randperm(600)]
    merged = (
        sketched(turned[:1]).merge_(sketched(turned[1:130], batch=7)).merge_(sketched(turned[130:], batch=64))
    )
    found = published(merged)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    for name in ("mean", "eigenvalues", "total_variance", "d_pr", "error_bound"):
        torch.testing.assert_close(
            found[name], whole[name], rtol=tolerance, atol=1e-9, msg=name, equal_nan=True
        )
    with pytest.raises(ValueError, match="same settings"):
        merged.merge_(sketched(x, seed=1))


def test_a_massive_feature_does_not_hide_the_rest():
    x = rows(2000, 200, 2.0)
    x[:, 7] += 1500 * torch.randn(2000, dtype=torch.float64)
    truth, _ = spectrum(x)
    out = published(sketched(x.float(), size=128, batch=500))
    torch.testing.assert_close(out["eigenvalues"][:4], truth[:4], rtol=2e-3, atol=0)


def test_state_is_small_survives_a_state_dict_and_compiles():
    x = rows()
    stage = sketched(x[:300])
    assert sum(b.numel() for b in stage.buffers()) == 300 * (64 + 32) + 300 + 2
    other = StreamingSketch(size=64, k=16)
    other.load_state_dict(stage.state_dict())
    other.half()
    torch.compile(stage.update, fullgraph=True, backend="eager")(TensorDict({"tokens": x[300:]}))
    other.update(TensorDict({"tokens": x[300:]}))
    a, b = published(stage), published(other)
    for name in a.keys():
        torch.testing.assert_close(a[name], b[name], msg=name, equal_nan=True)


def test_eigenvalues_are_as_many_as_features_and_nan_beyond_what_is_known():
    x = rows()
    out = published(sketched(x))
    assert out["eigenvalues"].shape == (300,) and out["eigenvectors"].shape == (300, 16)
    assert out["eigenvalues"][:16].isfinite().all() and out["eigenvalues"][16:].isnan().all()
    whole = published(sketched(x[:, :10]))
    torch.testing.assert_close(whole["eigenvalues"], spectrum(x[:, :10])[0], rtol=1e-9, atol=0)
    few = published(sketched(x[:9]))  # nine rows have eight directions, and the others are known to be 0
    torch.testing.assert_close(few["eigenvalues"][:8], spectrum(x[:9])[0][:8], rtol=1e-9, atol=0)
    assert (few["eigenvalues"][8:] == 0).all()


def test_rows_of_another_width_after_a_reset():
    stage = sketched(rows(d=300))
    stage.reset()
    narrow = rows(d=50)
    stage.update(TensorDict({"tokens": narrow}))
    out = published(stage)
    torch.testing.assert_close(out["eigenvalues"][:16], spectrum(narrow)[0][:16], rtol=1e-9, atol=0)


def test_no_variance_is_nan_with_a_warning():
    stage = sketched(torch.full((20, 100), 0.1, dtype=torch.float64))
    with pytest.warns(UndefinedMeasureWarning, match="no variance over 20 rows"):
        out = published(stage)
    assert out["d_pr"].isnan() and out["eigenvalues"].isnan().all()
    with pytest.warns(UndefinedMeasureWarning, match="over 1 rows"):
        published(sketched(rows()[:1]))


def test_mistakes_say_what_to_do():
    with pytest.raises(ValueError, match="k <= size"):
        StreamingSketch(k=32, size=16)
    with pytest.raises(ValueError, match="width 300"):
        sketched(rows()).update(TensorDict({"tokens": torch.zeros(3, 299)}))
