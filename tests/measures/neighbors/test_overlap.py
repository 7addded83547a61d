"""Overlaps and information imbalance: other tools' numbers, plain loops and sorts, ties, copies, batches, keys."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.stats import rankdata
from tensordict import TensorDict

from tdgeom import ForEach, ForEachPair, UndefinedMeasureWarning
from tdgeom.measures.neighbors.information_imbalance import (
    InformationImbalance,
    conditional_ranks,
    information_imbalance,
)
from tdgeom.measures.neighbors.label_overlap import LabelOverlap, label_overlap, label_overlap_of
from tdgeom.measures.neighbors.nearest_neighbors import NearestNeighbors
from tdgeom.measures.neighbors.neighborhood_overlap import (
    JaccardKNN,
    NeighborhoodOverlap,
    jaccard_knn,
    neighborhood_overlap,
)

GOLDEN = Path(__file__).parents[2] / "data" / "golden"


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    with np.load(GOLDEN / "inputs.npz") as arrays:
        return torch.from_numpy(arrays["layers"]), torch.from_numpy(arrays["labels"])


@pytest.fixture(scope="module")
def tools() -> dict:
    return json.loads((GOLDEN / "reference.json").read_text())["tools"]


def close(actual: torch.Tensor, expected: object) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("k", [10, 30])
def test_dadapy_data_overlap(data, tools, k):
    close(neighborhood_overlap(data[0][:3], data[0][1:], k=k), tools["dadapy"][f"data_overlap_k{k}"])


def test_closed_form_overlaps(data, tools):
    layers, expected = data[0], tools["closed_form"]
    close(neighborhood_overlap(layers[:3], layers[1:], k=10), expected["mutual_knn_k10_euclidean"])
    close(jaccard_knn(layers[:3], layers[1:], k=10), expected["jaccard_k10_euclidean"])


def test_dadapy_label_overlap(data, tools):
    close(label_overlap(*data, k=10), tools["dadapy"]["label_overlap_k10_unweighted"])
    close(label_overlap(*data, k=10, balanced=True), tools["dadapy"]["label_overlap_k10_class_balanced"])


def test_dadapy_and_tdhook_information_imbalance(data, tools):
    ab, ba = information_imbalance(data[0][:3], data[0][1:])
    close(torch.stack((ab, ba), -1), tools["dadapy"]["information_imbalance_full"])
    close(ab.float().double(), np.float32(tools["tdhook"]["information_imbalance_a_to_b"]).tolist())
    close(ba.float().double(), np.float32(tools["tdhook"]["information_imbalance_b_to_a"]).tolist())


def distances(x: torch.Tensor, metric: str = "euclidean", **kwargs) -> np.ndarray:
    result = cdist(x.double().numpy(), x.double().numpy(), metric, **kwargs)
    np.fill_diagonal(result, np.inf)
    return result


@settings(max_examples=20)
@given(seed=st.integers(0, 2**20), n=st.integers(6, 60), k=st.integers(1, 4), levels=st.integers(2, 30))
def test_ranks_are_those_of_a_sort(seed, n, k, levels):
    """Few levels make ties and copies the rule; tied rows share their mean rank."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, levels, (n, 3), generator=generator).double()
    index = torch.stack([torch.randperm(n - 1, generator=generator)[:k] for _ in range(n)])
    index = index + (index >= torch.arange(n)[:, None])  # any rows but oneself
    ranks = rankdata(distances(x), axis=1)
    np.testing.assert_allclose(
        conditional_ranks(x, index).numpy(), np.take_along_axis(ranks, index.numpy(), 1)
    )


@pytest.mark.parametrize("scale", ["plain", "massive", "offset"])
@pytest.mark.parametrize("memory", [None, 2**16])
def test_imbalance_is_exact(scale, memory):
    x, y = torch.randn(500, 30), torch.randn(500, 20)
    y[:, :5] += x[:, :5] * 3
    if scale == "massive":
        y[:, 7] *= 1500
    if scale == "offset":
        y = y + 1000
    a, b = distances(x), distances(y)
    for k in (1, 4):
        near_a, near_b = (np.argsort(d, 1, kind="stable")[:, :k] for d in (a, b))
        to_y = 2 / 500 * np.take_along_axis(rankdata(b, axis=1), near_a, 1).mean()
        to_x = 2 / 500 * np.take_along_axis(rankdata(a, axis=1), near_b, 1).mean()
        got = information_imbalance(x, y, k=k, memory=memory)
        assert [float(v) for v in got] == pytest.approx([to_y, to_x], rel=1e-12)


@pytest.mark.parametrize("metric, name", [("cosine", "cosine"), (1, "cityblock")])
def test_imbalance_in_other_metrics(metric, name):
    x, y = torch.randn(200, 6), torch.randn(200, 5)
    a, b = distances(x, name), distances(y, name)
    expected = 2 / 200 * np.take_along_axis(rankdata(b, axis=1), a.argmin(1)[:, None], 1).mean()
    assert float(information_imbalance(x, y, metric=metric)[0]) == pytest.approx(expected, rel=1e-12)


def test_imbalance_of_unrelated_and_of_equal_rows():
    x, y = torch.randn(600, 5), torch.randn(600, 5)
    for value in information_imbalance(x, y):
        assert value == pytest.approx(1, abs=0.1)
    for value in information_imbalance(x, x):
        assert value == pytest.approx(2 / 600)


def test_overlap_by_sets():
    x, y = torch.randn(60, 4), torch.randn(60, 3)
    x[50:55] = x[:5]
    a, b = (NearestNeighbors(7)(sample=rows)[1].tolist() for rows in (x, y))
    common = np.array([len(set(p) & set(q)) for p, q in zip(a, b)])
    assert neighborhood_overlap(x, y, k=7) == pytest.approx(common.mean() / 7)
    assert jaccard_knn(x, y, k=7) == pytest.approx((common / (14 - common)).mean())


def label_reference(index: np.ndarray, label: np.ndarray, each: np.ndarray, balanced: bool) -> float:
    share = np.array([(label[index[i, : each[i]]] == label[i]).mean() for i in range(len(label))])
    return np.mean([share[label == c].mean() for c in np.unique(label)]) if balanced else share.mean()


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("class_fraction", [None, 0.1, 0.5])
def test_label_overlap_by_loops(balanced, class_fraction):
    x = torch.randn(150, 3)
    label = (x[:, 0] * 1.5).round().long()  # classes of very different size
    each = np.full(150, 6)
    if class_fraction is not None:
        size = np.array([(label == c).sum() for c in label])
        each = np.maximum(1, (size * class_fraction).astype(int))
        assert each.min() == 1 and each.max() > 2
    index = np.argsort(distances(x), 1, kind="stable")
    expected = label_reference(index, label.numpy(), each, balanced)
    got = label_overlap(x, label, k=6, class_fraction=class_fraction, balanced=balanced)
    assert float(got) == pytest.approx(expected, rel=1e-12)


def test_batches_equal_items():
    x, y = torch.randn(3, 80, 4), torch.randn(3, 80, 6)
    x[1, 40] = x[1, 3]
    label = torch.randint(0, 4, (3, 80))
    label[2] = label[2] * 5 + 1  # other labels than the first two have
    for function, other in (
        (lambda a, b: neighborhood_overlap(a, b, k=5), y),
        (lambda a, b: information_imbalance(a, b, k=2)[0], y),
        (lambda a, b: information_imbalance(a, b)[1], y),
        (lambda a, b: label_overlap(a, b, k=5), label),
        (lambda a, b: label_overlap(a, b, class_fraction=0.2, balanced=True), label),
    ):
        whole = function(x, other)
        assert whole.shape == (3,)
        torch.testing.assert_close(whole, torch.stack([function(x[i], other[i]) for i in range(3)]))
    torch.testing.assert_close(label_overlap(x, label[0], k=5)[1], label_overlap(x[1], label[0], k=5))


@settings(max_examples=10)
@given(exponent=st.floats(-6, 6), offset=st.sampled_from([0.0, 10.0, 1000.0]), seed=st.integers(0, 2**20))
def test_unit_offset_and_rotation_change_nothing(exponent, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(70, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=generator)).Q
    moved = (x @ rotation + offset) * 10.0**exponent
    assert neighborhood_overlap(moved, y, k=5) == neighborhood_overlap(x, y, k=5)
    assert information_imbalance(moved, y) == information_imbalance(x, y)


def moved(x: torch.Tensor, seed: int, exponent: float, offset: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(x.shape[-1], x.shape[-1], dtype=x.dtype, generator=generator)).Q
    return (
        x @ rotation + offset * torch.randn(x.shape[-1], dtype=x.dtype, generator=generator)
    ) * 10.0**exponent


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**20),
    exponents=st.tuples(st.floats(-6, 6), st.floats(-6, 6)),
    offset=st.sampled_from([0.0, 10.0, 1000.0]),
    k=st.integers(1, 20),
)
@pytest.mark.parametrize("function", [neighborhood_overlap, jaccard_knn])
def test_claimed_invariances(function, seed, exponents, offset, k):
    """Orthogonal maps, isotropic scale and offsets of either side; with the cosine, scale of any row instead."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, 6, dtype=torch.float64, generator=generator)
    y = x[:, :4] + torch.randn(50, 4, dtype=torch.float64, generator=generator)
    value = function(x, y, k=k)
    assert 0 <= value <= 1
    assert (
        function(moved(x, seed, exponents[0], offset), moved(y, seed + 1, exponents[1], offset), k=k) == value
    )
    assert function(y, x, k=k) == value
    assert function(x, moved(x, seed, exponents[0], offset), k=k) == 1
    value = function(x, y, k=k, metric="cosine")
    scaled = moved(x, seed, exponents[0], 0.0) * torch.rand(
        50, 1, dtype=torch.float64, generator=generator
    ).add(0.1)
    assert function(scaled, moved(y, seed + 1, exponents[1], 0.0), k=k, metric="cosine") == value


@pytest.mark.parametrize("function", [neighborhood_overlap, jaccard_knn])
def test_linear_maps_and_offsets_that_are_not_ignored_show(function):
    x, y = torch.randn(200, 6), torch.randn(200, 6)
    y[:, :3] += 3 * x[:, :3]
    value = function(x, y, k=10)
    assert (function(x * torch.tensor([1, 1, 1, 30, 30, 30]), y, k=10) - value).abs() > 0.01
    value = function(x, y, k=10, metric="cosine")
    assert (function(x + 5, y, k=10, metric="cosine") - value).abs() > 0.01


@pytest.mark.parametrize(
    "measure",
    [
        lambda x, y: neighborhood_overlap(x, y, k=5),
        lambda x, y: jaccard_knn(x, y, k=5),
        lambda x, y: information_imbalance(x, y)[1],
        lambda x, y: label_overlap(x, torch.arange(20) % 3, k=5),
        lambda x, y: NeighborhoodOverlap(k=5)(sample_a=x, sample_b=y),
        lambda x, y: JaccardKNN(k=5)(sample_a=x, sample_b=y),
        lambda x, y: InformationImbalance()(sample_a=x, sample_b=y)[0],
        lambda x, y: LabelOverlap(k=5)(sample=x, label=torch.arange(20) % 3),
    ],
)
def test_rows_that_are_all_alike_have_no_neighbourhoods(measure):
    x = torch.stack([torch.full((20, 3), 0.1), torch.randn(20, 3)])
    with pytest.warns(UndefinedMeasureWarning, match="all alike") as caught:
        value = measure(x, torch.randn(2, 20, 4))
    assert value.isnan().tolist() == [True, False] and len(caught) == 1


def test_over_pairs_a_side_that_is_all_alike_is_undefined():
    td = TensorDict({"sample": {"x": torch.ones(20, 3), "y": torch.randn(20, 3), "z": torch.randn(20, 3)}})
    with pytest.warns(UndefinedMeasureWarning, match="information_imbalance"):
        ForEachPair(InformationImbalance(), list("xyz"), pairs=[("x", "y"), ("y", "z")])(td)
    with pytest.warns(UndefinedMeasureWarning, match="neighborhood_overlap"):
        ForEachPair(NeighborhoodOverlap(k=4), list("xyz"), pairs=[("x", "y"), ("y", "z")])(td)
    for name in ("information_imbalance_ab", "information_imbalance_ba", "neighborhood_overlap"):
        assert td["between", "x->y", name].isnan() and td["between", "y->z", name].isfinite()


def test_bias_with_few_rows_is_the_documented_one():
    n, k = 40, 12
    x, y = torch.randn(300, n, 8), torch.randn(300, n, 8)
    for function, expected in ((neighborhood_overlap, k / (n - 1)), (jaccard_knn, k / (2 * (n - 1) - k))):
        assert function(x, y, k=k).mean() == pytest.approx(expected, rel=0.05)
        assert (function(x, y, k=n - 1) == 1).all()
    for k in (1, 5):
        assert information_imbalance(x, 2 * x + 1, k=k)[0].mean() == pytest.approx((k + 1) / n)
        assert information_imbalance(x, y, k=k)[0].mean() == pytest.approx(1, rel=0.02)
    label = torch.arange(n) // 30  # 30 rows of one class, 10 of the other
    assert label_overlap(x, label, k=12).mean() == pytest.approx((30 * 29 + 10 * 9) / (n * (n - 1)), rel=0.02)
    assert label_overlap(x, label, k=12, balanced=True).mean() == pytest.approx(
        (29 + 9) / 2 / (n - 1), rel=0.02
    )


@pytest.mark.parametrize("duplicated", [False, True])
def test_tables_serve_as_well_as_samples(duplicated):
    x, y, label = torch.randn(90, 4), torch.randn(90, 6), torch.randint(0, 3, (90,))
    if duplicated:
        x[60:70] = x[:10]
    td = TensorDict({"neighbors": {}})
    for side, rows in (("a", x), ("b", y)):
        NearestNeighbors(12, in_keys=side, out_keys=("neighbors", side))(td.update({side: rows}))
    for stage in (NeighborhoodOverlap, JaccardKNN):
        expected = stage(k=8)(sample_a=x, sample_b=y)
        torch.testing.assert_close(stage(k=8, source="neighbors")(td)["between", stage.measure], expected)
    table = TensorDict({"neighbors": td["neighbors", "a"], "sample_carried": {"label": label}})
    served = LabelOverlap(k=8, source="neighbors")(table)["neighborhood", "label_overlap"]
    torch.testing.assert_close(served, LabelOverlap(k=8)(sample=x, label=label))


def test_a_matrix_of_overlaps_costs_one_search_a_site(monkeypatch):
    from tdgeom.measures.neighbors import neighborhood_overlap as overlap

    searched = []
    original = overlap.nearest_neighbors
    monkeypatch.setattr(overlap, "nearest_neighbors", lambda *a, **k: searched.append(1) or original(*a, **k))
    sites = [f"mlp_output.{i}" for i in range(5)]
    td = TensorDict({"sample": {site: torch.randn(50, 3) for site in sites}})
    ForEachPair(NeighborhoodOverlap(k=5), sites, pairs="all")(td)
    assert len(searched) == 5
    assert len(td["between"].keys()) == 10
    a, b = sites[1], sites[4]
    expected = neighborhood_overlap(td["sample", a], td["sample", b], k=5)
    assert td["between", f"{a}->{b}", "neighborhood_overlap"] == expected


def test_imbalance_over_pairs_equals_the_function():
    td = TensorDict({"sample": {site: torch.randn(60, 3) for site in "xyz"}})
    ForEachPair(InformationImbalance(k=2), list("xyz"), pairs="all")(td)
    ab, ba = information_imbalance(td["sample", "x"], td["sample", "z"], k=2)
    assert td["between", "x->z", "information_imbalance_ab"] == ab
    assert td["between", "x->z", "information_imbalance_ba"] == ba


def test_labels_of_a_continuous_kind_are_no_classes():
    x, label = torch.randn(12, 3), torch.arange(12) % 2
    assert LabelOverlap(k=2)(x, label.float()) == LabelOverlap(k=2)(x, label)
    for wrong in (torch.rand(12), torch.full((12,), torch.nan)):
        with pytest.raises(ValueError, match=r"compares classes, got torch.float32 labels.*torch.bucketize"):
            LabelOverlap(k=2)(x, wrong)


def test_label_overlap_at_sites_reads_one_set_of_labels():
    stage = ForEach(LabelOverlap(k=4), ["x", "y"])
    labels = [key for key in stage.in_keys if "label" in key]
    assert len(labels) == 1
    td = TensorDict({"sample": {"x": torch.randn(40, 3), "y": torch.randn(40, 2)}})
    td[labels[0]] = torch.randint(0, 3, (40,))
    stage(td)
    expected = label_overlap(td["sample", "y"], td[labels[0]], k=4)
    assert td["neighborhood", "y", "label_overlap"] == expected


@pytest.mark.parametrize("source", ["sample", "neighbors"])
def test_labels_are_a_carried_value_of_any_name(source):
    label = torch.randint(0, 3, (40,))
    given = {"x": torch.randn(40, 3), "y": torch.randn(40, 2)}
    td = TensorDict({"sample": given, "sample_carried": {"part of speech": label}})
    ForEach(NearestNeighbors(6), list("xy"))(td)
    stage = LabelOverlap(k=4, labels="part of speech", source=source)
    assert stage.in_keys[1] == ("sample_carried", "part of speech")
    assert stage.in_keys[1] not in stage.optional_in_keys
    at_sites = ForEach(stage, list("xy"))
    assert at_sites.in_keys.count(("sample_carried", "part of speech")) == 1
    at_sites(td)
    assert td["neighborhood", "y", "label_overlap"] == label_overlap(given["y"], label, k=4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: neighborhood_overlap(torch.randn(20, 2), torch.randn(19, 2), k=3), "the same rows"),
        (lambda: neighborhood_overlap(torch.randn(20, 2), torch.randn(20, 2)), "at least 31 rows, got 20"),
        (lambda: information_imbalance(torch.randn(20, 2), torch.randn(19, 2)), "matched rows"),
        (lambda: information_imbalance(torch.randn(1, 2), torch.randn(1, 2)), "at least 2 rows"),
        (lambda: label_overlap(torch.randn(9, 2), torch.zeros(8), k=3), r"one label a row, \(9,\)"),
        (lambda: label_overlap_of(torch.zeros(9, 2).long(), torch.zeros(9), k=3), "table has 2"),
        (lambda: label_overlap(torch.randn(9, 2), torch.zeros(9), class_fraction=2.0), "lies in"),
        (lambda: LabelOverlap(class_fraction=0), "lies in"),
        (lambda: LabelOverlap(k=0), "at least 1, got 0"),
        (lambda: NeighborhoodOverlap(k=0), "at least 1, got 0"),
        (lambda: InformationImbalance(k=1.5), "at least 1, got 1.5"),
        (lambda: JaccardKNN(source="table"), "source is one of"),
        (lambda: LabelOverlap(source="table"), "source is one of"),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
