"""Stored rows in torch's loaders: by row and by chunk, with workers, subsets and ranks, each row once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch.utils.data import DataLoader, Subset, default_collate, random_split

import tdgeom as tg
from tdgeom.store import shuffled_rows

COUNT = 700


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    store = tg.ActivationStore(tmp_path_factory.mktemp("store"))
    keep = tg.StoreActivations(store, ["x"], also=["label"], shard_bytes=10_000)
    generator = torch.Generator().manual_seed(0)
    rows = {
        "tokens": {"x": torch.randn(COUNT, 4, generator=generator)},
        "carried": {"label": torch.arange(COUNT) % 3},
    }
    tg.run(keep, [rows], progress=False)
    return store.rows(keep.run_id, batch_rows=32)


def check(batches, source, rows=range(COUNT)) -> list[int]:
    """Every row once, with its own values; the order."""
    batches = [TensorDict(batch) for batch in batches]
    ids = torch.cat([batch["row_id"].reshape(-1) for batch in batches])
    found = torch.cat([batch["tokens", "x"].reshape(-1, 4) for batch in batches])
    labels = torch.cat([batch["carried", "label"].reshape(-1) for batch in batches])
    every = source[:]
    assert sorted(ids.tolist()) == sorted(every["row_id"][list(rows)].tolist())
    place = torch.searchsorted(every["row_id"], ids)
    assert torch.equal(found, every["tokens", "x"][place])
    assert torch.equal(labels, every["carried", "label"][place])
    return ids.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": None},
        {"batch_size": 64},
        {"batch_size": 64, "shuffle": True},
        {"batch_size": 64, "shuffle": True, "num_workers": 2},
        {"batch_sampler": torch.utils.data.BatchSampler(range(COUNT), 50, False)},
    ],
)
def test_rows_are_a_map_style_data_set(source, options) -> None:
    order = check(DataLoader(source, **options), source)
    assert (order != sorted(order)) == bool(options.get("shuffle"))


def test_parts_of_the_rows(source) -> None:
    assert len(source) == COUNT
    first, second = random_split(source, [500, 200], generator=torch.Generator().manual_seed(0))
    check(DataLoader(first, batch_size=64), source, first.indices)
    check(DataLoader(second, batch_size=64, shuffle=True), source, second.indices)
    one = Subset(source, [5, 3])[1]
    assert set(one) == {"tokens", "carried", "row_id", "document_id", "position"}
    assert torch.equal(one["tokens"]["x"], source[[3]]["tokens", "x"][0])
    assert torch.equal(default_collate([source[0], source[-1]])["row_id"], source[[0, -1]]["row_id"])
    with pytest.raises(IndexError, match="rows are numbered 0 to 699"):
        source[COUNT]


@pytest.mark.parametrize("workers", [0, 2])
def test_shuffled_rows_come_once_an_epoch_in_another_order(source, workers) -> None:
    shuffled = source.shuffled(chunk_rows=40, mixed_chunks=3)
    orders = []
    for epoch in (0, 0, 1):
        shuffled.set_epoch(epoch)
        batches = list(DataLoader(shuffled, batch_size=None, num_workers=workers))
        assert sum(len(batch["row_id"]) == 32 for batch in batches) >= COUNT // 32 - 2
        orders.append(check(batches, source))
    assert orders[0] == orders[1] != orders[2]
    assert np.abs(np.corrcoef(orders[0], np.arange(COUNT))[0, 1]) < 0.6  # as far as 18 chunks go


@pytest.mark.parametrize("world", [2, 5])
def test_ranks_share_the_shuffled_rows(source, world, monkeypatch) -> None:
    shuffled, batches, counts = source.shuffled(chunk_rows=16), [], []
    for rank in range(world):
        monkeypatch.setattr(shuffled_rows, "rank_and_world", lambda rank=rank: (rank, world))
        own = list(shuffled)
        counts.append(sum(len(batch["row_id"]) for batch in own))
        batches += own
    check(batches, source)
    assert max(counts) - min(counts) <= 16


def test_shuffled_rows_are_a_loader_for_run(source) -> None:
    result = tg.run(tg.StreamingMean(in_keys=[("tokens", "x")]), source.shuffled(seed=3), progress=False)
    torch.testing.assert_close(result["mean", "mean"], source[:]["tokens", "x"].double().mean(0))
    with pytest.raises(ValueError, match="at least 1, got 0 and 16"):
        source.shuffled(chunk_rows=0)
