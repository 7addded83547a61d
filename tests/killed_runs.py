"""Runs that store rows under a checkpoint, killed before one operation of the disk after the other, then started again.

``python killed_runs.py STEP`` kills before every STEP-th operation and prints, for each, what is not as it should be.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from tensordict.nn import TensorDictSequential

import tdgeom as tg
from tdgeom.store.sqlite_file import SqliteFile

BLOCKS = {"small blocks": 64, "one block": 2048}


class Total(tg.Stage):
    """Sum of a sample: an end stage."""

    reads = {"sample": "N D"}
    writes = [("summary", "total")]

    pause = 0.0

    def compute(self, sample):
        os.fsync(TRACE)  # an operation that can be the last one, in an end stage
        time.sleep(self.pause)
        return sample.double().sum()


TRACE = os.open(tempfile.mkstemp()[1], os.O_RDWR)


def batches(pause: float, begun: Path | None) -> Iterator[dict[str, object]]:
    """The data, a batch every so many seconds; a file that says that somebody reads them."""
    if begun is not None:
        begun.touch()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        time.sleep(pause)
        yield {"tokens": {"x": torch.randn(40, 8, generator=generator)}}


def measure(
    folder: Path, block_rows: int, pause: float = 0.0, begun: Path | None = None
) -> dict[str, object] | None:
    """The run, and what it left behind; None on ranks that have no results."""
    loader, Total.pause = batches(pause, begun), 20 * pause
    keep = tg.StoreActivations(folder / "store", ["x"], model="m", shard_bytes=10_000)
    mean = tg.StreamingMean(in_keys=[("tokens", "x")])
    pipeline = TensorDictSequential(tg.RowSample(["x"], size=30), keep, mean, tg.ForEach(Total(), ["x"]))
    result = tg.run(
        pipeline, loader, checkpoint=folder / "state", every=6, block_rows=block_rows, progress=False
    )
    if result is None:
        return None
    store = tg.ActivationStore(folder / "store")
    runs = store.query()
    rows = store.rows(runs.ids[0])[:]
    return {
        "rows": int(result["run", "rows"]),
        "total": float(result["summary", "x", "total"]),
        "mean": result["mean", "mean"].tolist(),
        "sample": result["sample_row_id"].tolist(),
        "runs": [(run["state"], run["rows"]) for run in runs],
        "stored": (sorted(rows["row_id"].tolist()), float(rows["tokens", "x"].double().sum())),
        "damage": len(store.verify()),
        "left": sorted(path.name for path in folder.iterdir()),
    }


def killed_before(operation: int, call: Callable[[], object]) -> None:
    """Call, and end the process at once before the disk's operation of that number."""
    count = itertools.count()

    def counted(function):
        def last_or_not(*args, **named):
            if next(count) == operation:
                os._exit(9)
            return function(*args, **named)

        return last_or_not

    for name in ("fsync", "replace", "rename", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    SqliteFile.writing = counted(SqliteFile.writing)
    call()


def in_child(call: Callable[[], object]) -> tuple[int, object]:
    """(exit code, what the call gave) of a process of its own."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        try:
            said, code = call(), 0
        except BaseException as error:
            said, code = f"{type(error).__name__}: {error}", 1
        with os.fdopen(into, "w") as handle:
            json.dump(said, handle)
        os._exit(code)
    os.close(into)
    with os.fdopen(out) as handle:
        text = handle.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), json.loads(text) if text else None


def main(step: int) -> None:
    """Kill, start again, compare."""
    for name, block_rows in BLOCKS.items():
        folder = Path(tempfile.mkdtemp())
        code, expected = in_child(partial(measure, folder, block_rows))
        assert code == 0, expected
        kills = 0
        for operation in itertools.count(0, step):
            folder = Path(tempfile.mkdtemp())
            code, said = in_child(partial(killed_before, operation, partial(measure, folder, block_rows)))
            if code == 0:
                break
            kills += 1
            assert code == 9, said
            _, found = in_child(partial(measure, folder, block_rows))
            if found != expected:
                apart = (
                    found
                    if isinstance(found, str)
                    else {key: found[key] for key in expected if found[key] != expected[key]}
                )
                print(json.dumps({"blocks": name, "before operation": operation, "wrong": str(apart)[:300]}))
            shutil.rmtree(folder)
        print(json.dumps({"blocks": name, "kills": kills}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
