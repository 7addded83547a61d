"""One pass over rows equals NumPy over all of them, however the rows are split, ordered and merged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

import tdgeom as tg
from tdgeom import functional as F

LEAVES = ("count", "mean", "covariance", "norm4", "norm2_x")


def direct(rows):
    """The five leaves in float64 NumPy, from all rows at once."""
    x = rows.double().numpy()
    y = x - x.mean(0)
    size = (y**2).sum(1)
    return {
        "count": len(x),
        "mean": x.mean(0),
        "covariance": np.cov(x.T, ddof=1).reshape(x.shape[1], x.shape[1]),
        "norm4": (size**2).sum(),
        "norm2_x": (size[:, None] * y).sum(0),
    }


def streamed(rows, cuts=(), order=None, shards=1, shard_order=None):
    """The stage after seeing ``rows`` cut at ``cuts``, permuted, dealt to ``shards`` and merged."""
    rows = rows if order is None else rows[order]
    parts = torch.tensor_split(rows, sorted(cuts))
    stages = [tg.StreamingCovariance() for _ in range(shards)]
    for i, part in enumerate(parts):
        stages[i % shards].update(TensorDict(tokens=part))
    whole = tg.StreamingCovariance()
    for i in shard_order if shard_order is not None else range(shards):
        whole.merge_(stages[i])
    return whole


def moments(stage):
    td = stage.publish(TensorDict({}))
    return {name: td["moments", name] for name in LEAVES}


def assert_close(found, expected, rel):
    """Relative to the size of each leaf: an entry may cancel to nearly nothing."""
    assert int(found["count"]) == expected["count"]
    spread = np.sqrt(np.trace(expected["covariance"]))
    scale = {
        "mean": max(np.abs(expected["mean"]).max(), spread),
        "covariance": np.abs(expected["covariance"]).max(),
        "norm4": expected["norm4"],
        "norm2_x": spread**3 * expected["count"],
    }
    for name in LEAVES[1:]:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=rel * scale[name], err_msg=name)


splits = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "n": st.integers(4, 60),
        "d": st.integers(1, 7),
        "offset": st.sampled_from([0.0, 10.0, 1000.0]),
        "cuts": st.lists(st.integers(0, 60), max_size=6),
        "shards": st.integers(1, 4),
    }
)


def make(case, dtype):
    generator = torch.Generator().manual_seed(case["seed"])
    scale = torch.rand(case["d"], generator=generator, dtype=torch.float64) * 3 + 0.1
    rows = torch.randn(case["n"], case["d"], generator=generator, dtype=torch.float64) * scale
    order = torch.randperm(case["n"], generator=generator)
    shards = torch.randperm(case["shards"], generator=generator).tolist()
    return (rows + case["offset"]).to(dtype), order, shards


@given(splits)
def test_any_split_order_and_merge_in_float64(case):
    rows, order, shards = make(case, torch.float64)
    cuts = [min(cut, case["n"]) for cut in case["cuts"]]
    found = moments(streamed(rows, cuts, order, case["shards"], shards))
    assert_close(found, direct(rows), 1e-10)


@given(splits)
def test_any_split_order_and_merge_in_float32(case):
    rows, order, shards = make(case, torch.float32)
    cuts = [min(cut, case["n"]) for cut in case["cuts"]]
    found = moments(streamed(rows, cuts, order, case["shards"], shards))
    expected = direct(rows)
    values, _ = F.eigen_spectrum(found["covariance"])
    exact = np.linalg.eigvalsh(expected["covariance"])[::-1]
    np.testing.assert_allclose(values, exact, rtol=0, atol=1e-5 * exact[0])
    assert_close(found, expected, 2e-6)


@pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0])
@pytest.mark.parametrize(("n", "batch"), [(300, 1), (2000, 7), (2000, 128), (2000, 2000)])
def test_every_eigenvalue_of_float32_rows_is_right_to_1e_5(offset, n, batch):
    rows = torch.randn(n, 24) * torch.linspace(0.3, 3, 24) + offset
    stage = tg.StreamingCovariance()
    for part in rows.split(batch):
        stage.update(TensorDict(tokens=part))
    values, _ = F.eigen_spectrum(moments(stage)["covariance"])
    exact = np.linalg.eigvalsh(np.cov(rows.double().numpy().T))[::-1]
    np.testing.assert_allclose(values, exact, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_are_upcast_once(dtype):
    rows = (torch.randn(500, 6) + 200).to(dtype)
    stage = tg.StreamingCovariance()
    for part in rows.split(64):
        stage.update(TensorDict(tokens=part))
    assert_close(moments(stage), direct(rows), 1e-6)
    assert moments(stage)["covariance"].dtype == torch.float64


def test_integer_rows_count_as_numbers():
    rows = torch.randint(-5, 5, (40, 3))
    stage = tg.StreamingCovariance()
    stage.update(TensorDict(tokens=rows))
    assert_close(moments(stage), direct(rows), 1e-6)


@given(st.integers(-15, 15))
@settings(max_examples=15)
def test_scale_and_offset(exponent):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    s = 10.0**exponent
    plain, scaled = moments(streamed(rows, [20])), moments(streamed(rows * s + 3 * s, [13, 40]))
    for name, power in (("covariance", 2), ("norm4", 4), ("norm2_x", 3)):
        torch.testing.assert_close(scaled[name] / s**power, plain[name], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scaled["mean"] / s, plain["mean"] + 3, rtol=1e-12, atol=0)


def test_what_forward_writes_is_a_copy():
    stage = tg.StreamingCovariance()
    td = stage(TensorDict(tokens=torch.randn(9, 3)))
    before = {name: td["moments", name].clone() for name in LEAVES}
    stage(TensorDict(tokens=torch.randn(9, 3)))
    for name in LEAVES:
        assert torch.equal(td["moments", name], before[name]), name
        td["moments", name].zero_()
    assert int(stage.count) == 18 and stage.mean.abs().sum() > 0


def test_shards_without_rows_merge_to_nothing():
    stages = [tg.StreamingCovariance() for _ in range(3)]
    for stage in stages[:2]:
        stage.update(TensorDict(tokens=torch.zeros(0, 3)))
    assert stages[0].merge_(stages[1]).is_empty
    rows = torch.randn(5, 3, dtype=torch.float64)
    stages[2].update(TensorDict(tokens=rows))
    assert_close(moments(stages[0].merge_(stages[2])), direct(rows), 1e-12)


def test_one_row_is_undefined_with_one_warning():
    stage = tg.StreamingCovariance()
    with pytest.warns(tg.UndefinedMeasureWarning, match="covariance of one row is undefined") as caught:
        td = stage(TensorDict(tokens=torch.tensor([[1.0, 2.0]])))
    assert len(caught) == 1
    assert td["moments", "covariance"].isnan().all() and td["moments", "mean"].tolist() == [1, 2]
    td = stage(TensorDict(tokens=torch.tensor([[3.0, 2.0]])))
    assert td["moments", "covariance"].tolist() == [[2, 0], [0, 0]]


def test_rows_of_no_length_change_nothing():
    stage = tg.StreamingCovariance()
    stage.update(TensorDict(tokens=torch.zeros(0, 3)))
    rows = torch.randn(5, 3, dtype=torch.float64)
    stage.update(TensorDict(tokens=rows))
    stage.update(TensorDict(tokens=torch.zeros(0, 3)))
    assert_close(moments(stage), direct(rows), 1e-12)


def test_constant_rows_have_exactly_no_variance():
    stage = tg.StreamingCovariance()
    for _ in range(3):
        stage.update(TensorDict(tokens=torch.full((7, 2), 3.0)))
    found = moments(stage)
    assert found["covariance"].abs().max() == 0 and float(found["norm4"]) == 0


def test_errors():
    stage = tg.StreamingCovariance()
    with pytest.raises(ValueError, match=r"StreamingCovariance has seen no rows at \['tokens'\]"):
        stage.publish(TensorDict({}))
    stage.update(TensorDict(tokens=torch.randn(4, 3)))
    with pytest.raises(ValueError, match=r"rows of width 3 and now gets 'tokens' of shape \(4, 5\)"):
        stage.update(TensorDict(tokens=torch.randn(4, 5)))
    for seen in (stage, tg.StreamingCovariance()):
        with pytest.raises(ValueError, match=r"rows at 'tokens', \(N, D\), got \(2, 4, 3\). SelectTokens"):
            seen(tokens=torch.randn(2, 4, 3))
    other = tg.StreamingCovariance()
    other.update(TensorDict(tokens=torch.randn(4, 5)))
    with pytest.raises(ValueError, match="they saw rows of different width"):
        stage.merge_(other)
    with pytest.raises(ValueError, match=r"StreamingCovariance.* cannot merge StreamingMean"):
        stage.merge_(tg.StreamingMean())
    with pytest.raises(ValueError, match=r"'tokens' \(shape \(2, 3\)\) holds NaN or Inf.*nonfinite='drop'"):
        stage(TensorDict(tokens=torch.tensor([[1.0, 2.0, torch.nan], [1.0, 2.0, 3.0]])))
    assert int(stage.count) == 4


def test_merge_leaves_the_other_alone_and_empty_ones_count_for_nothing():
    rows = torch.randn(20, 3, dtype=torch.float64)
    a, b, empty = (tg.StreamingCovariance() for _ in range(3))
    a.update(TensorDict(tokens=rows[:7]))
    b.update(TensorDict(tokens=rows[7:]))
    before = {name: value.clone() for name, value in b.state_dict().items()}
    assert empty.merge_(tg.StreamingCovariance()).is_empty
    empty.merge_(a).merge_(b).merge_(tg.StreamingCovariance())
    assert_close(moments(empty), direct(rows), 1e-12)
    a.update(TensorDict(tokens=rows[7:]))
    for name, value in b.state_dict().items():
        assert torch.equal(value, before[name])
    assert_close(moments(empty), direct(rows), 1e-12)
    assert_close(moments(a), direct(rows), 1e-12)


def test_covariance_function_is_numpys():
    rows = torch.randn(2, 30, 4, dtype=torch.float64) + 100
    for found, x in zip(F.covariance(rows), rows):
        np.testing.assert_allclose(found, np.cov(x.numpy().T), rtol=1e-10)
    assert F.covariance(rows.half()).dtype == torch.float64  # the square of 1e-24 is no float32 number
