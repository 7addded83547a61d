"""One writer at a time, until its process ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tdgeom.files.errors import StoreBusyError
from tdgeom.store.write_lock import Lock, is_locked


def test_a_lock_is_held_by_one_and_says_by_whom(tmp_path):
    path = tmp_path / "lock"
    assert not is_locked(path)
    lock = Lock(path, "run r1")
    assert is_locked(path)
    with pytest.raises(
        StoreBusyError, match=f"run r1 is being written by process {os.getpid()} on .* since '20"
    ):
        Lock(path, "run r1")
    lock.release()
    assert not is_locked(path)
    Lock(path, "run r1").release()


def test_a_lock_ends_with_its_process_and_not_with_a_forked_child(tmp_path):
    program = (
        "import os, sys, time; from pathlib import Path; from tdgeom.store.write_lock import Lock\n"
        "lock = Lock(Path(sys.argv[1]), 'a run')\n"
        "if os.fork() == 0: time.sleep(60)\n"  # a data-loading worker that outlives its parent
        "print(os.getpid(), flush=True); os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "lock"
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        holder = int(child.stdout.readline())
        child.wait()
        assert json.loads(path.read_text())["pid"] == holder
        Lock(path, "a run").release()
    finally:
        os.killpg(child.pid, 9)
        child.stdout.close()


def test_a_damaged_note_does_not_hide_that_it_is_locked(tmp_path):
    path = tmp_path / "lock"
    lock = Lock(path, "run r1")
    path.write_text('{"pid": ')
    with pytest.raises(StoreBusyError, match="run r1 is being written by another process"):
        Lock(path, "run r1")
    lock.release()
