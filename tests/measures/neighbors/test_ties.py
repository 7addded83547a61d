"""Ties share their places: against weights counted row by row in NumPy, chance for unrelated sides, any order of the rows."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.stats import rankdata
from tensordict import TensorDict

import tdgeom as tg
from tdgeom import functional as F
from tdgeom.measures.neighbors import row_classes
from tdgeom.measures.neighbors.tie_weights import tie_weights


def weights(x: torch.Tensor, k: int) -> np.ndarray:
    """(N, N): 1 inside the k-th distance, r/a for each of a rows at it with r places left."""
    distance = cdist(x.double().numpy(), x.double().numpy())
    np.fill_diagonal(distance, np.inf)
    last = np.sort(distance, 1)[:, k - 1 : k]
    inside, tied = distance < last * (1 - 1e-9), np.abs(distance - last) <= last * 1e-9
    return inside + tied * (k - inside.sum(1, keepdims=True)) / tied.sum(1, keepdims=True)


def hsic(k: np.ndarray, l: np.ndarray) -> float:
    """n(n-3) times the unbiased HSIC of Song et al. 2012, diagonals zero."""
    n = len(k)
    return (k * l.T).sum() + k.sum() * l.sum() / (n - 1) / (n - 2) - 2 / (n - 2) * (k.sum(0) * l.sum(1)).sum()


def largest(x: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Inner products (N, N), and weights of the k largest in a row."""
    product = x.double().numpy() @ x.double().numpy().T
    np.fill_diagonal(product, -np.inf)
    last = np.sort(product, 1)[:, -k][:, None]
    above, equal = product > last + 1e-9, np.abs(product - last) <= 1e-9
    np.fill_diagonal(product, 0)
    return product, above + equal * (k - above.sum(1, keepdims=True)) / equal.sum(1, keepdims=True)


KINDS = {
    "binary": lambda n, g: torch.randint(0, 2, (n, 3), generator=g).float(),
    "one-hot": lambda n, g: torch.eye(12)[torch.randint(0, 12, (n,), generator=g)],
    "zeros": lambda n, g: torch.randn(n, 5, generator=g).relu() * (torch.rand(n, 1, generator=g) > 0.4),
    "grid": lambda n, g: torch.randint(0, 4, (n, 4), generator=g).double() * 0.1,
    "repeated": lambda n, g: torch.randn(n // 3, 4, generator=g)[torch.randint(n // 3, (n,), generator=g)],
    "no ties": lambda n, g: torch.randn(n, 4, generator=g),
}
kinds = pytest.mark.parametrize("kind", list(KINDS))


def sides(kind: str, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return KINDS[kind](n, g), KINDS[kind](n, g)


@pytest.fixture(autouse=True)
def ties_are_no_error():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*the ceiling")
        yield


@kinds
@pytest.mark.parametrize("k", [1, 7, 30, 89])
def test_overlap_and_jaccard_are_sums_of_products_of_weights(kind, k):
    x, y = sides(kind, 90, 0)
    a, b = weights(x, k), weights(y, k)
    common = (a * b).sum(1)
    assert float(F.neighborhood_overlap(x, y, k=k)) == pytest.approx(common.mean() / k, rel=1e-12)
    assert float(F.jaccard_knn(x, y, k=k)) == pytest.approx((common / (2 * k - common)).mean(), rel=1e-12)
    most = np.minimum((a * a).sum(1), (b * b).sum(1))
    td = TensorDict({"sample": {"a": x, "b": y}})
    tg.NeighborhoodOverlap(k=k, ceiling=True)(td)
    assert float(td["between", "neighborhood_overlap"]) == pytest.approx(common.mean() / k, rel=1e-12)
    assert float(td["between", "ceiling"]) == pytest.approx(most.mean() / k, rel=1e-12)
    assert float(F.neighborhood_overlap(x, x, k=k)) == pytest.approx((a * a).sum() / k / len(x), rel=1e-12)


@kinds
def test_tables_wide_enough_serve_as_well(kind):
    x, y = sides(kind, 90, 1)
    td = TensorDict({"neighbors": {}})
    for side, rows in (("a", x), ("b", y)):
        tg.NearestNeighbors(89, in_keys=side, out_keys=("neighbors", side))(td.update({side: rows}))
    for stage in (tg.NeighborhoodOverlap, tg.JaccardKNN):
        served = stage(k=8, source="neighbors")(td.copy())["between", stage.measure]
        torch.testing.assert_close(served, stage(k=8)(sample_a=x, sample_b=y), rtol=1e-12, atol=0)
    label = torch.arange(90) % 4
    own = TensorDict({"neighbors": td["neighbors", "a"], "sample_carried": {"label": label}})
    served = tg.LabelOverlap(k=8, source="neighbors")(own)["neighborhood", "label_overlap"]
    torch.testing.assert_close(served, F.label_overlap(x, label, k=8), rtol=1e-12, atol=0)


@kinds
@pytest.mark.parametrize("balanced", [False, True])
def test_label_overlap_is_a_sum_of_weights(kind, balanced):
    x, _ = sides(kind, 90, 2)
    label = torch.arange(90) // 20
    same = label.numpy()[:, None] == label.numpy()
    share = (weights(x, 9) * same).sum(1) / 9
    by_class = [share[label.numpy() == c].mean() for c in range(5)]
    expected = np.mean(by_class) if balanced else share.mean()
    assert float(F.label_overlap(x, label, k=9, balanced=balanced)) == pytest.approx(expected, rel=1e-12)
    each = [4, 4, 4, 4, 2]  # int(0.2 · size of the class)
    share = np.array([(weights(x, each[c]) * same).sum(1)[i] / each[c] for i, c in enumerate(label.tolist())])
    assert float(F.label_overlap(x, label, class_fraction=0.2)) == pytest.approx(share.mean(), rel=1e-12)


@kinds
@pytest.mark.parametrize("k", [2, 9])
def test_cknna_has_the_weights_for_its_mask(kind, k):
    x, y = sides(kind, 60, 3)
    (a, u), (b, v) = largest(x, k), largest(y, k)
    own = hsic(u * a, u * a) * hsic(v * b, v * b)
    assert own > 0
    assert float(F.cknna(x, y, k=k)) == pytest.approx(
        hsic(u * v * a, u * v * b) / own**0.5, rel=1e-9, abs=1e-12
    )


@kinds
@pytest.mark.parametrize("k", [1, 6])
def test_information_imbalance_averages_over_ties_on_both_sides(kind, k):
    x, y = sides(kind, 80, 4)
    expected = []
    for first, second in ((x, y), (y, x)):
        distance = cdist(second.double().numpy(), second.double().numpy()).round(9)
        np.fill_diagonal(distance, np.inf)
        expected.append(2 / 80 * (weights(first, k) * rankdata(distance, axis=1)).sum(1).mean() / k)
    assert [float(v) for v in F.information_imbalance(x, y, k=k)] == pytest.approx(expected, rel=1e-9)
    stage = tg.InformationImbalance(k=k)
    prepared = stage.compare(stage.prepare(x), stage.prepare(y))
    assert [float(v) for v in prepared] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["binary", "one-hot", "zeros"])
def test_unrelated_sides_give_chance(kind):
    values = {name: [] for name in ("overlap", "jaccard", "cknna", "imbalance")}
    for seed in range(4):
        x, y = sides(kind, 300, seed)
        values["overlap"].append(float(F.neighborhood_overlap(x, y, k=10)))
        values["jaccard"].append(float(F.jaccard_knn(x, y, k=10)))
        values["cknna"].append(float(F.cknna(x, y, k=10)))
        values["imbalance"].append(float(F.information_imbalance(x, y)[0]))
    assert np.mean(values["overlap"]) == pytest.approx(10 / 299, abs=0.005)
    assert np.mean(values["jaccard"]) == pytest.approx(10 / (2 * 299 - 10), abs=0.003)
    assert np.mean(values["cknna"]) == pytest.approx(0, abs=0.02)
    assert np.mean(values["imbalance"]) == pytest.approx(1, abs=0.06)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**20),
    kind=st.sampled_from(list(KINDS)),
    k=st.integers(2, 12),
    exponent=st.sampled_from([-6, 0, 6]),
)
def test_neither_the_order_of_the_rows_nor_their_unit_matters(seed, kind, k, exponent):
    x, y = sides(kind, 45, seed)
    order = torch.randperm(45, generator=torch.Generator().manual_seed(seed))
    label = torch.arange(45) // 10
    for function, other in (
        (F.neighborhood_overlap, y),
        (F.jaccard_knn, y),
        (lambda a, b, k: F.information_imbalance(a, b, k=k)[0], y),
        (F.label_overlap, label),
    ):
        value = float(function(x, other, k=k))
        assert float(function(x[order] * 2.0**exponent, other[order], k=k)) == pytest.approx(value, rel=1e-12)


def test_one_warning_says_the_ceiling():
    x, y = sides("one-hot", 400, 5)
    for measure in (F.neighborhood_overlap, F.jaccard_knn, F.cknna):
        with pytest.warns(
            UserWarning, match=r"equally near .*the ceiling \(a side with itself\) is 0\.\d+, not 1"
        ) as told:
            measure(x, y, k=10)
        assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.neighborhood_overlap(*sides("no ties", 400, 5), k=10)


def test_a_table_that_ends_among_ties_says_so():
    x, y = sides("binary", 100, 6)
    td = TensorDict({"neighbors": {}})
    for side, rows in (("a", x), ("b", y)):
        tg.NearestNeighbors(10, in_keys=side, out_keys=("neighbors", side))(td.update({side: rows}))
    assert td["neighbors", "a", "tied_beyond"].any()
    with pytest.warns(UserWarning, match="ends among equally near rows: some rows beyond its 10 columns"):
        tg.NeighborhoodOverlap(k=10, source="neighbors")(td)
    own = TensorDict({"neighbors": td["neighbors", "a"], "sample_carried": {"label": torch.arange(100) % 3}})
    with pytest.warns(UserWarning, match="label_overlap: the table ends among equally near rows"):
        tg.LabelOverlap(k=10, source="neighbors")(own)


def test_batches_and_vmap_equal_items():
    x, y = (
        torch.stack([KINDS["binary"](50, torch.Generator().manual_seed(seed)) for seed in seeds])
        for seeds in ((0, 1), (2, 3))
    )
    label = torch.arange(50) % 3
    for function, other in (
        (lambda a, b: F.neighborhood_overlap(a, b, k=6), y),
        (lambda a, b: F.jaccard_knn(a, b, k=6), y),
        (lambda a, b: F.cknna(a, b, k=6), y),
        (lambda a, b: F.information_imbalance(a, b, k=3)[1], y),
        (lambda a, b: F.label_overlap(a, b, k=6), label.expand(2, 50)),
    ):
        items = torch.stack([function(x[i], other[i]) for i in range(2)])
        torch.testing.assert_close(function(x, other), items, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.vmap(function)(x, other), items, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "measure", [tg.NeighborhoodOverlap, tg.JaccardKNN, tg.CKNNA, tg.InformationImbalance]
)
def test_one_graph_gives_the_same(measure):
    x, y = sides("binary", 40, 8)
    stage = measure(k=5)
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b: stage(sample_a=a, sample_b=b), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, y), stage(sample_a=x, sample_b=y), rtol=1e-12, atol=1e-15)


def test_distances_are_equal_to_twelve_digits():
    distance = torch.tensor([[1.0, 1.0 + 1e-13, 1.0 + 1e-11]], dtype=torch.float64)
    weight, beyond = tie_weights(distance, 1)
    assert weight.tolist() == [[0.5, 0.5, 0.0]] and not beyond.any()


@pytest.mark.parametrize("function", [F.neighborhood_overlap, F.jaccard_knn, F.cknna])
def test_data_sets_with_and_without_repeats_in_one_batch(function):
    (x, _), (u, v), (w, _) = (sides(kind, 60, 5) for kind in ("zeros", "no ties", "repeated"))
    wide = torch.stack([torch.nn.functional.pad(rows, (0, 5 - rows.shape[1])) for rows in (x, u, w)])
    other = torch.nn.functional.pad(v, (0, 2))
    together = function(wide, other, k=6)  # broadcast
    alone = torch.stack([function(rows, other, k=6) for rows in wide])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        function(other, wide, k=6), function(other.expand_as(wide.new_empty(3, 60, 6)), wide, k=6)
    )
    mapped = torch.vmap(lambda rows: function(rows, other, k=6))(wide)
    torch.testing.assert_close(mapped, alone, rtol=1e-9, atol=1e-12)


def test_a_thousand_copies_make_no_table_wider(monkeypatch):
    asked = []
    original = row_classes.search_distinct
    monkeypatch.setattr(
        row_classes, "search_distinct", lambda x, k, **how: asked.append(k) or original(x, k, **how)
    )
    x, y = (rows + 0.01 * (rows != 0) for rows in sides("zeros", 1500, 6))
    F.neighborhood_overlap(x, y, k=10)
    F.label_overlap(x, torch.arange(1500) % 3, k=10)
    assert asked == [10] * 3
