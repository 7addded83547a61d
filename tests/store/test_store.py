"""``ActivationStore``: what is saved from memory comes back, and runs that are not whole are not passed off as whole."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from tdgeom.store import ActivationStore, StoreBusyError, StoreError, StoreLookupError
from tdgeom.store.writer import RunLock


@pytest.fixture
def store(tmp_path):
    return ActivationStore(tmp_path / "store")


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_by_bit(store, dtype):
    given = (torch.randn(5, 3, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    loaded, _ = store.load(store.save({"acts": {"a/b.0": given}}))
    found = loaded["acts", "a/b.0"]
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), given.view(torch.uint8))


def test_nested_lists_scalars_and_text_come_back(store):
    one = TensorDict({"acts": {"x": torch.ones(2, 3)}, "count": torch.tensor(4)}, batch_size=[])
    one.set_non_tensor("text", "αβ")
    run = store.save([one, TensorDict({"acts": torch.zeros(0, 7)})])
    first, second = store.load(run)[0]
    assert torch.equal(first["acts", "x"], torch.ones(2, 3)) and first["count"].shape == ()
    assert first["text"] == "αβ" and second["acts"].shape == (0, 7)


def test_the_batch_size_comes_back(store):
    given = TensorDict({"acts": {"x": torch.ones(2, 3, 4)}}, batch_size=[2, 3])
    assert store.load(store.save(given))[0].batch_size == torch.Size([2, 3])


def test_a_tensor_alone_comes_back_under_tensor(store):
    assert torch.equal(store.load(store.save(torch.arange(3)))[0]["tensor"], torch.arange(3))


def test_metadata_says_what_was_said(store):
    run = store.save(
        torch.ones(1), model="gpt2", revision="abc", dataset="wiki", experiment="one", tag=["b", "a", "b"],
        capture={"sites": ["x"]}, positions="last", metadata={"α": [1, None]}, interventions=[{"kind": "Ablate"}],
    )  # fmt: skip
    found = store.load(run)[1]
    assert found["id"] == run and found["kind"] == "capture" and found["state"] == "complete"
    assert [found[name] for name in ("model", "revision", "dataset", "experiment")] == [
        "gpt2", "abc", "wiki", "one",
    ]  # fmt: skip
    assert found["tags"] == ["b", "a"] and found["capture"] == {"sites": ["x"]}
    assert found["metadata"] == {"α": [1, None]} and found["positions"] == "last"
    assert found["interventions"] == [{"kind": "Ablate"}]


def test_ids_are_unique_within_a_second(store):
    runs = [store.save(torch.ones(1)) for _ in range(20)]
    assert len(set(runs)) == 20 and [one.id for one in store.catalogue.records()] == runs


def test_what_cannot_be_saved_is_refused_by_its_key(store):
    with pytest.raises(TypeError, match=r"\('acts', 'x'\) holds object: only tensors and JSON values"):
        store.save({"acts": {"x": object()}})
    with pytest.raises(ValueError, match="no tensor to save"):
        store.save({"note": "text"})
    with pytest.raises(ValueError, match="tag= takes a text of 1 to 4096 characters"):
        store.save(torch.ones(1), tag="")
    assert store.catalogue.records() == []


def test_an_unknown_run_is_named(store):
    with pytest.raises(StoreLookupError, match=r"there is no run '\.\./\.\./x'"):
        store.load("../../x")


def test_a_run_that_nobody_finished_reads_as_failed_and_is_refused(store):
    run = store.save(torch.ones(2))
    store.catalogue.set_state(run, "writing")
    assert store.catalogue.record(run).state == "failed"
    with pytest.raises(StoreError, match=r"is not complete: its state is failed \(its writer ended"):
        store.load(run)
    assert torch.equal(store.load(run, partial=True)[0]["tensor"], torch.ones(2))


def test_a_run_being_written_is_not_removed(store):
    run = store.save(torch.ones(2))
    store.catalogue.set_state(run, "writing")
    lock = RunLock(store.catalogue, run)
    assert store.catalogue.record(run).state == "writing"
    with pytest.raises(StoreBusyError, match="is being written"):
        store.remove(run)
    lock.release()
    store.remove(run)
    assert store.catalogue.records() == [] and not (store.path / run).exists()


def test_a_removal_cut_short_is_finished_by_the_next(store):
    run = store.save(torch.ones(2))
    store.catalogue.set_state(run, "removing")
    for path in (store.path / run).iterdir():
        path.unlink()
    (store.path / run).rmdir()
    store.remove(run)
    assert store.catalogue.records() == []


def test_from_env(store, monkeypatch):
    monkeypatch.setenv("TDGEOM_STORE", str(store.path))
    assert ActivationStore.from_env().path == store.path
    monkeypatch.delenv("TDGEOM_STORE")
    with pytest.raises(StoreError, match="TDGEOM_STORE is not set"):
        ActivationStore.from_env()
