"""``ActivationStore``: what is saved from memory comes back, and runs that are not whole are not passed off as whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import NonTensorStack, TensorDict, lazy_stack, tensorclass

import tdgeom as tg
from tdgeom.files.errors import StoreBusyError, StoreError, StoreLookupError
from tdgeom.store.activation_store import ActivationStore
from tdgeom.store.run_writer import RunLock


@pytest.fixture
def store(tmp_path):
    return ActivationStore(tmp_path / "store")


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.complex64,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_by_bit(store, dtype):
    given = (torch.randn(5, 3, generator=torch.Generator().manual_seed(0)) * 3).abs().to(dtype)
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


def test_a_conjugate_that_is_only_a_view_is_saved_by_its_values(store):
    x = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex64)
    found, _ = store.load(store.save({"conjugate": x.conj(), "negative": x.conj().imag}))
    assert found["conjugate"].tolist() == [1 - 2j, 3 + 1j] and found["negative"].tolist() == [-2, 1]


def test_lists_of_tensors_arrays_and_empty_parts_come_back(store):
    found, _ = store.load(store.save([torch.ones(2), {}, np.arange(3), {"a": {}, "b": torch.zeros(1)}]))
    assert torch.equal(found[0]["tensor"], torch.ones(2)) and torch.equal(found[2]["tensor"], torch.arange(3))
    assert list(found[1].keys()) == [] and set(found[3].keys()) == {"a", "b"}
    assert list(found[3]["a"].keys()) == []


def test_values_that_are_no_tensors_come_back_one_a_sequence_or_one_for_all(store):
    given = TensorDict({"x": torch.ones(3), "texts": ["a", "b", "c"]}, batch_size=[3])
    given.set_non_tensor("source", "a book")
    found, _ = store.load(store.save(given))
    assert found["texts"] == ["a", "b", "c"] and found["source"] == "a book" and found.batch_size == (3,)
    assert found[1]["texts"] == "b" and found[1]["source"] == "a book"
    found, _ = store.load(
        store.save({"x": torch.ones(1), "none": None, "large": 10**30, "part": np.float64(0.5)})
    )
    assert found["none"] is None and found["large"] == 10**30 and found["part"] == 0.5


@tensorclass
class Said:
    acts: torch.Tensor
    text: str


@pytest.mark.parametrize(
    "given",
    [
        TensorDict({"x": torch.ones(2, 3), "words": [["a", "b", "c"], ["d", "e", "f"]]}, batch_size=[2]),
        TensorDict({"part": {"x": torch.ones(2), "words": ["a", None]}}, batch_size=[2]),
        lazy_stack([TensorDict({"x": torch.ones(2), "words": word}) for word in ("a", "b")]),
        TensorDict({"x": torch.ones(2), "words": NonTensorStack("a", ["b", {"c": 1}])}, batch_size=[2]),
    ],
)
def test_one_value_a_sequence_stays_one_a_sequence(store, given):
    found, _ = store.load(store.save(given))
    assert found.batch_size == given.batch_size
    name = ("part", "words") if "part" in given.keys() else "words"
    assert found[name] == given[name]
    assert [found[i][name] for i in range(2)] == [given[i][name] for i in range(2)]


def test_a_tensorclass_comes_back_as_its_fields(store):
    found, _ = store.load(store.save({"said": Said(acts=torch.ones(3), text="α", batch_size=[3])}))
    assert torch.equal(found["said", "acts"], torch.ones(3)) and found["said", "text"] == "α"


UNSAVED = {
    "sparse": (lambda: torch.eye(3).to_sparse(), r"\('a',\) holds a torch.sparse_coo tensor: only dense ones"),
    "meta": (lambda: torch.ones(3, device="meta"), r"\('a',\) holds a meta tensor"),
    "ragged": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        r"\('a',\) holds a nested tensor",
    ),
    "lazy": (
        lambda: lazy_stack([TensorDict({"b": torch.ones(n)}) for n in (2, 3)]),
        r"\('a',\) holds tensors of different shapes.*save a list of its parts",
    ),
    "complex128": (lambda: torch.ones(1, dtype=torch.complex128), "complex128, which shards do not hold.*view_as_real"),
    "text array": (lambda: np.array(["a"]), r"\('a',\) holds ndarray: only tensors and JSON values"),
    "list": (lambda: [torch.ones(1)], r"\('a',\) holds list: only tensors and JSON values"),
    "nan": (lambda: float("nan"), r"\('a',\) holds float: only tensors and JSON values"),
    "too many digits": (lambda: 10**5000, "what was given cannot be saved: Exceeds the limit"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSAVED)
def test_what_no_shard_can_hold_is_refused_before_a_run_begins(store, name):
    make, message = UNSAVED[name]
    with pytest.raises((TypeError, ValueError, StoreError), match=message):
        store.save({"a": make(), "b": torch.ones(1)})
    with pytest.raises(ValueError, match="is no valid Unicode text"):
        store.save({"\ud800": torch.ones(1)})
    assert len(store.query()) == 0 and list(store.path.glob("r*")) == []


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


def test_tensors_in_metadata_are_kept_as_numbers(store):
    metadata = {
        "loss": torch.tensor(0.25, requires_grad=True),
        "layers": torch.tensor([0, 5]),
        "half": torch.ones(1).half(),
    }
    run = store.save(torch.ones(1), metadata=metadata)
    assert store.metadata(run)["metadata"] == {"loss": 0.25, "layers": [0, 5], "half": [1.0]}
    assert store.query(where="metadata.loss < 0.5", metadata={"layers": 5}).ids == [run]


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
    run = store.save(torch.ones(2))
    with pytest.raises(TypeError, match=r"named by its id, got dict.*query\(...\).load\(0\)"):
        store.load(store.query()[0])
    assert store.query().ids == [run]


def test_a_data_source_says_what_it_holds(store):
    keep = tg.StoreActivations(store, ["x.0"], also=["label"])
    tg.run(
        keep,
        [{"tokens": {"x.0": torch.ones(1200, 2)}, "carried": {"label": torch.arange(1200)}}],
        progress=False,
    )
    assert repr(store.rows(keep.run_id)) == f"RowSource(run {keep.run_id}: 1,200 rows of x.0, label)"


@pytest.mark.parametrize(
    "name",
    [5, b"r000000000000", "", "r", "\udcff", "r000000000000\n", "R000000000000", "r" * 100_000],
    ids=str,
)
def test_what_is_no_id_names_no_run(store, name):
    store.save(torch.ones(1))
    for use in (store.load, store.rows, store.remove, store.metadata, store.verify, store.load_analysis):
        with pytest.raises((StoreLookupError, TypeError), match="there is no run|a run is named by its id"):
            use(name)
    assert len(store.query()) == 1


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
