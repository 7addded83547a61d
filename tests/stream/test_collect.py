"""Collect: every row, in the order of its id, up to a stated limit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

import tdgeom as tg


def published(stage):
    td = stage.publish(TensorDict({}))
    return td["collected"], td["collected_row_id"]


@given(st.integers(0, 1000), st.integers(1, 80), st.lists(st.integers(0, 80), max_size=6), st.integers(1, 3))
def test_all_rows_in_id_order_however_they_come(seed, n, cuts, shards):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, 3, generator=generator)
    ids = torch.randperm(5 * n, generator=generator)[:n]
    stages = [tg.Collect() for _ in range(shards)]
    for i, part in enumerate(torch.tensor_split(torch.arange(n), sorted(min(cut, n) for cut in cuts))):
        stages[i % shards].update(TensorDict(tokens=rows[part], row_id=ids[part]))
    whole = tg.Collect()
    for stage in reversed(stages):
        whole.merge_(stage)
    found, found_ids = published(whole)
    order = ids.argsort()
    assert torch.equal(found, rows[order]) and torch.equal(found_ids, ids[order])


def test_sites_and_labels_of_any_shape():
    ids = torch.arange(9).flip(0)
    x, carried = torch.randn(9, 2), {"label": torch.arange(9), "image": torch.randn(9, 2, 2).half()}
    stage = tg.Collect(["x"], also=["label", "image"])
    td = stage(TensorDict({"tokens": {"x": x}, "carried": carried, "row_id": ids}))
    assert torch.equal(td["collected", "x"], x.flip(0))
    for name, value in carried.items():
        found = td["collected_carried", name]
        assert torch.equal(found, value.flip(0)) and found.dtype == value.dtype
    assert td["collected_row_id"].tolist() == list(range(9))


def test_no_row_is_dropped_silently():
    stage = tg.Collect(limit=10)
    stage.update(TensorDict(tokens=torch.ones(10, 1), row_id=torch.arange(10)))
    with pytest.raises(
        ValueError, match=r"holds 10 rows and gets 1 more, which is above limit=10.*RowSample"
    ):
        stage.update(TensorDict(tokens=torch.ones(1, 1), row_id=torch.tensor([10])))
    assert len(published(stage)[0]) == 10
    other = tg.Collect(limit=10)
    other.update(TensorDict(tokens=torch.ones(1, 1), row_id=torch.tensor([10])))
    with pytest.raises(ValueError, match="above limit=10"):
        stage.merge_(other)
    with pytest.raises(ValueError, match="above limit=3"):
        tg.Collect(limit=3)(TensorDict(tokens=torch.ones(4, 1), row_id=torch.arange(4)))


def test_growth_copies_each_row_a_bounded_number_of_times():
    stage = tg.Collect()
    sizes = set()
    for i in range(1000):
        stage.update(TensorDict(tokens=torch.full((1, 1), float(i)), row_id=torch.tensor([i])))
        sizes.add(stage.ids.shape[0])
    assert len(sizes) < 15 and stage.ids.shape[0] < 2100
    assert published(stage)[0].flatten().tolist() == list(range(1000))


def test_what_is_published_is_a_copy():
    stage = tg.Collect()
    rows, _ = stage(tokens=torch.ones(3, 1), row_id=torch.arange(3))
    rows.zero_()
    assert published(stage)[0].sum() == 3


def test_a_limit_of_no_rows_is_refused():
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        tg.Collect(limit=0)
