"""Runs that store rows under a checkpoint, killed by kill -9 at random moments, alone or as ranks, then started again.

``python killed_at_random.py KILLS [SEED]`` prints for each kill how many processes began and went on, which were killed and when,
and what is then not as it should be; the last line counts the kills.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from killed_runs import in_child, measure
from tdgeom.files.atomic import write_whole
from tdgeom.run.checkpoint import checkpoints_kept

WAYS = [(1, 1), (1, 1), (2, 2), (2, 1), (1, 2), (3, 2)]  # processes before and after the kill
LIMIT = 20.0  # seconds for the ranks beside one that was killed to end by themselves
PAUSE = 0.015  # seconds a batch takes to come, and a twentieth of the end


def as_rank(folder: Path, group: Path, rank: int, world: int) -> object:
    """What one process does, among so many."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{group}", rank=rank, world_size=world)
    saved = folder / "found.json"
    try:
        with checkpoints_kept():  # until the results are safe
            found = None if saved.exists() else measure(folder, 64, PAUSE, Path(f"{group}.{rank}"))
            if found is not None:
                write_whole(saved, [json.dumps(found).encode()])
        return json.loads(saved.read_text()) if rank == 0 else None
    finally:
        if world > 1:
            dist.destroy_process_group()


def started(folder: Path, world: int) -> list[int]:
    """The numbers of processes that run side by side, once all have begun to read; each ends with 0 or 1."""
    group = Path(tempfile.mktemp())
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            code = 1
            try:
                as_rank(folder, group, rank, world)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    while not all(Path(f"{group}.{rank}").exists() for rank in range(world)):
        time.sleep(0.002)
    return children


def exit_code(child: int, until: float) -> int | str:
    """How a process has ended; one that has not until then is ended."""
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "did not end"


def ended(folder: Path, world: int) -> object:
    """What rank 0 of so many processes gives, or its error; the others wait for it."""
    group = Path(tempfile.mktemp())
    others = []
    for rank in range(1, world):
        child = os.fork()
        if child == 0:
            try:
                as_rank(folder, group, rank, world)
            finally:
                os._exit(0)
        others.append(child)
    _, found = in_child(partial(as_rank, folder, group, 0, world))
    for child in others:
        os.waitpid(child, 0)
    return found


def apart(found: object, expected: dict[str, object]) -> dict[str, object]:
    """What differs: numbers beyond 1e-10, anything else at all."""
    if not isinstance(found, dict):
        return {"error": found}

    def same(a: object, b: object) -> bool:
        if isinstance(a, float) and isinstance(b, float):
            return abs(a - b) <= 1e-10 * max(1.0, abs(b))
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in b)
        if isinstance(a, list) and isinstance(b, list):
            return len(a) == len(b) and all(map(same, a, b))
        return a == b

    return {key: found[key] for key in expected if key != "left" and not same(found[key], expected[key])}


def main(kills: int, seed: int) -> None:
    """Kill, start again, compare."""
    draw = random.Random(seed)
    lasts: dict[int, float] = {}
    expected: dict[str, object] = {}
    for world in (1, 2, 3):
        folder = Path(tempfile.mkdtemp())
        found = ended(folder, world)
        assert isinstance(found, dict), found
        expected = expected or found
        assert not apart(found, expected), found
        folder = Path(tempfile.mkdtemp())
        children, began = started(folder, world), time.monotonic()
        assert [exit_code(child, began + 60) for child in children] == [0] * world
        lasts[world] = time.monotonic() - began
    begun = wrong = 0
    for number in range(kills):
        before, after = WAYS[number % len(WAYS)]
        folder, moment = Path(tempfile.mkdtemp()), draw.uniform(0.0, 0.95) * lasts[before]
        children = started(folder, before)
        time.sleep(moment)
        killed = draw.choice([[draw.randrange(before)], range(before)])  # one of them, or the whole machine
        for rank in killed:
            os.kill(children[rank], signal.SIGKILL)  # none has been waited for, so none has another's number
        until = time.monotonic() + LIMIT
        codes = [exit_code(child, until) for child in children]
        left = sorted(path.name for path in folder.iterdir())
        begun += any(name.startswith("state") for name in left)
        differs = apart(ended(folder, after), expected)
        if "did not end" in codes:
            differs["codes"] = codes
        if (stays := sorted(path.name for path in folder.iterdir())) != ["found.json", "store"]:
            differs["stays"] = stays
        wrong += bool(differs)
        said = {
            "ways": [before, after],
            "killed": list(killed),
            "after": round(moment, 2),
            "codes": codes,
            "left": left,
        }
        print(json.dumps({**said, "wrong": str(differs)[:300] if differs else None}), flush=True)
        shutil.rmtree(folder)
    print(json.dumps({"kills": kills, "checkpoint left": begun, "wrong": wrong}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
