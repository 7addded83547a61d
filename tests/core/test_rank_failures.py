"""A rank that fails, or is gone, ends the work on all ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tdgeom.core import rank_failures

TESTS = Path(__file__).parent.parent
LIMIT = 10.0  # seconds in which all ranks must have ended


def _start(folder, world, *more):
    """Processes that nobody supervises: the ones that fail live on, and a killed one is a zombie until asked for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    paths = [str(TESTS), str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    program = [sys.executable, str(TESTS / "failing_ranks.py"), str(folder), *more]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    workers = [
        subprocess.Popen(program, env={**environment, "RANK": str(rank)}, **how) for rank in range(world)
    ]
    try:
        said = [worker.communicate(timeout=150)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * (world - 1) + [-9], "\n".join(said)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world)]


def _check(found):
    """Every rank ended every work in time, with the number and the words of the rank that failed."""
    for name, (fails, said) in found[0]["expected"].items():
        for rank, ended in enumerate(found):
            one = ended[name]
            assert one["seconds"] < LIMIT and one["kind"] is not None, (name, rank, one)
            failed = rank == fails if fails is not None else one["kind"] != "RankFailed"
            if failed:
                assert one["kind"] != "RankFailed", (name, rank, one)
            else:
                assert one["kind"] == "RankFailed" and said in one["said"], (name, rank, one)
                assert f"rank {one['rank']} failed" in one["said"] and fails in (one["rank"], None), (
                    name,
                    one,
                )
    assert [ended["afterwards"] for ended in found] == [80] + [None] * (len(found) - 1)
    assert [ended["threads"] for ended in found] == [0] * len(found)
    for ended in found[:-1]:
        one = ended["killed"]
        assert one["kind"] == "RankFailed" and one["seconds"] < LIMIT, one
        assert f"rank {len(found) - 1} is gone" in one["said"], one


def test_a_rank_that_fails_ends_the_others(tmp_path):
    _check(_start(tmp_path, 2))


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("unseen",)], ids=["one machine", "several machines"])
def test_a_rank_of_three_that_fails_ends_the_others(tmp_path, more):
    _check(_start(tmp_path, 3, *more))


def test_one_process_has_no_heartbeat():
    before = threading.active_count()
    with rank_failures.watched("work"), rank_failures.together("place"):
        assert threading.active_count() == before
        rank_failures.check_ranks()


def test_a_process_that_has_ended_is_seen():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    who = {**rank_failures._this_process(), "pid": child.pid, "began": rank_failures._began(child.pid)}
    if who["began"] is None:  # no /proc here
        assert rank_failures._lives(who) is None
    else:
        assert rank_failures._lives(who) is True
        assert rank_failures._lives({**who, "began": "0"}) is False  # another process has its number
    child.communicate()
    if who["began"] is not None:
        assert rank_failures._lives(who) is False
    assert rank_failures._lives({**who, "machine": "another"}) is None
