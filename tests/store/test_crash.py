"""kill -9 at any moment: nothing that was finished is lost, nothing unfinished is passed off as finished."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

import crash_writer
import tdgeom as tg
from tdgeom.files.errors import StoreError
from tdgeom.store.activation_store import ActivationStore

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def writers():
    paths = [str(TESTS), str(TESTS.parent / "src")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(TESTS / "crash_writer.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    ) as process:  # fmt: skip
        yield process
        process.stdin.close()


def kill_a_writer(writers, path, delay, begun=False):
    """Start a writer, kill it ``delay`` seconds later; what it had said: run -> (rows finished, whether complete).

    ``begun``: the seconds count from its first rows on, however long a busy machine takes to get there.
    """
    print(path, file=writers.stdin, flush=True)
    said = {}
    pid = None
    while pid is None:
        pid = note(writers.stdout.readline(), said)
    if begun:
        note(writers.stdout.readline(), said)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    while (line := writers.stdout.readline()) != "gone\n":
        note(line, said)
    return said


def note(line, said):
    word, *rest = line.split()
    if word == "pid":
        return int(rest[0])
    run, count = rest
    said[run] = (int(count), word == "complete")
    return None


def check_promises(store, said):
    assert store.verify() == []
    records = {record.id: record for record in store.catalogue.records()}
    assert set(said) <= set(records)
    for run, record in records.items():
        finished, complete = said.get(run, (0, False))
        assert record.state in (["complete"] if complete else ["complete", "failed"])
        assert record.rows >= finished
        assert record.rows == crash_writer.TOTAL or record.state == "failed"
        if record.rows:
            check_rows(store.rows(run, partial=True), record.rows)
        if record.state == "failed":
            with pytest.raises(StoreError, match="is not complete"):
                store.load(run)


def check_rows(source, count):
    found, expected = source[:], crash_writer.rows(0, count)
    assert torch.equal(found["row_id"], expected["row_id"])
    assert torch.equal(found["tokens", "x"], expected["tokens"]["x"])


def finish(store, run):
    """Go on with an unfinished run from the start of its data."""
    keep = tg.StoreActivations(store, ["x"], shard_bytes=crash_writer.SHARD_BYTES, resume=run)
    data = [crash_writer.rows(first) for first in range(0, crash_writer.TOTAL, crash_writer.BLOCK)]
    tg.run(keep, data, block_rows=crash_writer.BLOCK)
    check_rows(store.rows(run), crash_writer.TOTAL)


@pytest.mark.parametrize(
    ("kills", "seed"), [(6, 0), pytest.param(50, 1, marks=pytest.mark.slow)], ids=["a few", "fifty"]
)
def test_a_writer_killed_at_random_moments(writers, tmp_path, kills, seed):
    chance = random.Random(seed)
    store = ActivationStore(tmp_path)
    unfinished = 0
    for number in range(kills):
        begun = number % 4 > 0  # one in four may be killed before it has written anything
        check_promises(store, kill_a_writer(writers, tmp_path, chance.uniform(0.0, 0.2), begun))
        for record in store.catalogue.records():
            if record.state == "failed":
                unfinished += 1
                if chance.random() < 0.5:
                    finish(store, record.id)
            store.remove(record.id)
            assert not (tmp_path / record.id).exists()
        assert store.catalogue.records() == store.verify() == []
    assert unfinished > kills // 3  # how many are hit while they write hangs on how busy the machine is


def test_what_a_killed_writer_left_behind_is_cleared_away(tmp_path):
    store = ActivationStore(tmp_path)
    keep = tg.StoreActivations(store, ["x"], shard_bytes=crash_writer.SHARD_BYTES)
    keep.update(TensorDict(crash_writer.rows(0, 60), batch_size=[]))
    run = keep.run_id
    del keep
    # killed after the file got its name and before the catalogue had it, and once more in the middle of writing
    shard = tmp_path / run / "rank-00000-00000001.safetensors"
    orphan = shard.with_name("rank-00000-00000002.safetensors")
    orphan.write_bytes(shard.read_bytes())
    (tmp_path / run / ".rank-00000-00000002.safetensors.77.draft").write_bytes(b"half")
    assert store.catalogue.record(run).rows == 50
    finish(store, run)
    names = {path.name for path in (tmp_path / run).iterdir()}
    assert names == {"rank-00000.lock", *(one.name for one in store.catalogue.shards(run))}
