"""Router load against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

import tdgeom as tg
from tdgeom import functional as F


@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(2, 9), st.integers(1, 4))
def test_against_numpy(seed, n, experts, top_k):
    logits = torch.randn(n, experts, generator=torch.Generator().manual_seed(seed)) * 2
    td = tg.RouterLoad(top_k=top_k)(TensorDict(tokens=logits))
    x, k = logits.double().numpy(), min(top_k, experts)
    counts = np.bincount(np.argsort(-x, axis=1)[:, :k].ravel(), minlength=experts)
    load = counts / counts.sum()
    entropy = -(load[load > 0] * np.log(load[load > 0])).sum()
    probability = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    np.testing.assert_allclose(td["router", "load"], load, rtol=1e-12)
    np.testing.assert_allclose(td["router", "mean_probability"], probability.mean(0), rtol=1e-10)
    assert float(td["router", "router_entropy"]) == pytest.approx(entropy, rel=1e-10, abs=1e-12)
    norm = float(td["router", "router_entropy_norm"])
    assert norm == pytest.approx(entropy / np.log(experts), rel=1e-10, abs=1e-12)
    assert float(td["router", "load_imbalance"]) == pytest.approx(load.max() * experts)
    assert float(td["router", "top_expert_load"]) == pytest.approx(load.max())
    assert int(td["router", "most_used_expert"]) == load.argmax()
    assert int(td["router", "routed_assignments"]) == n * k


def test_even_load():
    td = tg.RouterLoad(top_k=1)(TensorDict(tokens=torch.eye(4)))
    assert float(td["router", "router_entropy"]) == pytest.approx(np.log(4))
    assert float(td["router", "router_entropy_norm"]) == pytest.approx(1)
    assert float(td["router", "load_imbalance"]) == pytest.approx(1)


def test_one_expert_has_no_normalised_entropy():
    td = tg.RouterLoad()(TensorDict(tokens=torch.zeros(3, 1)))
    assert td["router", "router_entropy_norm"].isnan() and int(td["router", "routed_assignments"]) == 3


def test_batched_counts():
    counts = torch.tensor([[1, 1, 2], [5, 0, 0]])
    together = F.router_load(counts)
    for i in range(2):
        for name, value in F.router_load(counts[i]).items():
            torch.testing.assert_close(together[name][i], value, equal_nan=True)


def test_split_merge_and_settings():
    logits = torch.randn(50, 6)
    whole = tg.RouterLoad()(TensorDict(tokens=logits))
    a, b = tg.RouterLoad(), tg.RouterLoad()
    for rows in logits[:30].split(7):
        a.update(TensorDict(tokens=rows))
    b.update(TensorDict(tokens=logits[30:]))
    merged = a.merge_(b).publish(TensorDict({}))
    for key in a.out_keys:
        torch.testing.assert_close(merged[key], whole[key], rtol=1e-12, atol=0)
    with pytest.raises(
        ValueError,
        match=r"RouterLoad\(\) cannot merge RouterLoad\(top_k=1\).*top_k is 1 there and 2 here",
    ):
        a.merge_(tg.RouterLoad(top_k=1))
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        tg.RouterLoad(top_k=0)


def test_another_number_of_experts_is_refused():
    stage = tg.RouterLoad()
    stage.update(TensorDict(tokens=torch.randn(4, 6)))
    with pytest.raises(
        ValueError, match=r"has seen rows of 6 experts and now gets 'tokens' of shape \(4, 5\)"
    ):
        stage.update(TensorDict(tokens=torch.randn(4, 5)))
    assert int(stage.counts.sum()) == 8, "a refused block must leave no trace"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(dtype):
    logits = torch.randn(40, 5).to(dtype)
    half = tg.RouterLoad(top_k=1)(TensorDict(tokens=logits))
    full = tg.RouterLoad(top_k=1)(TensorDict(tokens=logits.float()))
    assert torch.equal(half["router", "load"], full["router", "load"])
    assert half["router", "mean_probability"].dtype == torch.float64
    torch.testing.assert_close(half["router", "mean_probability"], full["router", "mean_probability"])


def test_the_choice_is_counted_where_it_is_told():
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
    chosen = torch.randint(-1, 6, (40, 3), generator=torch.Generator().manual_seed(4))
    expected = torch.bincount(chosen[chosen >= 0], minlength=6)
    whole = tg.RouterLoad()(TensorDict(tokens=logits, chosen=chosen))["router"]
    assert int(whole["routed_assignments"]) == int(expected.sum())
    torch.testing.assert_close(whole["load"], expected.double() / expected.sum())
    parts = tg.RouterLoad()
    for rows in (slice(0, 7), slice(7, 40)):
        parts.update(TensorDict(tokens=logits[rows], chosen=chosen[rows]))
    assert torch.equal(parts.counts, expected)
    assert torch.equal(tg.RouterLoad()(tokens=logits, chosen=chosen)[5], whole["routed_assignments"])


def test_a_model_that_does_not_tell_is_said():
    logits = torch.randn(10, 4)
    with pytest.warns(UserWarning, match="does not tell which experts its router chose"):
        found = tg.RouterLoad(top_k=1)(
            TensorDict(tokens=logits, chosen=torch.empty(10, 0, dtype=torch.int64))
        )
    torch.testing.assert_close(
        found["router", "load"], torch.bincount(logits.argmax(-1), minlength=4).double() / 10
    )


def test_rows_of_logits_without_a_choice_beside_them():
    td = TensorDict({"acts": {"router_logits.0": torch.randn(2, 5, 4)}})
    rows = tg.SelectTokens(["router_logits.0"])(td)
    assert rows["chosen", "router_logits.0"].shape == (10, 0)
    with pytest.warns(UserWarning, match="does not tell"):
        tg.ForEach(tg.RouterLoad(), ["router_logits.0"])(rows)
