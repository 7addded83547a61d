"""Files and catalogues that were tampered with are refused in words; nothing in them becomes a path or runs."""

from __future__ import annotations

import json
import os
import sqlite3

import pytest
import torch

import tdgeom as tg
from tdgeom.files.errors import StoreError
from tdgeom.store.activation_store import ActivationStore
from tdgeom.store.shard_layout import ShardLayout


@pytest.fixture
def store(tmp_path):
    return ActivationStore(tmp_path / "store")


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
        {"entries": [{"key": "ab", "name": "a", "dtype": "float32", "stored": "float32", "shape": [1]}]},
        {"entries": [{"key": ["a"], "name": "a", "dtype": "float32", "stored": "float32", "shape": [True]}]},
        {"entries": [{"key": ["a"], "name": "a", "dtype": "float32", "stored": "float32", "shape": [0, 2**60]}]},
        {"values": [[[], 1]]},
        {"stacks": [["a"]]},
        {"rows": 1},
        {"batch_size": [1.5]},
    ],
)  # fmt: skip
def test_a_bad_layout_is_refused(change):
    raw = {**json.loads(ShardLayout().to_json()), **change}
    with pytest.raises(StoreError, match="the layout is damaged"):
        ShardLayout.from_json(json.dumps(raw), "the layout")


def test_row_ids_that_are_no_ids_are_refused(store):
    keep = tg.StoreActivations(store, ["x"])
    tg.run(keep, [{"tokens": {"x": torch.ones(2, 2)}}])
    layout = store.catalogue.layout(keep.run_id).to_json().replace('"int64"', '"float64"')
    with store.catalogue.changing([keep.run_id]) as connection:
        connection.execute("UPDATE runs SET layout=?", (layout,))
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
    sql(store, "PRAGMA user_version=3")
    with pytest.raises(StoreError, match="has format 3; this version reads 2"):
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
