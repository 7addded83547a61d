"""Streaming mean and variance against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

import tdgeom as tg


def leaves(stage):
    td = stage.publish(TensorDict({}))
    return td["mean", "mean"], td["mean", "variance"], td["mean", "count"]


@given(
    st.integers(0, 10_000),
    st.integers(2, 50),
    st.sampled_from([(), (3,), (2, 3)]),
    st.lists(st.integers(0, 50), max_size=5),
    st.integers(1, 3),
    st.sampled_from([0.0, 1000.0]),
)
def test_any_split_and_merge(seed, n, shape, cuts, shards, offset):
    rows = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset
    stages = [tg.StreamingMean() for _ in range(shards)]
    for i, part in enumerate(torch.tensor_split(rows, sorted(min(cut, n) for cut in cuts))):
        stages[i % shards].update(TensorDict(tokens=part))
    whole = tg.StreamingMean()
    for stage in reversed(stages):
        whole.merge_(stage)
    mean, variance, count = leaves(whole)
    np.testing.assert_allclose(mean, rows.numpy().mean(0), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(variance, rows.numpy().var(0, ddof=1), rtol=1e-9)
    assert int(count) == n and mean.shape == shape


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.bfloat16])
def test_any_type_counts_as_numbers(dtype):
    rows = (torch.randn(30) > 0).to(dtype)
    mean, variance, _ = tg.StreamingMean()(tokens=rows)
    assert mean.dtype == torch.float64
    assert float(mean) == pytest.approx(float(rows.double().mean()))
    assert float(variance) == pytest.approx(float(rows.double().var()))


def test_one_row_has_no_variance():
    mean, variance, count = tg.StreamingMean()(tokens=torch.tensor([3.0]))
    assert (float(mean), int(count)) == (3.0, 1) and variance.isnan()


def test_other_shapes_are_refused_even_where_they_would_broadcast():
    stage = tg.StreamingMean()
    stage.update(TensorDict(tokens=torch.ones(4, 3)))
    for shape in ((4,), (4, 1), (4, 5)):
        with pytest.raises(ValueError, match=r"rows of shape \(3,\) and now gets 'tokens' of shape \(4,"):
            stage.update(TensorDict(tokens=torch.ones(shape)))
    assert int(stage.count) == 4


def test_merging_another_width_is_refused():
    a, b = tg.StreamingMean(), tg.StreamingMean()
    a.update(TensorDict(tokens=torch.ones(4, 3)))
    b.update(TensorDict(tokens=torch.ones(4, 1)))
    with pytest.raises(ValueError, match="they saw rows of different width"):
        a.merge_(b)


def test_a_scalar_is_no_row():
    with pytest.raises(ValueError, match=r"'tokens'.*\(\)"):
        tg.StreamingMean()(TensorDict(tokens=torch.tensor(1.0)))
