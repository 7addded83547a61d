"""Writers to be killed: one process that has imported everything forks a fresh writer each time it is asked.

Reads a store's path a line; answers with the writer's process id, then with what the writer says as it goes:
``rows N`` after the first N rows of its run were flushed, ``complete`` after the run was.
"""

from __future__ import annotations

import os
import sys

import torch
from tensordict import TensorDict

import tdgeom as tg

TOTAL, BLOCK, WIDTH = 200, 10, 6
SHARD_ROWS = 25
SHARD_BYTES = SHARD_ROWS * (4 * WIDTH + 8)


def rows(first, count=BLOCK):
    """Rows that follow from their ids, so that a reader knows what must stand there."""
    row_id = torch.arange(first, first + count)
    return {"tokens": {"x": torch.sin(row_id[:, None] * torch.arange(1.0, WIDTH + 1))}, "row_id": row_id}


def say(line):
    """One line in one piece, so that a kill leaves the whole line or none of it (print writes in several, unbuffered)."""
    os.write(1, f"{line}\n".encode())


def write(path):
    keep = tg.StoreActivations(path, ["x"], shard_bytes=SHARD_BYTES, model="m")
    while True:
        keep.reset()
        for first in range(0, TOTAL, BLOCK):
            keep.update(TensorDict(rows(first), batch_size=[]))
            done = (first + BLOCK) // SHARD_ROWS * SHARD_ROWS  # what a full buffer has put on the disk
            say(f"rows {keep.run_id} {done}")
        keep.sync_()
        say(f"complete {keep.run_id} {TOTAL}")


def main():
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            write(line.strip())
        say(f"pid {child}")
        os.waitpid(child, 0)
        say("gone")


if __name__ == "__main__":
    main()
