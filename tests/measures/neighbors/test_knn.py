"""NearestNeighbors against a float64 search by SciPy: values, indices, ties, copies, offsets, units, precisions."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from tensordict import TensorDict

from tdgeom.measures.neighbors import distance_blocks as blocks
from tdgeom.measures.neighbors import search
from tdgeom.measures.neighbors.nearest_neighbors import (
    NearestNeighbors,
    distinct_neighbors,
    nearest_neighbors,
)


def reference(x: torch.Tensor, k: int, metric: str = "euclidean", **kwargs) -> tuple[np.ndarray, np.ndarray]:
    rows = x.double().numpy()
    distance = cdist(rows, rows, metric, **kwargs)
    np.fill_diagonal(distance, np.inf)
    index = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distance, index, axis=1), index


def check(x: torch.Tensor, k: int, **settings) -> None:
    table = nearest_neighbors(x, k, **settings)
    distance, index = reference(x, k)
    np.testing.assert_allclose(table.distance.numpy(), distance, rtol=1e-12, atol=0)
    np.testing.assert_array_equal(table.index.numpy(), index)


@pytest.mark.parametrize("n, width, k", [(3, 1, 2), (50, 3, 2), (700, 48, 10), (300, 2, 299), (1500, 20, 64)])
@pytest.mark.parametrize("offset, unit", [(0, 1), (1000, 1), (10, 1e-6), (0, 1e6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
# two features a thousand standard deviations from 0: some rows are closer than the roundings of a deep model, and counted
@pytest.mark.filterwarnings("ignore:nearest neighbours. 1 rows are left out:UserWarning")
def test_equals_a_float64_search(n, width, k, offset, unit, dtype):
    check(((torch.randn(n, width, dtype=torch.float64) + offset) * unit).to(dtype), k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32, torch.uint8])
def test_half_precision_and_integers_are_searched_as_they_are(dtype):
    x = (torch.rand(200, 12) * 50).to(dtype)
    assert len(torch.unique(x, dim=0)) == 200
    table = nearest_neighbors(x, 5)
    distance, _ = reference(x, 5)
    np.testing.assert_allclose(table.distance.numpy(), distance, rtol=1e-12)


@pytest.mark.parametrize("block", [5, 64, 100, 256, 1000])
def test_blocks_change_nothing(block):
    x = torch.randn(233, 9)
    whole, blocked = nearest_neighbors(x, 6), nearest_neighbors(x, 6, block=block)
    assert torch.equal(whole.index, blocked.index)
    assert torch.equal(whole.distance, blocked.distance)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("inference", [False, True])
def test_threads_change_nothing(threads, inference):
    """Blocks come in any order then; ties (small integers) and all."""
    generator = torch.Generator().manual_seed(4)
    for x in (
        torch.randn(2, 700, 9, generator=generator),
        torch.randint(0, 3, (1, 600, 6), generator=generator).float(),
    ):
        tables = []
        for count in (1, 2, 5):
            threads(count)
            with torch.inference_mode(inference):
                tables.append(nearest_neighbors(x, 7, block=96))
        assert torch.get_num_threads() == 5
        for table in tables[1:]:
            for found, expected in zip(table, tables[0]):
                torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_an_error_in_a_block_reaches_the_caller(threads, monkeypatch):
    def fails(*args, **options):
        raise MemoryError("no room for a block")

    threads(3)
    monkeypatch.setattr(blocks.KeyBlocks, "fill", fails)
    with pytest.raises(MemoryError, match="no room for a block"):
        nearest_neighbors(torch.randn(300, 4), 3, block=64)
    assert torch.get_num_threads() == 3


def test_a_small_memory_budget_is_honoured_and_changes_nothing():
    x = torch.randn(700, 9)
    assert blocks.block_rows(700, 1, block=None, memory=2**16, device=x.device) < 100
    assert torch.equal(nearest_neighbors(x, 3, memory=2**16).index, nearest_neighbors(x, 3).index)


def test_one_massive_feature():
    """One feature of standard deviation 1500 takes most of float32's digits; the answer is still that of float64."""
    x = torch.randn(1200, 64)
    x[:, 3] *= 1500
    check(x, 5)


def test_rows_that_float32_cannot_tell_apart_are_searched_again(monkeypatch):
    searched = []
    original = search.search_rows_exactly
    monkeypatch.setattr(
        search,
        "search_rows_exactly",
        lambda x, which, *a, **k: searched.append(len(which)) or original(x, which, *a, **k),
    )
    x = torch.randn(400, 8, dtype=torch.float64)
    x[1:] = x[0] + 1e-7 * torch.randn(399, 8, dtype=torch.float64)
    x[0] += 100
    check(x, 3)
    assert sum(searched) > 300


def test_one_outlier_does_not_send_every_row_to_the_slow_search(monkeypatch):
    monkeypatch.setattr(search, "search_rows_exactly", lambda *a, **k: pytest.fail("searched again"))
    x = torch.randn(2000, 16)
    x[0] *= 100
    nearest_neighbors(x, 2)


def test_ties_stand_by_index():
    grid = torch.cartesian_prod(torch.arange(12.0), torch.arange(12.0))
    check(grid, 5)
    assert nearest_neighbors(torch.eye(50), 3).index[:4].tolist() == [
        [1, 2, 3],
        [0, 2, 3],
        [0, 1, 3],
        [0, 1, 2],
    ]


def test_ties_over_many_blocks():
    codes = torch.randint(0, 2, (3000, 40)).unique(dim=0).float()
    table = nearest_neighbors(codes, 4, block=256)
    distance, index = reference(codes, 4)
    np.testing.assert_array_equal(table.index.numpy(), index)
    np.testing.assert_allclose(table.distance.numpy(), distance, rtol=1e-12)


@pytest.mark.parametrize(
    "metric, name, kwargs",
    [
        ("cosine", "cosine", {}),
        (1, "cityblock", {}),
        (math.inf, "chebyshev", {}),
        (3.5, "minkowski", {"p": 3.5}),
    ],
)
def test_other_metrics(metric, name, kwargs):
    x = torch.randn(500, 10) + 0.3
    x[400:] = x[:100]
    table = nearest_neighbors(x, 7, metric=metric)
    distance, index = reference(x, 7, name, **kwargs)
    np.testing.assert_allclose(table.distance.numpy(), distance, rtol=1e-9, atol=1e-15)
    if metric != "cosine":  # there 1 - cos rounds and can swap a copy with itself
        np.testing.assert_array_equal(table.index.numpy(), index)


@pytest.mark.parametrize("k", [1, 3, 40, 119])
def test_copies_are_neighbours_of_each_other_and_counted(k):
    x = torch.randn(120, 4)
    x[60:80], x[90:95], x[119] = x[:20], x[3], -x[3] * 0
    x[118] = 0.0  # x[119] holds negative zeros
    check(x, k)
    table = nearest_neighbors(x, k)
    assert table.duplicates == 26


def test_distinct_distances_hold_every_distinct_row_once():
    x = torch.randn(100, 5)
    x[50:70], x[90] = x[:20], x[60]
    distinct, first = np.unique(x.numpy(), axis=0, return_index=True)
    table = nearest_neighbors(x, 3)
    once = ~torch.isnan(table.distinct_distance).any(-1)
    np.testing.assert_array_equal(np.flatnonzero(once.numpy()), np.sort(first))
    expected, _ = reference(x[np.sort(first)], 3)
    np.testing.assert_allclose(table.distinct_distance[once].numpy(), expected, rtol=1e-12)
    assert table.duplicates == len(x) - len(distinct)


def test_too_few_distinct_rows_leave_nan_never_zero():
    x = torch.zeros(5, 2)
    x[3:] = 1.0
    table = nearest_neighbors(x, 3)
    assert table.distinct_distance[0].isnan().tolist() == [False, True, True]
    assert table.distinct_distance[[1, 2, 4]].isnan().all()
    assert table.distance.tolist()[0] == [0.0, 0.0, 2**0.5]
    assert nearest_neighbors(torch.ones(4, 2), 2).distinct_distance.isnan().all()


def test_two_rows_of_one_code_are_told_apart(monkeypatch):
    from tdgeom.numerics import copies as _distinct

    x = torch.randn(2, 30, 4)
    x[0, 7], x[1, 20] = x[0, 2], x[1, 19]
    expected = _distinct.first_copies(x)
    monkeypatch.setattr(_distinct, "_codes", lambda x: torch.zeros(x.shape[:-1], dtype=torch.int64))
    assert torch.equal(_distinct.first_copies(x), expected)
    assert (expected != torch.arange(30)).nonzero().tolist() == [[0, 7], [1, 20]]


def test_batches_equal_items():
    x = torch.randn(2, 3, 150, 6)
    x[0, 1, 40] = x[0, 1, 3]
    table = nearest_neighbors(x, 4)
    for i in range(2):
        for j in range(3):
            for whole, item in zip(table, nearest_neighbors(x[i, j], 4)):
                torch.testing.assert_close(whole[i, j], item, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**20),
    n=st.integers(4, 90),
    width=st.integers(1, 9),
    k=st.integers(1, 3),
    levels=st.integers(2, 9),
)
def test_any_small_integer_rows(seed, n, width, k, levels):
    """Few levels make copies and ties the rule."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, levels, (n, width), generator=generator).double()
    table = nearest_neighbors(x, k)
    distance, _ = reference(x, k)
    np.testing.assert_allclose(table.distance.numpy(), distance, rtol=1e-12)
    found = np.linalg.norm(x.numpy()[table.index.numpy()] - x.numpy()[:, None], axis=-1)
    np.testing.assert_allclose(found, distance, rtol=1e-12)
    assert not (table.index == torch.arange(n)[:, None]).any()
    assert all(len(set(row)) == k for row in table.index.tolist())
    assert table.duplicates == n - len(np.unique(x.numpy(), axis=0))


@settings(max_examples=15)
@given(exponent=st.floats(-6, 6), offset=st.sampled_from([0.0, 10.0, 1000.0]), seed=st.integers(0, 2**20))
def test_unit_and_offset_change_no_neighbour(exponent, offset, seed):
    x = torch.randn(200, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    moved = (x + offset) * 10.0**exponent
    plain, other = nearest_neighbors(x, 4), nearest_neighbors(moved, 4)
    assert torch.equal(plain.index, other.index)
    torch.testing.assert_close(other.distance / 10.0**exponent, plain.distance, rtol=1e-9, atol=0)


def hard_rows(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(400, 24, generator=generator, dtype=torch.float64)
    if kind == "massive":
        x[:, 3] *= 1500
    elif kind == "clusters":  # neighbours a millionth of the rows' size apart
        x = x[:8].repeat(50, 1) + 1e-6 * x
    elif kind == "ties":
        x = (x[:, :9] > 0).double().unique(dim=0)
    elif kind == "offset":
        x = x + 1e5
    return x


@pytest.mark.parametrize("kind", ["plain", "massive", "clusters", "ties", "offset"])
@pytest.mark.parametrize("p", [2.0, 1.0])
def test_products_in_float64_give_the_same_table(kind, p):
    """What wide tables are made from, at any width."""
    x = hard_rows(kind)
    n = len(x)
    own = torch.arange(n)
    for k in (1, 20, n - 2, n - 1):
        distance, index, tied = search.search_rows_exactly(x, own, k, p=p, memory=2**18)
        metric = "euclidean" if p == 2 else "cityblock"
        expected, where = reference(x, k, metric)
        np.testing.assert_allclose(distance.numpy(), expected, rtol=1e-12)
        np.testing.assert_array_equal(index.numpy(), where)
        if k < n - 1:
            further, _ = reference(x, k + 1, metric)
            np.testing.assert_array_equal(tied.numpy(), further[:, k] <= further[:, k - 1] * (1 + 1e-12))
        else:
            assert not tied.any()


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**20),
    n=st.integers(3, 60),
    width=st.integers(1, 5),
    levels=st.integers(2, 9),
    data=st.data(),
)
def test_whether_a_row_outside_is_as_near_as_the_last(seed, n, width, levels, data):
    k = data.draw(st.integers(1, n - 1))
    x = torch.randint(0, levels, (n, width), generator=torch.Generator().manual_seed(seed)).double()
    everything, _ = reference(x, n - 1)
    within = everything <= everything[:, k - 1 : k] * (1 + 1e-12)
    np.testing.assert_array_equal(nearest_neighbors(x, k).tied_beyond.numpy(), within.sum(1) > k)


@pytest.mark.slow
def test_a_wide_table_costs_what_a_plain_search_costs():
    """The product of all rows and one selection a row, in float64: interleaved, the best of three."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 12, generator=g) @ torch.randn(12, 384, generator=g)

    def plain(k: int) -> torch.Tensor:
        y = x.double() - x.double().mean(0)
        square, found = y.square().sum(1), []
        for start in range(0, len(y), 512):
            part = torch.addmm(
                square[start : start + 512, None] + square, y[start : start + 512], y.T, alpha=-2
            )
            part[torch.arange(len(part)), torch.arange(start, start + len(part))] = torch.inf
            found.append(part.topk(k, largest=False).values.clamp(min=0).sqrt())
        return torch.cat(found)

    def seconds(function, k: int) -> float:
        start = time.perf_counter()
        function(k)
        return time.perf_counter() - start

    for k in (256, 1024):
        own, other = zip(
            *((seconds(lambda k: nearest_neighbors(x, k), k), seconds(plain, k)) for _ in range(3))
        )
        assert min(own) < 1.5 * min(other)  # 1.0 to 1.2 on a quiet machine


@pytest.mark.slow
def test_a_large_sample_against_a_tree():
    x = torch.randn(20_000, 3) @ torch.randn(3, 40)
    distance, index = cKDTree(x.double().numpy()).query(x.double().numpy(), k=6)
    table = nearest_neighbors(x, 5)
    np.testing.assert_allclose(table.distance.numpy(), distance[:, 1:], rtol=1e-12)
    assert (table.index.numpy() == index[:, 1:]).mean() > 0.9999


def test_reduced_precision_settings_do_not_reach_the_search():
    x = torch.randn(500, 32)
    expected = nearest_neighbors(x, 3)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            table = nearest_neighbors(x, 3)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(table.index, expected.index)
    assert torch.equal(table.distance, expected.distance)


def test_distances_carry_gradients():
    x = torch.randn(12, 3, dtype=torch.float64)
    x[7] = x[2]
    x.requires_grad_()
    torch.autograd.gradcheck(lambda x: nearest_neighbors(x[3:7], 2).distance, x)
    table = nearest_neighbors(x, 2)
    table.distinct_distance[~torch.isnan(table.distinct_distance)].sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch of its own forward mode
@pytest.mark.parametrize("metric", ["euclidean", "cosine", 3])
def test_gradients_under_transforms_are_those_of_autograd(metric):
    x = torch.randn(3, 12, 4, dtype=torch.float64)
    x[1, 7] = x[1, 2]

    def score(rows):
        table = nearest_neighbors(rows, 3, metric=metric)
        return table.distance.sin().sum() + table.distinct_distance.nan_to_num().cos().sum()

    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(score(leaf), leaf)[0]
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(torch.vmap(score)(leaf).sum(), leaf)[0], expected)
    torch.testing.assert_close(torch.vmap(torch.func.grad(score))(x), expected)
    direction = torch.randn_like(x)
    slope = torch.func.jvp(score, (x,), (direction,))[1]
    torch.testing.assert_close(slope, (expected * direction).sum())
    torch.testing.assert_close(torch.func.jacfwd(score)(x[0]), expected[0])
    torch.autograd.gradgradcheck(lambda rows: nearest_neighbors(rows, 3, metric=metric).distance, leaf[0, :6])


def test_a_compiled_search_says_that_it_has_no_gradient():
    x = torch.randn(12, 3, requires_grad=True)
    compiled = torch.compile(lambda x: nearest_neighbors(x, 2).distance, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="exact_neighbors"):
        compiled(x).sum().backward()


def test_the_stage_writes_the_table():
    x = torch.randn(40, 3)
    td = NearestNeighbors(3)(TensorDict({"sample": x}))
    table = nearest_neighbors(x, 3)
    for name in ("distance", "index", "distinct_distance", "duplicates"):
        torch.testing.assert_close(td["neighbors", name], getattr(table, name))
    stage = NearestNeighbors(3, metric="cosine", out_keys=("neighbors", "k3"))
    assert stage.out_keys[0] == ("neighbors", "k3", "distance")
    torch.testing.assert_close(
        stage(TensorDict({"sample": x}))["neighbors", "k3", "index"],
        nearest_neighbors(x, 3, metric="cosine").index,
    )


def test_distinct_neighbors_names_first_occurrences():
    x = torch.randn(60, 4)
    x[30:45] = x[:15]
    table = distinct_neighbors(x, 3)
    kept = ~torch.isnan(table.distance).any(-1)
    assert kept.sum() == 45
    assert kept[table.index[kept]].all()
    found = (x[table.index[kept]] - x[kept][:, None]).double().norm(dim=-1)
    torch.testing.assert_close(found, table.distance[kept], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "x, k, kwargs, message",
    [
        (torch.zeros(1, 3), 1, {}, "at least 2 rows, got 1"),
        (torch.zeros(4, 3), 4, {}, "at least 5 rows, got 4"),
        (torch.zeros(4, 3), 0, {}, "at least 1, got 0"),
        (torch.zeros(4, 3), 1.0, {}, "at least 1, got 1.0"),
        (torch.zeros(4), 1, {}, r"shape \(..., N, D\), got \(4,\)"),
        (torch.tensor([[0.0], [math.nan]]), 1, {}, "NaN or Inf"),
        (torch.eye(4).double() * 1e200, 1, {}, "reach 1e.200.*leaves the range of float64.*unit between"),
        (torch.eye(4).double() * 1e-200, 1, {}, "reach 1e-200"),
        (torch.zeros(4, 3), 1, {"metric": "cosine"}, "no direction"),
        (torch.zeros(4, 3), 1, {"metric": "manhattan"}, "Minkowski"),
        (torch.zeros(4, 3), 1, {"metric": 0.5}, "p >= 1"),
    ],
)
def test_errors_say_what_was_expected(x, k, kwargs, message):
    with pytest.raises(ValueError, match=message):
        nearest_neighbors(x, k, **kwargs)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'exact' or 'approximate', got 'fast'"):
        NearestNeighbors(2, backend="fast")
