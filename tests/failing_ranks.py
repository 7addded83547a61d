"""What each process does in core/test_rank_failures.py: works that fail on one rank, whose process lives on."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from tensordict.nn import TensorDictSequential
from torch import nn

import tdgeom as tg
from tdgeom.core import rank_failures

LAST = 1  # the rank that fails


def rows(number):
    return torch.randn(10, 6, generator=torch.Generator().manual_seed(number))


def batches(fails=None, how=None, count=8):
    """Batches, of which one is not to be had on the rank that fails."""
    for number in range(count):
        if number == 3 and fails == dist.get_rank():
            how()
        yield {"tokens": rows(number)}


def broken():
    raise OSError("broken file part-3.jsonl")


def interrupted():
    raise KeyboardInterrupt


class Brittle(tg.StreamingCovariance):
    """Fails while the state of another rank is added."""

    def combine(self, other):
        raise ArithmeticError("states do not fit")


class LastStage(tg.Stage):
    """Fails at the end, on rank 0 where end stages run."""

    reads = {"covariance": "D D"}
    writes = ["number"]

    def __init__(self):
        super().__init__(in_keys=[("moments", "covariance")], out_keys=["number"])

    def compute(self, covariance):
        raise ArithmeticError("no number")


class FullDisk(tg.StoreActivations):
    """Fails on the last rank, as a store whose disk is full."""

    def accumulate(self, *inputs):
        if dist.get_rank() == LAST:
            raise OSError("no space left")
        super().accumulate(*inputs)


class Failing(nn.Module):
    """A model that fails on the last rank."""

    def forward(self, x):
        if dist.get_rank() == LAST:
            raise ArithmeticError("out of range")
        return x


def of_model():
    capture = tg.Capture(nn.Sequential(Failing()), "module_output:0", in_keys=["x"])
    return TensorDictSequential(
        capture, tg.SelectTokens(capture.sites), tg.ForEach(tg.StreamingMean(), capture.sites)
    )


def own_steps():
    with rank_failures.watched("own work"), rank_failures.together("one" if dist.get_rank() else "another"):
        pass


def identity():
    model = nn.Sequential(nn.Linear(6, 6))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(6)), model[0].bias.zero_()
    return model


def unsavable(folder):
    """An analysis that cannot be saved: rank 0 finds that out when the others have long done their part."""
    model, target = identity(), Path(folder).parent / "results"

    def loader():
        yield from ({"input": rows(number)} for number in range(4))
        dist.barrier()  # all have begun, with a folder that was to be had
        target.write_text("a file where the folder should be")

    return tg.analyze_model(model, loader(), sites="module_output:0", save_dir=target, progress=False)


def works(folder):
    """Name -> (what fails, on which rank, with what)."""
    with_end = TensorDictSequential(tg.StreamingCovariance(), LastStage())
    sites = [{"tokens": {"x": rows(number)}} for number in range(4)]
    x = [{"x": rows(number)[:, None]} for number in range(4)]
    split = [{**batch, "sequence_id": torch.arange(10) + 10 * (n * (LAST + 1) + dist.get_rank())}
             for n, batch in enumerate(batches())]  # fmt: skip
    nan = [{"tokens": rows(n) / 0 * 0 if n % (LAST + 1) == LAST else rows(n)} for n in range(4)]

    def halting():
        yield from split[:3]
        if dist.get_rank() == LAST:
            broken()
        yield from split[3:]

    run = lambda *args, **options: tg.run(*args, progress=False, **options)
    return {
        "loader": (lambda: run(tg.StreamingCovariance(), batches(LAST, broken)), LAST, "OSError: broken file part-3.jsonl"),
        "split loader": (lambda: run(tg.StreamingCovariance(), halting(), sharded=True), LAST, "broken file part-3"),
        "interrupt": (lambda: run(tg.StreamingCovariance(), batches(LAST, interrupted)), LAST, "KeyboardInterrupt"),
        "model": (lambda: run(of_model(), x), LAST, "ArithmeticError: out of range"),
        "rows": (lambda: run(tg.StreamingCovariance(), nan), LAST, "holds NaN or Inf"),
        "merging": (lambda: run(Brittle(), batches()), 0, "ArithmeticError: states do not fit"),
        "end stage": (lambda: run(with_end, batches()), 0, "ArithmeticError: no number"),
        "store": (lambda: run(FullDisk(folder, ["x"]), sites), LAST, "no space left"),
        "saving": (lambda: unsavable(folder), 0, "results"),
        "steps": (own_steps, None, "'one'"),
    }  # fmt: skip


def described(work):
    begin = time.monotonic()
    try:
        work()
    except (Exception, KeyboardInterrupt) as error:
        kind, said, rank = type(error).__name__, str(error), getattr(error, "rank", None)
        return {"seconds": time.monotonic() - begin, "kind": kind, "said": said, "rank": rank}
    return {"seconds": time.monotonic() - begin, "kind": None}


def killed():
    def end():
        if dist.get_rank() == LAST:
            os.kill(os.getpid(), signal.SIGKILL)
        yield {"tokens": rows(0)}

    tg.run(tg.StreamingCovariance(), end(), progress=False)


def main():
    """A worker: rank and world from the environment; where it leaves what it saw, and whether processes can be seen."""
    global LAST
    out, unseen = Path(sys.argv[1]), len(sys.argv) > 2
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module="torch")
    for category in (tg.UndefinedMeasureWarning, tg.FewRowsWarning):
        warnings.filterwarnings("ignore", category=category)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, LAST = dist.get_rank(), dist.get_world_size() - 1
    folder = str(out / "store")
    if rank == 0:
        tg.ActivationStore(folder)
    # what the works import and find out once is no part of how soon they end
    given = [{"input": rows(number)} for number in range(4)]
    tg.analyze_model(identity(), given, sites="module_output:0", progress=False)
    dist.barrier()
    found = {name: described(work) for name, (work, _, _) in works(folder).items()}
    result = tg.run(tg.StreamingCovariance(), batches(), progress=False)
    found["afterwards"] = None if result is None else int(result["run", "rows"])
    found["threads"] = sum("tdgeom" in thread.name for thread in threading.enumerate())
    found["expected"] = {name: (fails, said) for name, (_, fails, said) in works(folder).items()}
    (out / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.barrier()  # what comes now ends the last rank
    if unseen:  # processes on other machines
        rank_failures._lives = lambda process: None
        rank_failures._PERIOD = 0.05
    found["killed"] = described(killed)
    (out / f"rank-{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # the group waits for the rank that is gone


if __name__ == "__main__":
    main()
