"""A full disk, a read-only or vanished folder, a flipped bit, readers beside a writer: clear errors, nothing half done."""

from __future__ import annotations

import os
import resource
import shutil
import sqlite3
import stat
import tempfile
import threading
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

import tdgeom as tg
from tdgeom.files.errors import StoreError
from tdgeom.store.activation_store import ActivationStore


@pytest.fixture
def store(tmp_path):
    return ActivationStore(tmp_path / "store")


def rows(n, first_id=0, width=64):
    ids = torch.arange(first_id, first_id + n)
    return TensorDict({"tokens": {"x": ids[:, None].float().expand(n, width)}, "row_id": ids})


@contextmanager
def largest_file(size):
    """As a quota: no file of this process may grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_a_run_as_failed_and_it_goes_on_later(store):
    keep = tg.StoreActivations(store, ["x"], shard_bytes=200_000)
    keep.update(rows(1000))
    run, held = keep.run_id, store.catalogue.record(keep.run_id).rows
    assert held == 757  # 264 bytes a row
    with largest_file(150_000):
        with pytest.raises(
            StoreError, match="no space is left .*the run is not complete: free space, then continue"
        ):
            keep.update(rows(1000, 1000))
        with pytest.raises(StoreError, match=f"run {run} could not be written .*resume='{run}'"):
            keep.update(rows(1000, 2000))
        with pytest.raises(StoreError, match="could not be written"):
            keep.sync_()
    record = store.catalogue.record(run)
    assert record.state == "failed" and "no space is left" in record.reason and record.rows == held
    assert [path.name for path in (store.path / run).glob(".*")] == []
    assert store.verify() == [] and torch.equal(
        store.rows(run, partial=True)[:]["row_id"], torch.arange(held)
    )
    again = tg.StoreActivations(store, ["x"], resume=run)
    tg.run(again, [rows(3000)])
    assert torch.equal(store.rows(run)[:]["row_id"], torch.arange(3000))


def test_no_space_for_the_catalogue(store):
    run = store.save(torch.ones(3))
    with largest_file(1000), pytest.raises(StoreError, match=r"writing the catalogue .*no space is left"):
        store.save(torch.ones(3))
    assert [record.id for record in store.catalogue.records()] == [run] and store.verify() == []


def test_no_space_for_a_capture(store):
    with largest_file(100_000), pytest.raises(StoreError, match="no space is left"):
        store.save(torch.ones(100_000))
    [record] = store.catalogue.records()
    assert record.state == "failed" and "no space is left" in record.reason


def test_a_full_disk_can_still_be_read(store):
    run = store.save(torch.arange(4))
    with largest_file(0):
        assert torch.equal(store.load(run)[0]["tensor"], torch.arange(4)) and store.verify() == []
        with pytest.raises(StoreError, match="no space is left"):
            store.remove(run)
    store.remove(run)


def test_on_a_full_disk_a_run_can_still_be_removed(store, monkeypatch):
    first, second, small = (store.save(torch.ones(n)) for n in (300_000, 300_000, 9))

    def set_state(run, state, reason=None):
        raise StoreError("writing the catalogue: database or disk is full")

    monkeypatch.setattr(store.catalogue, "set_state", set_state)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    store.remove(first)
    assert store.query().ids == [second, small] and not (store.path / first).exists() and store.verify() == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    with pytest.raises(StoreError, match="disk is full"):  # refused for another reason: nothing is touched
        store.remove(second)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(StoreError, match="disk is full"):  # its files would not make room for the catalogue
        store.remove(small)
    assert store.load(second)[0]["tensor"].sum() == 300_000 and store.load(small)[0]["tensor"].sum() == 9


@contextmanager
def read_only(folder):
    """Nobody may write there; root, whom no permission stops, becomes another user for a while."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(
            path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH) | stat.S_IRGRP | stat.S_IROTH
        )
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(os.getuid())
        for path in [folder, *folder.rglob("*")]:
            path.chmod(path.stat().st_mode | stat.S_IWUSR)


@pytest.fixture
def open_folder():
    """A folder whose parents everybody may enter, as pytest's own are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_read_only_store_is_read_and_not_written(open_folder):
    store = ActivationStore(open_folder / "store")
    run = store.save(torch.arange(4))
    with read_only(open_folder):
        assert torch.equal(ActivationStore(store.path).load(run)[0]["tensor"], torch.arange(4))
        assert store.verify() == []
        with pytest.raises(StoreError, match=r"making .*Give a folder of your own, or mount it writable"):
            store.save(torch.ones(1))
        with pytest.raises(StoreError, match="making the store .*cannot be written"):
            ActivationStore(open_folder / "another")
        with pytest.raises(StoreError, match="the folder is gone or cannot be written"):
            store.remove(run)
    assert store.catalogue.record(run).state == "complete"


@pytest.mark.parametrize("mask", [0o077, 0o002])
def test_every_file_keeps_to_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        keep = tg.StoreActivations(ActivationStore(tmp_path / "store"), ["x"])
        tg.run(keep, [rows(10)])
        keep.store.query().export(tmp_path / "moved")
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_a_folder_that_vanishes_under_a_writer(store):
    keep = tg.StoreActivations(store, ["x"], shard_bytes=2000)
    keep.update(rows(10))
    moved = store.path.rename(store.path.with_name("elsewhere"))
    with pytest.raises(StoreError, match=r"writing .*the folder is gone .*Bring it back, then resume"):
        keep.update(rows(10, 10))
    with pytest.raises(StoreError, match="is gone: the store's folder was removed, moved or unmounted"):
        store.catalogue.records()
    back = ActivationStore(moved)
    assert [record.state for record in back.catalogue.records()] == ["failed"] and back.verify() == []


def test_a_store_is_made_nowhere_but_in_a_folder(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match="making the store"):
        ActivationStore(tmp_path / "file" / "store")


@pytest.fixture
def kept(store):
    keep = tg.StoreActivations(store, ["x"], shard_bytes=264 * 40)
    tg.run(keep, [rows(100)])
    return (
        store,
        keep.run_id,
        [store.path / keep.run_id / one.name for one in store.catalogue.shards(keep.run_id)],
    )


@pytest.mark.parametrize("byte", [0, 9, 60, 300, -1])
def test_verify_finds_a_flipped_bit_and_names_the_shard(kept, byte):
    store, run, shards = kept
    data = bytearray(shards[1].read_bytes())
    data[byte] ^= 4
    shards[1].write_bytes(data)
    [damage] = store.verify()
    assert damage.run == run and damage.shard == "rank-00000-00000001.safetensors"
    assert str(damage).startswith(f"{run}/{damage.shard}: ")
    assert store.verify(run) == [damage]
    with pytest.raises(StoreError, match=damage.shard):
        store.load(run)


def test_a_flipped_bit_in_every_part_of_a_shard_is_found(kept):
    store, run, shards = kept
    whole = shards[0].read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for byte in [*range(0, header, 7), header - 1, *range(header, len(whole), 997), len(whole) - 1]:
        data = bytearray(whole)
        data[byte] ^= 1 << byte % 8
        shards[0].write_bytes(data)
        assert [damage.shard for damage in store.verify(run)] == [shards[0].name], byte
    shards[0].write_bytes(whole)
    assert store.verify() == []


def test_verify_finds_a_catalogue_that_does_not_fit_its_shards(kept):
    store, run, _ = kept
    with store.catalogue.writing() as connection:
        connection.execute("UPDATE shards SET rows = 41 WHERE number = 0")
    field, damage = store.verify()
    assert field.run == damage.run == run and "entry of its shard 0/0 is not what was written" in str(field)
    assert "the catalogue says torch.float32 of shape (41, 64)" in str(damage)
    with store.catalogue.writing() as connection:
        connection.execute("DELETE FROM shards WHERE number = 1")
    whole = store.save(torch.ones(1))
    assert {damage.run for damage in store.verify()} == {run} and store.verify(whole) == []
    assert "entry of its shard 0/1 is gone" in str(store.verify(run))


def test_a_shard_that_is_cut_while_it_is_mapped_is_refused(kept):
    store, run, shards = kept
    source = store.rows(run)
    assert source[[0, 99]]["row_id"].tolist() == [0, 99]
    os.truncate(shards[0], 5)
    with pytest.raises(StoreError, match=r"changed its size: shards never change"):
        source[[1]]
    os.truncate(shards[0], 0)
    with pytest.raises(StoreError, match="changed its size|has 0 bytes"):
        store.rows(run)[[1]]


def test_a_link_in_place_of_a_run_is_refused_and_never_followed(kept, tmp_path):
    store, run, _ = kept
    (store.path / run).rename(tmp_path / "outside")
    (store.path / run).symlink_to(tmp_path / "outside")
    files = sorted((tmp_path / "outside").iterdir())
    for use in (
        store.load,
        store.rows,
        store.remove,
        lambda run: store.query().paths(),
        lambda run: store.query().delete(),
    ):
        with pytest.raises(StoreError, match="is a symbolic link, which a store never holds"):
            use(run)
    [damage] = store.verify()
    assert damage.run == run and "symbolic link" in str(damage)
    assert (
        sorted((tmp_path / "outside").iterdir()) == files and store.catalogue.record(run).state == "complete"
    )


def test_removed_while_it_is_read(kept):
    store, run, _ = kept
    source = store.rows(run, batch_rows=10)
    batches = iter(source)
    next(batches)
    ActivationStore(store.path).remove(run)
    with pytest.raises(StoreError, match="opening .*the folder is gone"):
        list(batches)
    with pytest.raises(StoreError, match="there is no run"):
        store.rows(run)


@pytest.mark.parametrize("statement", [None, "PRAGMA journal_mode=WAL", "PRAGMA user_version=0"])
def test_a_store_whose_maker_was_killed_is_made_whole(tmp_path, statement):
    (tmp_path / "catalogue.sqlite").touch()
    if statement is not None:
        with closing(sqlite3.connect(tmp_path / "catalogue.sqlite")) as connection:
            connection.execute(statement)
    store = ActivationStore(tmp_path)
    run = store.save(torch.ones(2))
    assert [record.id for record in ActivationStore(tmp_path).catalogue.records()] == [run]


def test_a_foreign_database_is_refused_when_the_store_is_opened_and_left_as_it_is(tmp_path):
    with closing(sqlite3.connect(tmp_path / "catalogue.sqlite")) as connection:
        connection.execute("CREATE TABLE mine (x)")
    before = (tmp_path / "catalogue.sqlite").read_bytes()
    with pytest.raises(StoreError, match="no catalogue of tdgeom"):
        ActivationStore(tmp_path).query()
    assert (tmp_path / "catalogue.sqlite").read_bytes() == before


def test_a_reader_that_may_not_write_never_takes_a_torn_answer(open_folder, monkeypatch):
    store = ActivationStore(open_folder / "store")
    run = store.save(torch.ones(1))
    checked = store.catalogue._check

    def changed_meanwhile(connection):
        checked(connection)
        reader = os.geteuid()
        os.seteuid(os.getuid())  # as the writer
        os.utime(store.catalogue.path, ns=(1, 1))
        os.seteuid(reader)

    with read_only(open_folder):
        assert [record.id for record in store.catalogue.records()] == [run]
        monkeypatch.setattr(store.catalogue, "_check", changed_meanwhile)
        with pytest.raises(StoreError, match="was written while it was read.*read again"):
            store.catalogue.records()


def test_a_run_that_ends_is_never_seen_as_failed(store):
    seen, done = set(), threading.Event()

    def look():
        while not done.is_set():
            seen.update((record.id, record.state) for record in store.catalogue.records())

    watcher = threading.Thread(target=look)
    watcher.start()
    for _ in range(25):
        keep = tg.StoreActivations(store, ["x"])
        tg.run(keep, [rows(3)])
    done.set()
    watcher.join()
    assert {state for _, state in seen} <= {"writing", "complete"} and len(
        store.query(state="complete")
    ) == 25


def test_a_forked_copy_of_a_writer_writes_nothing(store):
    keep = tg.StoreActivations(store, ["x"])
    keep.update(rows(3))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            keep.settle()
            os.write(writer, b"written")
        except StoreError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert b"is written by the process that this one was forked from" in os.read(reader, 1000)
    keep.sync_()
    assert store.rows(keep.run_id)[:]["row_id"].tolist() == [0, 1, 2] and store.verify() == []


def test_verify_finds_what_is_cut_short_or_gone(kept):
    store, run, shards = kept
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    shards[2].unlink()
    short, gone = store.verify()
    assert short.shard == shards[0].name and "it was cut short or changed" in str(short)
    assert gone.shard == shards[2].name and "No such file" in str(gone)
    with pytest.raises(StoreError, match="it was cut short or changed"):
        store.load(run)
    shutil.rmtree(store.path / run)
    assert len(store.verify()) == 3


def test_verify_finds_shards_that_no_run_has(kept):
    store, run, _ = kept
    store.catalogue.drop_run(run)
    assert [str(damage) for damage in store.verify()] == [
        f"{run}: shards of a run that the catalogue does not have: import it again, or delete the folder"
    ]


@pytest.mark.parametrize("lost", ["number = 1", "number = 0", "1"])
def test_a_catalogue_that_lost_shards_is_not_taken_for_a_shorter_run(kept, lost):
    store, run, _ = kept
    with store.catalogue.writing() as connection:
        connection.execute(f"DELETE FROM shards WHERE {lost}")
    with pytest.raises(StoreError, match="is not what was written"):
        store.load(run)
    with pytest.raises(StoreError, match="is not what was written"):
        store.rows(run)


def test_readers_beside_a_writer_see_whole_shards_only(store):
    runs, problems = [], []
    done = threading.Event()

    def read():
        reader = ActivationStore(store.path)
        seen = 0
        while not done.is_set() or not seen:
            try:
                for record in reader.catalogue.records():
                    source = reader.rows(record.id, partial=True)
                    found = source[:]
                    assert source.rows >= record.rows and source.rows % 50 == 0
                    assert torch.equal(found["row_id"], torch.arange(source.rows))
                    assert torch.equal(found["tokens", "x"][:, 5], torch.arange(source.rows).float())
                    seen += 1
            except BaseException as problem:
                problems.append(problem)
                return

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for _ in range(4):
        keep = tg.StoreActivations(store, ["x"], shard_bytes=264 * 50)
        tg.run(keep, [rows(10, first) for first in range(0, 500, 10)], block_rows=10)
        runs.append(keep.run_id)
    done.set()
    for reader in readers:
        reader.join()
    assert problems == [] and [record.id for record in store.catalogue.records()] == runs


def test_many_writers_of_runs_of_their_own(store):
    problems = []

    def write(number):
        try:
            for _ in range(5):
                store.save(torch.full((3,), number), tag=str(number))
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == [] and len(store.catalogue.records()) == 20
    for record in store.catalogue.records():
        assert store.load(record.id)[0]["tensor"].tolist() == [int(record.about.tags[0])] * 3
