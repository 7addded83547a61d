"""The row sample: the same rows however they come, uniform over the stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tensordict import TensorDict

import tdgeom as tg
from tdgeom import functional as F


def stream(n, d=2):
    """Rows that name themselves, so that a sample shows where it came from."""
    return torch.arange(n, dtype=torch.float32)[:, None].expand(n, d) * torch.tensor([1.0, -1.0])[:d]


def published(stage):
    td = stage.publish(TensorDict({}))
    return td["sample"], td["sample_row_id"]


@given(
    st.integers(0, 1000),
    st.integers(1, 200),
    st.integers(1, 40),
    st.lists(st.integers(0, 200), max_size=6),
    st.integers(1, 4),
)
def test_same_rows_for_any_split_order_shards_and_merge_order(seed, n, size, cuts, shards):
    generator = torch.Generator().manual_seed(seed)
    rows = stream(n)
    ids = torch.randperm(10 * n, generator=generator)[:n]
    whole = tg.RowSample(size=size, seed=seed)
    whole.update(TensorDict(tokens=rows, row_id=ids))
    expected, expected_ids = published(whole)
    order = torch.randperm(n, generator=generator)
    stages = [tg.RowSample(size=size, seed=seed) for _ in range(shards)]
    for i, part in enumerate(torch.tensor_split(order, sorted(min(cut, n) for cut in cuts))):
        stages[i % shards].update(TensorDict(tokens=rows[part], row_id=ids[part]))
    merged = tg.RowSample(size=size, seed=seed)
    for i in torch.randperm(shards, generator=generator).tolist():
        merged.merge_(stages[i])
    found, found_ids = published(merged)
    assert torch.equal(found, expected) and torch.equal(found_ids, expected_ids)
    # and they are the rows of the smallest hashes, with their own ids, in hash order
    hashes = F.hash_ids(ids, seed)
    lowest = torch.argsort(hashes)[:size]
    assert torch.equal(found_ids, ids[lowest]) and torch.equal(found, rows[lowest])


def test_every_prefix_is_the_smaller_sample():
    rows, ids = stream(500), torch.arange(500)
    large = tg.RowSample(size=100)
    small = tg.RowSample(size=30)
    for stage in (large, small):
        for part in ids.split(37):
            stage.update(TensorDict(tokens=rows[part], row_id=part))
    assert torch.equal(published(large)[0][:30], published(small)[0])


@pytest.mark.parametrize("ids", ["plain", "sequence and position"])
def test_uniform_over_the_stream(ids):
    n, size, seeds = 1000, 50, 200
    row_id = torch.arange(n) if ids == "plain" else (torch.arange(n) // 50 << 20) | (torch.arange(n) % 50)
    deciles, within, firsts = np.zeros(10), np.zeros(50), np.zeros(10)
    for seed in range(seeds):
        stage = tg.RowSample(size=size, seed=seed)
        stage.update(TensorDict(tokens=stream(n), row_id=row_id))
        rows, _ = published(stage)
        place = rows[:, 0].long().numpy()
        deciles += np.bincount(place // 100, minlength=10)
        within += np.bincount(place % 50, minlength=50)
        firsts += np.bincount(place[:5] // 100, minlength=10)
    assert deciles.sum() == size * seeds
    for counts in (deciles, within, firsts):
        assert stats.chisquare(counts).pvalue > 1e-3
    # the trap: the first rows of the stream instead of a sample of it
    assert deciles[0] < 1.2 * size * seeds / 10


def test_hashes_are_non_negative_distinct_and_well_spread():
    hashes = F.hash_ids(torch.arange(100_000), 0)
    assert (hashes >= 0).all() and len(hashes.unique()) == 100_000
    assert stats.kstest(hashes.double().numpy() / 2**63, "uniform").pvalue > 1e-3
    bits = (hashes[:, None] >> torch.arange(63)) & 1
    assert (bits.double().mean(0) - 0.5).abs().max() < 0.01


def test_another_seed_another_sample_and_the_same_seed_the_same():
    rows, ids = stream(300), torch.arange(300)
    picked = []
    for seed in (0, 1, 0):
        stage = tg.RowSample(size=40, seed=seed)
        stage.update(TensorDict(tokens=rows, row_id=ids))
        picked.append(set(published(stage)[1].tolist()))
    assert picked[0] == picked[2] and picked[0] != picked[1]
    assert len(picked[0] & picked[1]) < 20


def test_larger_than_the_stream_keeps_every_row():
    stage = tg.RowSample(size=100)
    for part in torch.arange(30).split(7):
        stage.update(TensorDict(tokens=stream(30)[part], row_id=part))
    rows, ids = published(stage)
    assert sorted(ids.tolist()) == list(range(30)) and torch.equal(rows[:, 0].long(), ids)


def test_the_same_rows_at_every_site_and_what_also_carries():
    rows, ids = stream(200), torch.arange(200)
    label = ids % 3
    stage = tg.RowSample(["x", "layer.1"], size=20, also=["label", "score"])
    names = ("x", "layer.1"), ("label", "score")
    roots = ("tokens", "carried"), ("sample", "sample_carried")
    keys = [[(root, n) for root, part in zip(pair, names) for n in part] for pair in roots]
    assert stage.in_keys == keys[0] + ["row_id"] and stage.out_keys == keys[1] + ["sample_row_id"]
    for part in ids.split(33):
        tokens = {"x": rows[part], "layer.1": rows[part, :1].double() * 2}
        carried = {"label": label[part], "score": rows[part, 0].half()}
        td = stage(TensorDict({"tokens": tokens, "carried": carried, "row_id": part}))
    kept = td["sample_row_id"]
    assert torch.equal(td["sample", "x"], rows[kept]) and torch.equal(
        td["sample_carried", "label"], label[kept]
    )
    assert torch.equal(td["sample", "layer.1"], rows[kept, :1].double() * 2)
    assert (
        td["sample_carried", "label"].dtype == torch.int64
        and td["sample_carried", "score"].dtype == torch.float16
    )
    assert td["sample", "layer.1"].dtype == torch.float64


def test_what_forward_writes_is_a_copy():
    stage = tg.RowSample(size=4)
    first, ids = stage(tokens=stream(4), row_id=torch.arange(4))
    before = first.clone()
    stage(tokens=stream(50) + 1, row_id=torch.arange(100, 150))
    assert torch.equal(first, before)
    first.zero_(), ids.zero_()
    assert published(stage)[0].abs().sum() > 0


def test_repeated_ids_are_refused():
    stage = tg.RowSample(size=50)
    stage.update(TensorDict(tokens=stream(10), row_id=torch.arange(10)))
    with pytest.raises(ValueError, match=r"saw row id \d+ more than once.*'sequence_id', or reset\(\)"):
        stage(TensorDict(tokens=stream(3), row_id=torch.tensor([20, 4, 21])))
    with pytest.raises(ValueError, match="row id 5 more than once"):
        tg.RowSample(size=50)(TensorDict(tokens=stream(3), row_id=torch.tensor([5, 6, 5])))


def test_shards_that_saw_the_same_ids_are_refused_not_halved():
    shards = [tg.RowSample(size=50), tg.RowSample(size=50)]
    for i, stage in enumerate(shards):
        stage.update(TensorDict(tokens=stream(10) + 100 * i, row_id=torch.arange(10)))
    with pytest.raises(ValueError, match="more than once"):
        published(shards[0].merge_(shards[1]))


def test_reset_forgets_the_rows():
    stage = tg.RowSample(size=10)
    stage(tokens=stream(30), row_id=torch.arange(30))
    stage.reset()
    assert stage.is_empty
    rows, _ = stage(tokens=stream(5) + 100, row_id=torch.arange(5))
    assert rows[:, 0].min() >= 100 and len(rows) == 5


def test_errors():
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        tg.RowSample(size=0)
    with pytest.raises(TypeError, match="sites and also are lists of names, got 'x'"):
        tg.RowSample("x")
    with pytest.raises(ValueError, match=r"also=\['label'\] needs sites="):
        tg.RowSample(also=["label"])
    stage = tg.RowSample(["x"], size=5)
    with pytest.raises(ValueError, match=r"beside 'row_id' of shape \(4,\), got \(3, 2\).*one selection"):
        stage.update(TensorDict({"tokens": {"x": stream(3)}, "row_id": torch.arange(4)}))
    stage = tg.RowSample(["x"], size=5)
    stage.update(TensorDict({"tokens": {"x": stream(3)}, "row_id": torch.arange(3)}))
    with pytest.raises(ValueError, match=r"expects \('tokens', 'x'\) of shape \(3, 2\)"):
        stage.update(TensorDict({"tokens": {"x": stream(3, 1)}, "row_id": torch.arange(3)}))
    with pytest.raises(KeyError, match=r"RowSample reads \['row_id'\]"):
        tg.RowSample()(TensorDict(tokens=stream(3)))


def test_only_samples_of_the_same_settings_merge():
    rows = TensorDict(tokens=stream(3), row_id=torch.arange(3))
    a = tg.RowSample(size=5)
    a.update(rows)
    for other in (tg.RowSample(size=6), tg.RowSample(size=5, seed=1)):
        other.update(rows)
        with pytest.raises(ValueError, match="cannot merge RowSample.*same stage with the same settings"):
            a.merge_(other)


@pytest.mark.parametrize("kind", [tg.RowSample, tg.Collect])
def test_only_the_same_sites_merge(kind):
    rows = TensorDict({"tokens": {"x": stream(3), "y": stream(3)}, "row_id": torch.arange(3)})
    stages = [kind(["x", "y"]), kind(["x"]), kind(["y", "x"])]
    for stage in stages:
        stage.update(rows)
    for i, j in ((0, 1), (1, 0), (0, 2)):
        with pytest.raises(ValueError, match=f"cannot merge {kind.__name__}"):
            stages[i].merge_(stages[j])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_rows_keep_their_dtype_also_under_half(dtype):
    stage = tg.RowSample(size=5)
    stage.update(TensorDict(tokens=stream(20).to(dtype), row_id=torch.arange(20)))
    expected = published(stage)[0]
    stage.half().double()
    assert expected.dtype == published(stage)[0].dtype == dtype
    assert torch.equal(published(stage)[0], expected)
