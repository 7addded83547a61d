"""The approximate backend against the exact one: distances it names, recall it reports, copies, batches, errors."""

from __future__ import annotations

import sys

import pytest
import torch
from tensordict import TensorDict

from tdgeom.measures.neighbors.approximate import approximate_neighbors
from tdgeom.measures.neighbors.nearest_neighbors import NearestNeighbors, nearest_neighbors
from tdgeom.measures.neighbors.neighbor_table import Neighbors


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4000, 8, generator=generator) @ torch.randn(8, 32, generator=generator) + 100


@pytest.mark.parametrize("recall", [0.5, 0.99, 1.0])
def test_the_recall_reported_is_the_recall(rows, recall):
    table, reported = approximate_neighbors(rows, 10, recall=recall)
    exact = nearest_neighbors(rows, 10)
    true = (table.distance <= exact.distance[:, -1:]).double().mean()
    assert reported >= recall
    assert true == pytest.approx(float(reported), abs=0.02)
    assert (table.distance >= exact.distance * (1 - 1e-12)).all()


def test_distances_are_those_of_the_rows_named(rows):
    table, _ = approximate_neighbors(rows, 6)
    named = (rows[table.index].double() - rows.double()[:, None]).norm(dim=-1)
    torch.testing.assert_close(table.distance, named)
    assert not (table.index == torch.arange(len(rows))[:, None]).any()
    assert (table.distance.diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_every_cell_probed_is_the_exact_search(metric):
    x = torch.randn(2, 300, 4)
    x[1, 200:230] = x[1, :30]
    table, recall = approximate_neighbors(x, 5, metric=metric, recall=1.0)
    exact = nearest_neighbors(x, 5, metric=metric)
    assert recall.tolist() == [1.0, 1.0]
    assert table.duplicates.tolist() == [0, 30]
    torch.testing.assert_close(table.distance, exact.distance, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(
        table.distinct_distance, exact.distinct_distance, rtol=1e-9, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("n, k", [(3, 2), (30, 29), (60, 3)])
def test_few_rows(n, k):
    x = torch.randn(n, 3)
    table, recall = approximate_neighbors(x, k, recall=1.0)
    assert recall == 1
    torch.testing.assert_close(table.distance, nearest_neighbors(x, k).distance)


def test_all_rows_alike_leave_nan():
    table, _ = approximate_neighbors(torch.ones(50, 3), 2)
    assert table.distinct_distance.isnan().all() and table.duplicates == 49


def test_the_stage_writes_the_recall(rows):
    td = NearestNeighbors(4, backend="approximate")(TensorDict({"sample": rows[:500]}))
    assert set(td["neighbors"].keys()) == {*Neighbors._fields, "recall"}
    assert 0.99 <= td["neighbors", "recall"] <= 1


def test_errors_say_what_was_expected(rows, monkeypatch):
    with pytest.raises(ValueError, match="takes metric 'euclidean' or 'cosine', got 1"):
        approximate_neighbors(rows, 3, metric=1)
    with pytest.raises(ValueError, match="recall is a share"):
        approximate_neighbors(rows, 3, recall=0.0)
    with pytest.raises(ValueError, match="at least 4001 rows"):
        approximate_neighbors(rows, 4000)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install 'tdgeom\\[approximate\\]'"):
        NearestNeighbors(3, backend="approximate")(sample=rows)
