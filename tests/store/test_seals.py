"""A bit that has changed in any field of the catalogue is found, and what it says is not believed."""

from __future__ import annotations

import random
import shutil
import sqlite3
import struct
from contextlib import closing

import pytest
import torch

import tdgeom as tg
from tdgeom.files.errors import StoreError
from tdgeom.store.activation_store import ActivationStore

TABLES = ("runs", "tags", "shards", "seals")


@pytest.fixture
def store(tmp_path):
    store = ActivationStore(tmp_path / "store", journal="rollback")  # all of it in one file
    store.save(
        {"acts": {"x": torch.ones(2, 2)}},
        model="m",
        dataset="d",
        revision="r",
        tag=["a", "b"],
        config={"k": 1.5},
    )
    keep = tg.StoreActivations(store, ["x"], dtype="float16", shard_bytes=500)
    tg.run(keep, [{"tokens": {"x": torch.randn(60, 4, generator=torch.Generator().manual_seed(0))}}])
    assert len(store.catalogue.shards(keep.run_id)) > 1 and store.verify() == []
    return store


def fields(path):
    with closing(sqlite3.connect(path)) as connection:
        for table in TABLES:
            columns = [told[1] for told in connection.execute(f"PRAGMA table_info({table})")]
            for number, *values in connection.execute(f"SELECT rowid, * FROM {table}").fetchall():
                yield from ((table, number, *field) for field in zip(columns, values))


def with_a_bit_flipped(value, bit):
    if isinstance(value, str):
        raw = bytearray(value.encode())
        raw[bit % len(raw)] ^= 1 << bit % 8
        return bytes(raw)
    if isinstance(value, float):
        (whole,) = struct.unpack("<Q", struct.pack("<d", value))
        return struct.unpack("<d", struct.pack("<Q", whole ^ 1 << bit % 64))[0]
    return value ^ 1 << bit % 40 if isinstance(value, int) else "x"


def test_a_flipped_bit_in_any_column_of_any_row_is_found(store, tmp_path) -> None:
    draw, path = random.Random(0), store.catalogue.path
    whole = shutil.copy(path, tmp_path / "whole.sqlite")
    tried = set()
    for table, number, column, value in list(fields(whole)):
        shutil.copy(whole, path)
        changed = with_a_bit_flipped(value, draw.randrange(4096))
        as_text = "CAST(? AS TEXT)" if isinstance(changed, bytes) else "?"
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(f"UPDATE {table} SET {column} = {as_text} WHERE rowid = ?", (changed, number))
            connection.commit()
        assert store.verify(), (table, column, value, changed)
        tried.add((table, column))
    assert len(tried) == 12 + 2 + 7 + 3


def test_a_run_whose_entry_has_changed_is_neither_loaded_nor_changed_further(store) -> None:
    run = store.query()[1]["id"]
    with closing(sqlite3.connect(store.catalogue.path)) as connection:
        connection.execute("UPDATE runs SET layout = replace(layout, '\"x\"', '\"y\"') WHERE id = ?", (run,))
        connection.commit()
    for use in (store.load, store.rows, lambda one: store.query()[1:].retag("c")):
        with pytest.raises(StoreError, match=f"entry of run {run} .*is not what was written"):
            use(run)
    assert {damage.run for damage in store.verify()} == {run} and store.verify(store.query().ids[0]) == []
    store.remove(run)
    assert store.verify() == []


def test_what_is_changed_on_purpose_is_sealed_again(store) -> None:
    store.query().retag("new", remove="a").rename_experiment("other")
    store.delete(0)
    assert store.verify() == [] and store.query(tag="new").ids == store.query().ids


def test_a_catalogue_of_before_there_were_seals_is_read_and_gets_them_when_it_is_written(store) -> None:
    with closing(sqlite3.connect(store.catalogue.path)) as connection:
        connection.execute("DROP TABLE seals")
        connection.execute("PRAGMA user_version = 1")
        connection.commit()
    ids = store.query().ids
    assert store.verify() == [] and len(store.rows(ids[1])[:]["row_id"]) == 60
    store.query().retag("seen")
    with closing(sqlite3.connect(store.catalogue.path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (2,)
        connection.execute("UPDATE runs SET model = 'n' WHERE model = 'm'")
        connection.commit()
    assert [damage.run for damage in store.verify()] == ids[:1]


MOUNTS = """22 1 8:1 / / rw - ext4 /dev/sda1 rw
40 22 0:50 / /home rw shared:1 - {kind} server:/home rw
41 22 0:51 / /home/with\\040space rw - {kind} server:/other rw
42 40 0:52 / /home/local rw - xfs /dev/sdb1 rw
"""


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "lustre", "fuse.sshfs"])
def test_a_new_catalogue_on_a_network_file_system_has_a_rollback_journal(kind, tmp_path, monkeypatch) -> None:
    from tdgeom.store import journals

    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS.format(kind=kind))
    monkeypatch.setattr(journals, "_MOUNTS", mounts)
    assert (
        journals.network_file_system("/home/me") == kind == journals.network_file_system("/home/with space/x")
    )
    assert journals.network_file_system("/home/local/me") is journals.network_file_system("/homeless") is None
    local = ActivationStore(tmp_path / "local")
    assert journal(local) == "wal"
    mounts.write_text(MOUNTS.format(kind=kind).replace("/home ", f"{tmp_path} "))
    assert journal(ActivationStore(tmp_path / "remote")) == "delete"
    with pytest.warns(UserWarning, match=rf"network file system \({kind}\) .*journal='rollback'"):
        ActivationStore(tmp_path / "local")
    run = local.save(torch.ones(2))
    again = ActivationStore(tmp_path / "local", journal="rollback")
    assert journal(again) == "delete" and torch.equal(again.load(run)[0]["tensor"], torch.ones(2))
    assert journal(ActivationStore(tmp_path / "local", journal="wal")) == "wal"
    with pytest.raises(ValueError, match="journal takes 'wal' or 'rollback', got 'log'"):
        ActivationStore(tmp_path / "local", journal="log")


def journal(store) -> str:
    with closing(sqlite3.connect(store.catalogue.path)) as connection:
        return connection.execute("PRAGMA journal_mode").fetchone()[0]
