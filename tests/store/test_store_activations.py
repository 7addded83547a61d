"""``StoreActivations``: what a run wrote is what the model gave, also after an interruption."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

import models
import tdgeom as tg
from tdgeom.files.errors import StoreBusyError, StoreError
from tdgeom.store.activation_store import ActivationStore

SOURCE = Path(__file__).parents[2] / "src"
SITES = ["residual_input.0", "residual_output.1"]


@pytest.fixture
def store(tmp_path):
    return ActivationStore(tmp_path / "store")


def batches():
    for seed in range(4):
        batch = models.text_batch(3, 9)
        generator = torch.Generator().manual_seed(seed)
        batch["input_ids"] = torch.randint(4, models.VOCAB, (3, 9), generator=generator)
        batch["attention_mask"][0, : 2 + seed] = 0
        batch["document_id"] = torch.tensor([7, 7, 9]) + 10 * seed
        yield batch


def rows(n, width=4, seed=0, dtype=torch.float32, first_id=0):
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return {"tokens": {"x": x}, "row_id": torch.arange(first_id, first_id + n)}


def from_model(*behind, also=()):
    capture = tg.Capture(models.gpt2(), SITES)
    return TensorDictSequential(capture, tg.SelectTokens(capture.sites, also=list(also)), *behind)


def measures():
    return [
        tg.ForEach(tg.StreamingCovariance(), SITES),
        tg.RowSample(SITES, size=40),
        tg.ForEach(tg.EigenSpectrum(), SITES),
        tg.ForEach(tg.SpectrumMetrics(), SITES),
        tg.ForEachPair(tg.LinearCKA(), SITES, pairs="all"),
    ]


def test_stored_rows_give_the_numbers_of_the_live_model(store):
    keep = tg.StoreActivations(store, SITES, shard_bytes=4000)
    live = tg.run(from_model(*measures(), keep), batches())
    assert store.catalogue.record(keep.run_id).shards > 3
    stored = tg.run(TensorDictSequential(*measures()), store.rows(keep.run_id, batch_rows=7))
    keys = [key for key in live.keys(True, True) if key[0] not in ("run", "stored")]
    assert set(keys) == {key for key in stored.keys(True, True) if key[0] != "run"}
    for key in keys:
        torch.testing.assert_close(stored[key], live[key], rtol=1e-9, atol=1e-10, msg=str(key))
    assert int(stored["run", "rows"]) == int(live["run", "rows"]) == int(live["stored", "rows"])


def test_rows_carry_ids_documents_positions_and_tokens(store):
    also = ["document_id", "input_ids"]
    collect = tg.Collect(SITES, also=also)
    keep = tg.StoreActivations(store, SITES, also=also, shard_bytes=3000)
    live = tg.run(from_model(collect, keep, also=also), batches())
    source = store.rows(keep.run_id)
    found = source[:]
    assert torch.equal(found["row_id"], live["collected_row_id"])
    places = [("", name) for name in also] + [("tokens", name) for name in SITES]
    for root, name in places:
        came, kept = found[root or "carried", name], live["collected" if root else "collected_carried", name]
        assert torch.equal(came, kept) and came.dtype == kept.dtype, name
    assert torch.equal(found["document_id"], live["collected_carried", "document_id"])
    ranks = [torch.arange(int(row.sum())) for batch in batches() for row in batch["attention_mask"]]
    assert torch.equal(found["position"], torch.cat(ranks))


def test_without_a_carried_document_the_sequence_is_it(store):
    keep = tg.StoreActivations(store, SITES)
    tg.run(from_model(keep), batches())
    found = store.rows(keep.run_id, sites=SITES[:1])[:]
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches()])
    assert torch.equal(found["document_id"], torch.arange(12).repeat_interleave(lengths))
    assert ("tokens", SITES[1]) not in found.keys(True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rows_keep_their_dtype_bit_by_bit(store, dtype):
    keep = tg.StoreActivations(store, ["x"], shard_bytes=100)
    given = rows(50, dtype=dtype)
    result = tg.run(keep, [given])
    found = store.rows(keep.run_id)[:]["tokens", "x"]
    assert found.dtype == dtype and torch.equal(found, given["tokens"]["x"])
    assert float(result["stored", "relative_error"]) == 0
    assert int(result["stored", "bytes"]) == 50 * (4 * dtype.itemsize + 8)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_a_cast_is_the_cast_of_torch_and_its_error_is_reported(store, name):
    dtype = getattr(torch, name)
    keep = tg.StoreActivations(store, ["x"], dtype=name, shard_bytes=300)
    given = rows(64, dtype=torch.float64)
    result = tg.run(keep, [given])
    x = given["tokens"]["x"]
    source = store.rows(keep.run_id)
    found = source[:]["tokens", "x"]
    assert found.dtype == torch.float64 and torch.equal(found, x.to(dtype).double())
    expected = float((found - x).norm() / x.norm())
    assert float(result["stored", "relative_error"]) == pytest.approx(expected, rel=1e-9)
    error = store.metadata(keep.run_id)["relative_error"]["tokens/x"]
    assert error["worst_row"] == pytest.approx(
        float(((found - x).norm(dim=1) / x.norm(dim=1)).max()), rel=1e-9
    )


def test_float8_scales_every_row_to_its_own_range(store):
    keep = tg.StoreActivations(store, ["x"], dtype="float8", shard_bytes=1000)
    given = rows(64, width=16)
    given["tokens"]["x"] *= torch.logspace(-20, 20, 64)[:, None]
    given["tokens"]["x"][5] = 0
    result = tg.run(keep, [given])
    x, found = given["tokens"]["x"], store.rows(keep.run_id)[:]["tokens", "x"]
    assert found.dtype == torch.float32 and torch.equal(found[5], torch.zeros(16))
    # e4m3 has 3 bits behind the point: half a step is 2^-4 of the value, or 2^-10 / 448 of the row's largest below the range
    largest = x.abs().amax(1, keepdim=True)
    assert ((found - x).abs() <= x.abs() * 2**-4 + largest * 2**-10 / 448 * 1.001).all()
    expected = float((found - x).double().norm() / x.double().norm())
    assert float(result["stored", "relative_error"]) == pytest.approx(expected, rel=1e-6) and expected < 0.04


def test_what_overflows_is_refused_and_never_stored_as_infinity(store):
    keep = tg.StoreActivations(store, ["x"], dtype="float16")
    given = rows(8)
    given["tokens"]["x"][3, 1] = 1e5
    with pytest.raises(
        StoreError, match=r"rows reach 1e\+05, beyond torch.float16 \(up to 6.55e\+04\).*bfloat16"
    ):
        tg.run(keep, [given])
    assert [record.state for record in store.catalogue.records()] == ["failed"]


def test_an_unknown_dtype_is_refused(store):
    with pytest.raises(ValueError, match="dtype='int4': rows are stored as they come"):
        tg.StoreActivations(store, ["x"], dtype="int4")


def test_shards_have_the_size_asked_for(store):
    keep = tg.StoreActivations(store, ["x"], shard_bytes=24 * 10)  # a row is 16 bytes and 8 of its id
    tg.run(keep, [rows(7, first_id=7 * i) for i in range(5)], block_rows=7)
    assert [shard.rows for shard in store.catalogue.shards(keep.run_id)] == [10, 10, 10, 5]
    assert [len(batch["row_id"]) for batch in store.rows(keep.run_id, batch_rows=8)] == [8, 2, 8, 2, 8, 2, 5]
    assert len(store.rows(keep.run_id, batch_rows=8)) == 35  # the rows, as a data set of torch's has it


def test_rows_by_number(store):
    keep = tg.StoreActivations(store, ["x"], shard_bytes=24 * 10, dtype="float8")
    tg.run(keep, [rows(95)])
    source = store.rows(keep.run_id)
    every = source[:]
    order = torch.randperm(95, generator=torch.Generator().manual_seed(0))
    for numbers in (order, order.tolist(), order - 95, [3, 3, -1]):
        found = source[numbers]
        assert torch.equal(found["row_id"], every["row_id"][numbers])
        assert torch.equal(found["tokens", "x"], every["tokens", "x"][numbers])
    assert source[[]]["tokens", "x"].shape == (0, 4)
    with pytest.raises(IndexError, match="rows are numbered 0 to 94"):
        source[[95]]


def test_rows_by_mask_and_nothing_else_in_place_of_numbers(store):
    keep = tg.StoreActivations(store, ["x"], shard_bytes=24 * 4)
    tg.run(keep, [rows(10)])
    source = store.rows(keep.run_id)
    mask = torch.arange(10) % 3 == 0
    for chosen in (mask, mask.numpy(), mask.tolist()):
        assert source[chosen]["row_id"].tolist() == [0, 3, 6, 9]
    for odd in (mask[:9], [0.5, 1.5], torch.zeros(2, 2, dtype=torch.int64), 3.0, ["1"]):
        with pytest.raises(IndexError, match="a list of numbers or a mask of all rows is asked for"):
            source[odd]


def test_a_carried_document_stays_the_document_whatever_is_read(store):
    keep = tg.StoreActivations(store, SITES, also=["document_id", "input_ids"])
    tg.run(from_model(keep, also=["document_id", "input_ids"]), batches())
    every, one = store.rows(keep.run_id)[:], store.rows(keep.run_id, sites=SITES[:1])[:]
    assert torch.equal(one["document_id"], every["document_id"]) and not torch.equal(
        every["document_id"], every["row_id"] >> 20
    )
    assert ("carried", "input_ids") not in one.keys(True)


def test_more_shards_than_a_process_may_open(store):
    keep = tg.StoreActivations(store, ["x"], shard_bytes=24)
    tg.run(keep, [rows(150)])
    source, every = store.rows(keep.run_id), torch.arange(150)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 120, before[1]))
    try:
        assert torch.equal(source[every]["row_id"], every) and torch.equal(
            source[every.flip(0)]["row_id"], every.flip(0)
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_rows_are_checked_against_their_hashes_where_asked(store):
    keep = tg.StoreActivations(store, ["x"], shard_bytes=24 * 4)
    tg.run(keep, [rows(10)])
    checked = store.rows(keep.run_id, verify=True)
    assert torch.equal(checked[:]["row_id"], torch.arange(10)) and len(list(checked)) == 3
    path = store.path / keep.run_id / "rank-00000-00000001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    assert len(list(store.rows(keep.run_id))) == 3  # sizes and headers are right
    checked = store.rows(keep.run_id, verify=True)
    assert checked[:4]["row_id"].tolist() == [0, 1, 2, 3]  # its first shard is
    for read in (lambda: checked[[5]], lambda: list(store.rows(keep.run_id, verify=True))):
        with pytest.raises(StoreError, match=rf"{path.name} is not what was written: its SHA-256 differs"):
            read()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_cast(store, dtype, value):
    keep = tg.StoreActivations(store, ["x"], dtype=dtype)
    given = rows(4)
    given["tokens"]["x"][2, 1] = value
    with pytest.raises(StoreError, match=r"rows hold NaN or Inf, which are not cast to .*nonfinite='drop'"):
        keep.update(TensorDict(given))
    keep = tg.StoreActivations(store, ["x"])
    keep.update(TensorDict(given))
    keep.sync_()
    came, kept = given["tokens"]["x"], store.rows(keep.run_id)[:]["tokens", "x"]
    assert torch.equal(kept.view(torch.int32), came.view(torch.int32))  # bit for bit, NaN too


def test_carried_values_of_any_shape_and_dtype_come_back(store):
    also = ["flag", "pair", "wave", "small"]
    given = rows(9)
    generator = torch.Generator().manual_seed(3)
    given["carried"] = {
        "flag": torch.arange(9) % 2 == 0, "pair": torch.randint(-5, 5, (9, 2, 3), generator=generator),
        "wave": torch.randn(9, 2, generator=generator, dtype=torch.complex64), "small": torch.arange(9).to(torch.uint16),
    }  # fmt: skip
    keep = tg.StoreActivations(store, ["x"], also=also, dtype="bfloat16", shard_bytes=200)
    keep.update(TensorDict(given))
    keep.sync_()
    for found in (store.rows(keep.run_id)[:], store.load(keep.run_id)[0]):
        for name in also:
            assert found["carried", name].dtype == given["carried"][name].dtype
            assert torch.equal(found["carried", name], given["carried"][name]), name
    ragged = rows(9, first_id=9)
    ragged["carried"] = {**given["carried"], "pair": torch.zeros(9, 2, 4, dtype=torch.int64)}
    again = tg.StoreActivations(store, ["x"], also=also, dtype="bfloat16")
    again.update(TensorDict(given))
    with pytest.raises(
        StoreError,
        match=r"\('carried', 'pair'\) is torch.int64 of shape \(2, 3\) a row in the run and .*\(2, 4\)",
    ):
        again.update(TensorDict(ragged))


def test_rows_are_copied_as_they_come(store):
    x, ids = torch.empty(10, 4), torch.empty(10, dtype=torch.int64)
    wanted = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    keep = tg.StoreActivations(store, ["x"], shard_bytes=24 * 25)
    for first in range(0, 60, 10):  # as a loader that fills one tensor again and again
        x.copy_(wanted[first : first + 10])
        torch.arange(first, first + 10, out=ids)
        keep.update(TensorDict({"tokens": {"x": x}, "row_id": ids}))
    keep.sync_()
    x.zero_(), ids.zero_()
    found = store.rows(keep.run_id)[:]
    assert torch.equal(found["tokens", "x"], wanted) and torch.equal(found["row_id"], torch.arange(60))
    batch = TensorDict({"tokens": {"x": x}, "carried": {"label": ids}})

    def refilled():
        for first in range(0, 60, 10):
            x.copy_(wanted[first : first + 10])
            torch.arange(first, first + 10, out=ids)
            yield batch

    keep = tg.StoreActivations(store, ["x"], also=["label"])
    tg.run(keep, refilled(), block_rows=25)
    found = store.rows(keep.run_id)[:]
    assert torch.equal(found["tokens", "x"], wanted) and torch.equal(
        found["carried", "label"], torch.arange(60)
    )


@pytest.mark.parametrize("width", [(3,), ()], ids=str)
def test_complex_rows_are_kept_exactly_or_refused(store, width):
    x = torch.randn(7, *width, generator=torch.Generator().manual_seed(0), dtype=torch.complex64)
    for given in (x, x.conj(), x.conj().imag):
        keep = tg.StoreActivations(store, ["x"])
        keep.update(TensorDict({"tokens": {"x": given}, "row_id": torch.arange(7)}))
        keep.sync_()
        found = store.rows(keep.run_id)[:]["tokens", "x"]
        assert found.dtype == given.dtype and torch.equal(found, given.resolve_conj().resolve_neg())
    keep = tg.StoreActivations(store, ["x"], dtype="bfloat16")
    with pytest.raises(
        ValueError, match=r"casts real rows to torch.bfloat16, got torch.complex64 at .*view_as_real"
    ):
        keep.update(TensorDict({"tokens": {"x": x}, "row_id": torch.arange(7)}))


def test_rows_of_a_dtype_that_shards_do_not_hold_begin_no_run(store):
    keep = tg.StoreActivations(store, ["x"])
    with pytest.raises(StoreError, match="'tokens/x' has dtype torch.complex128, which shards do not hold"):
        keep.update(TensorDict({**rows(2), "tokens": {"x": torch.ones(2, 2, dtype=torch.complex128)}}))
    assert len(store.query()) == 0


def test_rows_of_an_unknown_site_or_of_a_capture_are_refused(store):
    keep = tg.StoreActivations(store, ["x"])
    tg.run(keep, [rows(3)])
    with pytest.raises(StoreError, match=r"the run holds no rows of \['y'\]; it holds \['x'\]"):
        store.rows(keep.run_id, sites=["y"])
    with pytest.raises(StoreError, match="holds no rows: it was saved from memory"):
        store.rows(store.save(torch.ones(2)))


def test_rows_that_change_are_refused(store):
    keep = tg.StoreActivations(store, ["x"])
    keep.update(TensorDict(rows(3)))
    with pytest.raises(
        StoreError,
        match=r"is torch.float32 of shape \(4,\) a row in the run and torch.float32 of shape \(1,\)",
    ):
        keep.update(TensorDict(rows(3, width=1)))
    with pytest.raises(StoreError, match="torch.float64 of shape"):
        keep.update(TensorDict(rows(3, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"expects \('tokens', 'x'\) of shape \(3, ...\).*SelectTokens"):
        keep.update(TensorDict({**rows(2), "row_id": torch.arange(3)}))


def test_load_gives_all_rows_and_what_the_run_said(store):
    keep = tg.StoreActivations(store, ["x"], shard_bytes=200, model=models.gpt2(), tag="t", positions="all")
    given = rows(20)
    tg.run(keep, [given])
    found, metadata = store.load(keep.run_id)
    assert torch.equal(found["tokens", "x"], given["tokens"]["x"])
    assert (
        metadata["kind"] == "activations"
        and metadata["rows"] == 20
        and metadata["config"]["n_embd"] == models.WIDTH
    )


class Interrupted(Exception):
    pass


def broken(batches, after):
    for number, batch in enumerate(batches):
        if number == after:
            raise Interrupted
        yield batch


def test_an_interrupted_run_is_not_complete_and_goes_on_from_its_last_shard(store):
    loader = [rows(10, seed=i, first_id=10 * i) for i in range(8)]
    keep = tg.StoreActivations(store, ["x"], shard_bytes=24 * 15)
    with pytest.raises(Interrupted):
        tg.run(keep, broken(loader, 4), block_rows=10)
    run = keep.run_id
    record = store.catalogue.record(run)
    assert record.state == "failed" and record.rows == 40 and "resume" in record.reason
    with pytest.raises(StoreError, match="not complete: its state is failed"):
        store.rows(run)
    assert store.rows(run, partial=True).rows == 40
    again = tg.StoreActivations(store, ["x"], shard_bytes=24 * 15, resume=run)
    result = tg.run(again, loader, block_rows=10)
    assert again.run_id == run and int(result["stored", "rows"]) == 80
    found = store.rows(run)[:]
    assert torch.equal(found["row_id"], torch.arange(80))
    assert torch.equal(found["tokens", "x"], torch.cat([batch["tokens"]["x"] for batch in loader]))
    assert store.verify() == []


def test_an_exception_lets_go_of_the_run_while_its_stage_lives_on(store, tmp_path):
    loader = [rows(10, seed=i, first_id=10 * i) for i in range(8)]
    options = {"checkpoint": tmp_path / "state", "every": 3, "block_rows": 10}
    first = tg.StoreActivations(store, ["x"])
    try:
        tg.run(first, broken(loader, 5), **options)
    except Interrupted:  # its traceback holds the stage
        second = tg.StoreActivations(store, ["x"])
        tg.run(second, loader, **options)
    assert store.query().ids == [first.run_id] == [second.run_id]
    assert store.rows(first.run_id)[:]["row_id"].tolist() == list(range(80))


def test_the_first_error_is_the_one_reported(store, monkeypatch):
    keep = tg.StoreActivations(store, ["x"])
    monkeypatch.setattr(keep, "release", lambda: 1 / 0)
    with pytest.raises(Interrupted):
        tg.run(keep, broken([rows(10)] * 3, 2))


def test_a_complete_run_is_not_added_to(store):
    keep = tg.StoreActivations(store, ["x"])
    tg.run(keep, [rows(3)])
    with pytest.raises(StoreError, match="is complete, so nothing is added to it"):
        tg.run(tg.StoreActivations(store, ["x"], resume=keep.run_id), [rows(3)])
    with pytest.raises(StoreError, match="is complete, so nothing is added to it"):
        keep.update(TensorDict(rows(3)))
    assert store.catalogue.record(keep.run_id).rows == 3


def test_two_writers_of_one_run_are_refused(store):
    first = tg.StoreActivations(store, ["x"])
    first.update(TensorDict(rows(3)))
    second = tg.StoreActivations(store, ["x"], resume=first.run_id)
    with pytest.raises(StoreBusyError, match=r"is being written by process \d+ on .*Wait for it"):
        second.update(TensorDict(rows(3)))
    first.sync_()
    assert store.catalogue.record(first.run_id).state == "complete"


def test_a_run_that_is_resumed_must_hold_the_same_rows(store):
    first = tg.StoreActivations(store, ["x"])
    first.update(TensorDict(rows(3)))
    first.reset()
    run = store.catalogue.records()[0].id
    with pytest.raises(
        StoreError,
        match=r"\('tokens', 'x'\) is torch.float32 of shape \(4,\) a row in the run and .*bfloat16",
    ):
        tg.run(tg.StoreActivations(store, ["x"], resume=run, dtype="bfloat16"), [rows(3)])
    with pytest.raises(StoreError, match="is of the model None, so it does not go on with 'another'"):
        tg.StoreActivations(store, ["x"], resume=run, model="another")
    with pytest.raises(StoreError, match="there is no run 'r000000000000'"):
        tg.StoreActivations(store, ["x"], resume="r000000000000")


def test_a_saved_state_claims_only_rows_on_the_disk_and_goes_on(store):
    first = tg.StoreActivations(store, ["x"])
    first.update(TensorDict(rows(3)))
    state = first.state_dict()
    assert store.catalogue.record(first.run_id).rows == 3
    first.update(TensorDict(rows(4, first_id=3)))
    del first  # a killed process: rows 3 to 6 were in memory
    second = tg.StoreActivations(store, ["x"])
    second.load_state_dict(state)
    second.update(TensorDict(rows(4, first_id=3)))
    second.sync_()
    found = store.rows(second.run_id)[:]
    assert found["row_id"].tolist() == list(range(7)) and len(store.catalogue.records()) == 1


def test_a_run_with_a_checkpoint_goes_on_with_the_same_stored_run(store, tmp_path):
    loader = [rows(10, seed=i, first_id=10 * i) for i in range(8)]
    parts = lambda: TensorDictSequential(
        tg.StoreActivations(store, ["x"], shard_bytes=24 * 15), tg.StreamingMean(in_keys=[("tokens", "x")])
    )
    checkpoint = {"checkpoint": tmp_path / "state", "every": 2, "block_rows": 10}
    with pytest.raises(Interrupted):
        tg.run(
            parts(), broken(loader, 5), **checkpoint
        )  # the state is that of batch 4; batch 5 was stored beyond it
    result = tg.run(parts(), loader, **checkpoint)
    [record] = store.catalogue.records()
    assert record.state == "complete" and int(result["stored", "rows"]) == record.rows == 80
    found = store.rows(record.id)[:]
    assert torch.equal(found["row_id"], torch.arange(80))
    x = torch.cat([batch["tokens"]["x"] for batch in loader])
    assert torch.equal(found["tokens", "x"], x)
    torch.testing.assert_close(result["mean", "mean"], x.double().mean(0))


def test_every_run_of_a_pipeline_is_a_run_of_its_own(store):
    keep = tg.StoreActivations(store, ["x"])
    ids = []
    for _ in range(2):
        tg.run(keep, [rows(3)])
        ids.append(keep.run_id)
    assert ids[0] != ids[1] and [record.rows for record in store.catalogue.records()] == [3, 3]


def test_memory_does_not_grow_with_the_run(tmp_path):
    program = """
import resource, sys
from pathlib import Path
import torch, tdgeom as tg
from tensordict import TensorDict

def peak():  # in kB; on Linux a process inherits its parent's ru_maxrss
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000

keep = tg.StoreActivations(sys.argv[1], ["x"], shard_bytes=8 * 2**20, dtype="bfloat16")
x = torch.randn(1000, 1000)
peaks = []
for block in range(60):
    keep.update(TensorDict({"tokens": {"x": x}, "row_id": torch.arange(1000) + 1000 * block}))
    peaks.append(peak())
keep.sync_()
for batch in keep.store.rows(keep.run_id):
    pass
peaks.append(peak())
print(peaks[10], peaks[-2], peaks[-1])
"""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    # one arena: what the C library keeps for the thread that hashes moves the peak by 25 MB from run to run
    environment["MALLOC_ARENA_MAX"] = "1"
    said = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    early, written, read = map(int, said.stdout.split())
    assert written - early < 20_000 and read - early < 60_000  # kB; 120 MB were stored, 240 MB given


def test_arguments_are_checked(store):
    with pytest.raises(TypeError, match="sites and also are lists"):
        tg.StoreActivations(store, "x")
    with pytest.raises(ValueError, match="shard_bytes must be at least 1"):
        tg.StoreActivations(store, ["x"], shard_bytes=0)
    with pytest.raises(StoreError, match="has seen no rows, so it has begun no run"):
        tg.StoreActivations(store, ["x"]).run_id


def test_one_unnamed_site_and_what_it_carries(store):
    x, label = torch.randn(20, 3), torch.arange(20) % 3
    keep = tg.StoreActivations(store, also=["label"])
    tg.run(keep, [{"tokens": x, "carried": {"label": label}}])
    found = store.rows(keep.run_id)[:]
    assert torch.equal(found["tokens"], x) and torch.equal(found["carried", "label"], label)


def test_a_site_and_a_carried_value_of_one_name(store):
    x, label = torch.randn(20, 3), torch.arange(20)
    keep = tg.StoreActivations(store, ["label"], also=["label"], dtype="float64")
    tg.run(keep, [{"tokens": {"label": x}, "carried": {"label": label}}])
    for source in (store.rows(keep.run_id), store.rows(keep.run_id, sites=["label"], also=["label"])):
        found = source[:]
        assert torch.equal(found["tokens", "label"], x) and torch.equal(found["carried", "label"], label)
    assert "carried" not in store.rows(keep.run_id, sites=["label"])[:].keys()


def test_rows_of_before_carried_values_had_a_root_of_their_own(store):
    keep = tg.StoreActivations(store, ["x"], also=["label", "document_id"])
    given = {"label": torch.arange(9), "document_id": torch.arange(9) // 4}
    tg.run(keep, [{**rows(9), "carried": given}])
    with store.catalogue.changing([keep.run_id]) as connection:
        connection.execute("""UPDATE runs SET layout=replace(layout, '"carried",', '"tokens",')""")
    every, one = store.rows(keep.run_id, also=["label"])[:], store.rows(keep.run_id, sites=["x"])[:]
    assert torch.equal(every["carried", "label"], given["label"])
    assert torch.equal(every["document_id"], given["document_id"])
    assert torch.equal(one["document_id"], given["document_id"])
    assert list(every["tokens"].keys()) == list(one["tokens"].keys()) == ["x"]


def test_settings_are_plain_and_make_the_stage_again(store):
    keep = tg.StoreActivations(
        store, ["x"], also=["label"], dtype="bfloat16", shard_bytes=1000, tag=["a", "b"]
    )
    told = json.loads(json.dumps(keep.settings()))
    assert told["store"] == str(store.path) and told["dtype"] == "bfloat16" and told["tag"] == ["a", "b"]
    again = tg.StoreActivations.from_settings(told)
    assert again.in_keys == keep.in_keys and again.settings() == keep.settings()
    for stage in (keep, again):
        stage.update(TensorDict({**rows(3), "carried": {"label": torch.arange(3)}}))
        stage.settle()
    other = tg.StoreActivations(store.path, ["x"], also=["label"], dtype=torch.bfloat16, tag="c")
    other.merge_(keep).merge_(again)
    assert int(other.result()["rows"]) == 6
    with pytest.raises(ValueError, match="the same settings: dtype"):
        tg.StoreActivations(store, ["x"], also=["label"]).merge_(keep)


def test_one_unnamed_site(store):
    keep = tg.StoreActivations(store, dtype="float16")
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    live = tg.run(TensorDictSequential(tg.StreamingCovariance(), keep), [{"tokens": x}])
    stored = tg.run(tg.StreamingCovariance(), store.rows(keep.run_id, batch_rows=6))
    torch.testing.assert_close(stored["moments", "mean"], x.half().double().mean(0))
    assert int(stored["moments", "count"]) == int(live["moments", "count"]) == 20
