"""Files and catalogues that were tampered with are refused in words; nothing in them becomes a path or runs."""

from __future__ import annotations

import json
import os
import sqlite3
import struct

import pytest
import safetensors.torch
import torch

import tdgeom as tg
from tdgeom.files.errors import StoreError
from tdgeom.files.shard_writing import write_shard
from tdgeom.files.shards import Shard
from tdgeom.store.shard_layout import Layout
from tdgeom.store.store import ActivationStore


@pytest.fixture
def store(tmp_path):
    return ActivationStore(tmp_path / "store")


def shard_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(**changes):
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}


BAD_HEADERS = {
    "claims more than the file": (b"{}", 1 << 62, "its header claims"),
    "claims 2 GB": (b"{}", 1 << 31, "its header claims"),
    "no JSON": (b"{'a'", None, "not valid JSON"),
    "no object": (b"[]", None, "no JSON object"),
    "no UTF-8": (b'{"\xff": 1}', None, "not valid JSON"),
    "deep": (b'{"a":' * 5000 + b"1" + b"}" * 5000, None, "not valid JSON|nested deeper"),
    "a name twice": (b'{"a": 1, "a": 2}', None, "names a key twice"),
    "no entry": ({"a": 3}, None, "is not one"),
    "another field": ({"a": entry(code="x")}, None, "is not one"),
    "unknown dtype": ({"a": entry(dtype="OBJECT")}, None, "is not one"),
    "dtype is a list": ({"a": entry(dtype=["F32"])}, None, "is not one"),
    "negative size": ({"a": entry(shape=[-2, -2])}, None, "is not one"),
    "true as a size": ({"a": entry(shape=[True, 4])}, None, "is not one"),
    "huge size": ({"a": entry(shape=[1 << 62, 0])}, None, "is not one"),
    "huge product": ({"a": entry(shape=[1 << 40, 1 << 40, 0], data_offsets=[0, 0])}, None, "does not fit"),
    "17 dimensions": ({"a": entry(shape=[1] * 17)}, None, "is not one"),
    "one offset": ({"a": entry(data_offsets=[0])}, None, "is not one"),
    "offsets backwards": ({"a": entry(data_offsets=[16, 0])}, None, "does not fit"),
    "offsets outside": ({"a": entry(data_offsets=[16, 32])}, None, "does not fit"),
    "another length": ({"a": entry(shape=[2, 3])}, None, "does not fit"),
    "a gap": ({"a": entry(shape=[2], data_offsets=[8, 16])}, None, "leaves a gap"),
    "overlap": ({"a": entry(), "b": entry()}, None, "overlaps"),
    "too short": ({"a": entry(shape=[2], data_offsets=[0, 8])}, None, "its tensors end at byte"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_shard_with_a_bad_header_is_refused(tmp_path, name):
    header, length, message = BAD_HEADERS[name]
    with pytest.raises(StoreError, match=message):
        Shard(shard_file(tmp_path / "x.safetensors", header, bytes(16), length))


def test_shards_are_safetensors_files_both_ways(tmp_path):
    tensors = {
        "a/b": torch.randn(3, 5).bfloat16(), "odd": torch.ones(3, dtype=torch.int8), "scalar": torch.tensor(2.5),
        "wide": torch.randn(3, 2, dtype=torch.float64), "empty": torch.zeros(0, 4), "flag": torch.tensor([True, False]),
    }  # fmt: skip
    write_shard(tmp_path / "ours.safetensors", tensors)
    theirs = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    ours = Shard(tmp_path / "theirs.safetensors")
    assert set(theirs) == set(ours.tensors) == set(tensors)
    for name, value in tensors.items():
        assert torch.equal(theirs[name], value) and theirs[name].dtype == value.dtype
        assert torch.equal(ours.whole(name), value) and ours.whole(name).dtype == value.dtype


def test_booleans_that_are_none_are_read_as_true(tmp_path):
    path = shard_file(
        tmp_path / "x", {"a": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}, b"\x00\x01\xff"
    )
    assert Shard(path).whole("a").tolist() == [False, True, True]


def test_a_shard_that_is_a_link_or_a_pipe_is_refused(store, tmp_path):
    run = store.save(torch.ones(3))
    [shard] = store.catalogue.shards(run)
    path = store.path / run / shard.name
    secret = tmp_path / "secret"
    path.rename(secret)
    path.symlink_to(secret)
    with pytest.raises(StoreError, match="symbolic link, which a store never holds"):
        store.load(run)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StoreError, match="is no regular file"):
        store.load(run)


def test_a_shard_exchanged_for_another_of_the_same_size_is_refused(store):
    first, second = store.save(torch.ones(2, 2)), store.save(torch.ones(4, 1))
    path = lambda run: store.path / run / "rank-00000-00000000.safetensors"
    path(first).write_bytes(path(second).read_bytes())
    with pytest.raises(
        StoreError, match=r"is torch.float32 of shape \(4, 1\), the catalogue says .*\(2, 2\)"
    ):
        store.load(first)


def sql(store, statement, *values):
    with sqlite3.connect(store.catalogue.path) as connection:
        connection.execute(statement, values)
    connection.close()


@pytest.mark.parametrize(
    ("statement", "value"),
    [
        ("UPDATE runs SET id=?", "../../../etc"),
        ("UPDATE runs SET id=?", b"\xff\xfe"),
        ("UPDATE runs SET kind=?", "pickle"),
        ("UPDATE runs SET state=?", "finished"),
        ("UPDATE runs SET created=?", "yesterday"),
        ("UPDATE runs SET created=?", 1e300),
        ("UPDATE runs SET model=?", b"\x00blob"),
        ("UPDATE runs SET details=?", "[1, 2"),
        ("UPDATE runs SET details=?", '{"unknown": 1}'),
        ("UPDATE runs SET details=?", '{"metadata":' * 3000 + "1" + "}" * 3000),
        ("UPDATE runs SET details=?", '{"metadata": 1e999}'),
        ("UPDATE runs SET layout=?", "{}"),
        ("UPDATE runs SET layout=?", '{"rows": true}'),
        ("UPDATE runs SET layout=?", b"{}"),
        ("UPDATE shards SET rows=?", -5),
        ("UPDATE shards SET rank=?", "../../x"),
        ("UPDATE shards SET number=?", 2**60),
        ("UPDATE shards SET bytes=?", 17),
        ("UPDATE shards SET rounding=?", '{"x": [1]}'),
        ("UPDATE shards SET sha256=?", b"\x00"),
        ("INSERT INTO shards SELECT run, 1, 0, rows, bytes, sha256, rounding FROM shards WHERE run <> ?", ""),
    ],
)  # fmt: skip
def test_a_catalogue_with_a_bad_entry_is_refused_in_words(store, statement, value):
    run = store.save({"acts": {"x": torch.ones(2, 2)}}, model="m")
    sql(store, statement, value)
    with pytest.raises(StoreError):
        store.catalogue.records()
        store.load(run)


@pytest.mark.parametrize(
    "change",
    [
        {"entries": [{"key": ["a"], "name": "a", "dtype": "object", "stored": "float32", "shape": []}]},
        {"entries": [{"key": [], "name": "a", "dtype": "float32", "stored": "float32", "shape": []}]},
        {"entries": [{"key": ["a"], "name": 3, "dtype": "float32", "stored": "float32", "shape": []}]},
        {"entries": [{"key": ["a"], "name": "a", "dtype": "float32", "stored": "float32", "shape": [-1]}]},
        {"entries": 7},
        {"values": [[["a"], 1], [["a", "b"], 2]]},
        {"values": [[["a"], 1], [["a"], 2]]},
        {"rows": 1},
        {"batch_size": [1.5]},
    ],
)  # fmt: skip
def test_a_bad_layout_is_refused(change):
    raw = {**json.loads(Layout().to_json()), **change}
    with pytest.raises(StoreError, match="the layout is damaged"):
        Layout.from_json(json.dumps(raw), "the layout")


def test_row_ids_that_are_no_ids_are_refused(store):
    keep = tg.StoreActivations(store, ["x"])
    tg.run(keep, [{"tokens": {"x": torch.ones(2, 2)}}])
    layout = store.catalogue.layout(keep.run_id).to_json().replace('"int64"', '"float64"')
    sql(store, "UPDATE runs SET layout=?", layout)
    with pytest.raises(StoreError, match="holds no rows"):
        store.rows(keep.run_id)
    with pytest.raises(StoreError, match=r"is torch.int64 of shape \(2,\), the catalogue says torch.float64"):
        store.load(keep.run_id)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER t AFTER INSERT ON tags BEGIN DELETE FROM runs; END",
        "CREATE VIEW v AS SELECT * FROM runs",
        "CREATE TABLE more (x)",
        "DROP TABLE tags",
    ],
)
def test_other_tables_than_ours_are_refused(store, statement):
    sql(store, statement)
    with pytest.raises(StoreError, match="has other tables than a catalogue of tdgeom"):
        store.catalogue.records()


def test_a_file_that_is_no_catalogue_is_refused(tmp_path):
    (tmp_path / "catalogue.sqlite").write_bytes(os.urandom(9000))
    with pytest.raises(StoreError, match="damaged or was not written by tdgeom"):
        ActivationStore(tmp_path).catalogue.records()
    (tmp_path / "catalogue.sqlite").unlink()
    with sqlite3.connect(tmp_path / "catalogue.sqlite") as connection:
        connection.execute("CREATE TABLE x (y)")
    connection.close()
    with pytest.raises(StoreError, match="no catalogue of tdgeom"):
        ActivationStore(tmp_path).catalogue.records()


def test_a_catalogue_of_a_later_format_is_refused(store):
    sql(store, "PRAGMA user_version=2")
    with pytest.raises(StoreError, match="has format 2; this version reads 1"):
        store.catalogue.records()


def test_a_catalogue_that_is_a_link_is_refused(store, tmp_path):
    store.catalogue.path.rename(tmp_path / "elsewhere")
    store.catalogue.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="is a symbolic link"):
        store.catalogue.records()


NASTY = ["../../x", "'; DROP TABLE runs; --", "a\x00b", "x" * 4096, "🦆/\n", "NULL", "%s{}"]


@pytest.mark.parametrize("name", NASTY)
def test_names_are_only_names(store, name):
    run = store.save({name: torch.ones(1)}, model=name, experiment=name, tag=name, metadata={name: name})
    found, metadata = store.load(run)
    assert list(found.keys()) == [name] and metadata["tags"] == [name] and metadata["experiment"] == name
    assert metadata["model"] == name and metadata["metadata"] == {name: name}
    keep = tg.StoreActivations(store, [name], tag=name)
    tg.run(keep, [{"tokens": {name: torch.ones(2, 2)}}])
    assert store.rows(keep.run_id)[:]["tokens", name].shape == (2, 2)
    inside = {path.name for path in store.path.iterdir()}
    assert inside - {"catalogue.sqlite-wal", "catalogue.sqlite-shm"} == {"catalogue.sqlite", run, keep.run_id}
    assert list(store.path.parent.iterdir()) == [store.path]
