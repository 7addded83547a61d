"""Copies up to rounding against a plain loop over rows: which row stands for which, whatever the unit, never in chains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tdgeom as tg
from tdgeom.numerics import near_copies as module
from tdgeom.numerics.near_copies import near_copies, rounding_radius

TIMES = {torch.float64: 64, torch.float32: 64, torch.bfloat16: 4, torch.float16: 4}


def by_loops(x: np.ndarray, radius: float) -> np.ndarray:
    """The first row stands for all within ``radius`` times its norm."""
    leader = np.arange(len(x))
    for i, row in enumerate(x):
        if leader[i] == i:
            near = np.linalg.norm(x - row, axis=1) <= radius * np.linalg.norm(row)
            free = near & (leader == np.arange(len(x))) & (np.arange(len(x)) > i)
            leader[free] = i
    return leader


def repeats(seed: int, n: int, width: int, radius: float, spread: float) -> torch.Tensor:
    """n rows, and n that lie around a few of them at up to ``spread`` times the radius; in any order; float64."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, width, generator=g, dtype=torch.float64)
    again = rows[torch.randint(max(1, n // 4), (n,), generator=g)]
    noise = torch.nn.functional.normalize(torch.randn(n, width, generator=g, dtype=torch.float64), dim=-1)
    size = again.norm(dim=-1, keepdim=True) * radius * spread
    again = again + noise * size * torch.rand(n, 1, generator=g, dtype=torch.float64)
    return torch.cat((rows, again))[torch.randperm(2 * n, generator=g)]


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**20),
    n=st.integers(1, 150),
    width=st.sampled_from([1, 2, 3, 20, 70]),
    dtype=st.sampled_from(list(TIMES)),
    spread=st.sampled_from([0.5, 1.5, 4.0]),
    exponent=st.sampled_from([0, -24, 19]),
    offset=st.sampled_from([0.0, 100.0]),
)
def test_the_rule_by_loops(seed, n, width, dtype, spread, exponent, offset):
    radius = rounding_radius(dtype)
    offset = (
        0.0 if torch.finfo(dtype).bits == 16 else offset
    )  # which hides the rows' spread in half precision
    assert radius == TIMES[dtype] * torch.finfo(dtype).eps
    x = (repeats(seed, n, width, radius, spread) + offset) * 10.0**exponent
    x = x if dtype == torch.float64 else x.float()
    np.testing.assert_array_equal(near_copies(x, radius).numpy(), by_loops(x.double().numpy(), radius))


@pytest.mark.parametrize("few", [0, 10**9])  # every pair of rows by products, or by windows
def test_both_ways_to_find_candidates_are_one(monkeypatch, few):
    monkeypatch.setattr(module, "_FEW", few)
    for dtype in (torch.float32, torch.bfloat16):
        radius = rounding_radius(dtype)
        x = repeats(3, 200, 12, radius, 1.2).float()
        np.testing.assert_array_equal(near_copies(x, radius).numpy(), by_loops(x.double().numpy(), radius))


def test_clusters_are_no_wider_than_twice_the_radius():
    """A chain of rows, each within the radius of the next."""
    radius = rounding_radius(torch.float32)
    x = torch.ones(200, 4, dtype=torch.float64)
    x[:, 1] += torch.arange(200) * radius
    x = x[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    leader = near_copies(x, radius)
    assert 1 < len(leader.unique()) < 200
    for first in leader.unique():
        cluster = x[leader == first]
        assert torch.cdist(cluster, cluster).max() <= 2 * radius * x[first].norm() * (1 + 1e-6)
        assert (leader == first).nonzero().min() == first


def test_a_large_cluster_is_settled_by_its_first_row(monkeypatch):
    """4,000 roundings of one row: 8 million pairs, of which few are compared."""
    compared = []
    original = module.pair_distances
    monkeypatch.setattr(
        module, "pair_distances", lambda x, i, j: compared.append(len(i)) or original(x, i, j)
    )
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 32, generator=g) * (1 + 1e-7 * torch.randn(4000, 32, generator=g))
    assert (near_copies(x, rounding_radius(torch.float32)) == 0).all()
    assert sum(compared) < 200_000


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_a_mean_far_from_zero_makes_no_copies(offset):
    x = (torch.randn(300, 24, dtype=torch.float64) + offset).float()
    for estimator in (tg.functional.twonn, tg.functional.levina_bickel, tg.functional.gride):
        found, expected = estimator(x), estimator(x.double())
        assert found.near_duplicates == 0
        torch.testing.assert_close(found.estimate, expected.estimate, rtol=1e-9, atol=0)


def test_whole_numbers_are_copies_only_where_equal():
    x = torch.tensor([[10**9, 0], [10**9 + 1, 0], [10**9, 0]])
    table = tg.functional.nearest_neighbors(x, 1)
    assert table.duplicates == 1 and table.near_duplicates == 0


@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float32, 25), (torch.bfloat16, 3.5)])
def test_repeats_as_far_apart_as_a_deep_model_leaves_them_move_no_estimate(dtype, roundings):
    """What six layers make of one sentence in batches of other shapes; rows ten times as far apart are rows of their own."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 6, generator=g) @ torch.randn(6, 48, generator=g) + torch.randn(
        400, 48, generator=g
    )
    rows = rows.to(dtype).double()
    aside = torch.nn.functional.normalize(torch.randn(40, 48, generator=g, dtype=torch.float64), dim=-1)
    step = aside * rows[:40].norm(dim=-1, keepdim=True) * torch.finfo(dtype).eps
    # half precision would round the step itself: the rows' own dtype only says which rule holds
    both = torch.cat((rows, rows[:40] + roundings * step))
    found = near_copies(both, rounding_radius(dtype))
    assert found[400:].tolist() == list(range(40)) and found[:400].tolist() == list(range(400))
    apart = torch.cat((rows, rows[:40] + 10 * roundings * step))
    assert near_copies(apart, rounding_radius(dtype)).tolist() == list(range(440))
    if dtype == torch.float32:
        for estimator in (tg.functional.twonn, tg.functional.levina_bickel, tg.functional.gride):
            one, again = estimator(rows.float()), estimator(both.float())
            torch.testing.assert_close(again.estimate, one.estimate, rtol=1e-2, atol=0)
            assert again.near_duplicates == 40
