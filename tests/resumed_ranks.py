"""What each of three processes does in run/test_resumed_ranks.py: runs of some ranks that break off and go on with others."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist
from tensordict.nn import TensorDictSequential
from torch.utils.data import DataLoader

import tdgeom as tg
from split_programs import batches, data, model, pipeline, said, sampler_loader

ANY = [(2, 3), (3, 2), (2, 1), (1, 2)]
SAME = [(2, 2), (3, 3)]
FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()


class Interrupted(Exception):
    pass


class Until:
    """A loader that breaks off before a batch, on the last rank; what it says of itself is what the loader says."""

    def __init__(self, loader, batch, rank, world):
        self.loader, self.batch = loader, batch if rank == world - 1 else None

    def __getattr__(self, name):
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self):
        for number, one in enumerate(self.loader):
            if number == self.batch:
                raise Interrupted
            yield one


def measured(loader, folder, net=None, **options):
    found = tg.run(
        pipeline(net), loader, progress=False, checkpoint=folder / "state", every=2, block_rows=7, **options
    )
    return said(found)


def broken_off(make, at=6, **options):
    """A check: a run whose loader breaks off, then the same with a whole one."""

    def check(folder, rank, world, again):
        loader = make(rank, world)
        return measured(loader if again else Until(loader, at, rank, world), folder, **options)

    return check


def in_the_end(folder, rank, world, again):
    """The end stages break off, behind rows that are stored."""
    capture = tg.Capture(model(), "module_output:2")
    sites = capture.sites
    keep = tg.StoreActivations(folder / "store", sites, also=["label"], shard_bytes=400)
    steps = [
        capture,
        tg.SelectTokens(sites, also=["label"]),
        keep,
        tg.ForEach(tg.StreamingCovariance(), sites),
        tg.RowSample(sites, size=20, also=["label"]),
        tg.ForEach(Last(fails=not again), sites),
    ]
    found = said(
        tg.run(TensorDictSequential(*steps), batches(), progress=False, checkpoint=folder / "state", every=3)
    )
    return stored(folder, found)


class Last(tg.Stage):
    reads = {"sample": "N D"}
    writes = [("summary", "total")]

    def __init__(self, fails=False, **keys):
        super().__init__(**keys)
        self.fails = fails

    def compute(self, sample):
        if self.fails:
            raise Interrupted
        return sample.double().sum()


def storing(folder, rank, world, again):
    """The loader breaks off, between rows that are stored."""
    capture = tg.Capture(model(), "module_output:2")
    keep = tg.StoreActivations(folder / "store", capture.sites, also=["label"], shard_bytes=400)
    sample = tg.RowSample(capture.sites, size=20, also=["label"])
    moments = tg.ForEach(tg.StreamingCovariance(), capture.sites)
    steps = TensorDictSequential(
        capture, tg.SelectTokens(capture.sites, also=["label"]), keep, moments, sample
    )
    loader = batches() if again else Until(batches(), 7, rank, world)
    found = said(tg.run(steps, loader, progress=False, checkpoint=folder / "state", every=3, block_rows=4))
    return stored(folder, found)


def stored(folder, found):
    """A run's numbers and what the store has of it."""
    if found is None:
        return None
    store = tg.ActivationStore(folder / "store")
    [run] = list(store.query())
    rows = store.rows(run["id"])[:]
    order = rows["row_id"].argsort()
    [site] = rows["tokens"].keys()
    return {
        **found,
        "state": [run["state"], run["rows"], len(store.verify())],
        "stored": rows["row_id"][order].tolist(),
        "values": rows["tokens", site][order].double().flatten().tolist(),
        "files": len(list((folder / "store" / run["id"]).glob("*.safetensors"))) == run["shards"],
    }


def analysis(folder, rank, world, again):
    """The tables cannot be saved at first."""
    target = folder / "results"
    if not again:
        tg.AnalysisResults.save = full_disk
    try:
        found = tg.analyze_model(
            model(), batches(), sites="module_output:2", progress=False, save_dir=target,
            checkpoint=folder / "state", every=3,
        )  # fmt: skip
    finally:
        tg.AnalysisResults.save = SAVE
    if found is None:
        return None
    read = pd.read_csv(target / "metrics.csv").select_dtypes("number").iloc[0]
    return {name: float(value) for name, value in read.items()}


SAVE = tg.AnalysisResults.save


def full_disk(self, folder, *args, **named):
    raise OSError(28, "No space left on device", str(folder))


def comparison(folder, rank, world, again):
    """Two models; the loader breaks off."""
    loader = batches(size=4)
    found = tg.compare(
        model(), model(seed=8), loader if again else Until(loader, 7, rank, world),
        ["linear_cka", "neighborhood_overlap"], sites="module_output:2", progress=False,
        checkpoint=folder / "state", every=2,
    )  # fmt: skip
    return None if found is None else numbers_of(found)


def numbers_of(compared):
    return {k: float(v) for k, v in compared.novelty.select_dtypes("number").iloc[0].items()}


def own_parts(rank, world):
    return batches()[rank::world]


def with_ids(rank, world):
    return batches(size=3, ids=True)[rank::world]


def uneven(rank, world):
    """The last rank has most of the data."""
    every = batches(size=3, ids=True)
    return every[2 * (world - 1) :] if rank == world - 1 else every[2 * rank : 2 * rank + 2]


def accelerated(rank, world):
    from accelerate.data_loader import prepare_data_loader

    return prepare_data_loader(
        DataLoader(data(), batch_size=3), num_processes=world, process_index=rank, put_on_device=False
    )


def part_of_one(folder, rank, world, again):
    if again:
        return measured(batches(ids=True)[rank::world], folder, sharded=True)
    return measured(Until(batches(ids=True), 6, rank, world), folder)


def another_order(folder, rank, world, again):
    first, *others = batches(size=4)
    return measured([first, *others[::-1]] if again else Until([first, *others], 8, rank, world), folder)


def another_model(folder, rank, world, again):
    loader = batches(size=4)
    return measured(loader if again else Until(loader, 8, rank, world), folder, net=model(seed=7 + again))


CHECKS = {
    "one loader": (broken_off(lambda r, w: batches(size=4)), ANY),
    "cut": (broken_off(lambda r, w: batches(size=4), max_rows=37), ANY),
    "stored": (storing, ANY),
    "in the end": (in_the_end, ANY),
    "analysis": (analysis, [(2, 3), (3, 2)]),
    "comparison": (comparison, [(2, 3)]),
    "sampler": (broken_off(sampler_loader, at=4), SAME),
    "sampler, cut": (broken_off(sampler_loader, at=4, max_rows=44), SAME),
    "accelerate": (broken_off(accelerated, at=4), SAME),
    "ids": (broken_off(with_ids, at=4, sharded=True), SAME),
    "uneven": (broken_off(uneven, at=5, sharded=True), SAME),
    "told": (broken_off(own_parts, at=2, sharded=True), SAME),
    "told, in one go": (lambda folder, r, w, again: measured(own_parts(r, w), folder, sharded=True), SAME),
}  # fmt: skip
REFUSED = {
    "told": (broken_off(own_parts, at=2, sharded=True), (2, 3)),
    "part of one loader": (part_of_one, (2, 2)),
    "another order": (another_order, (2, 3)),
    "another model": (another_model, (2, 3)),
}  # fmt: skip


def in_a_group(name, rank, world, call):
    """What the call gives or the error that it raises, among the first ``world`` processes; waits until all have done it."""
    told = {}
    if rank < world:
        if world > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{FOLDER / name}.group", rank=rank, world_size=world
            )
        try:
            told = {"result": call()}
        except Exception as error:
            told = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        if world > 1:
            dist.destroy_process_group()
        Path(FOLDER, f"{name}.{rank}.done").touch()
    while len(list(FOLDER.glob(f"{name}.*.done"))) < world:
        time.sleep(0.01)
    return told


def main():
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # batches of other sizes then give the same numbers
    rank = int(os.environ.pop("RANK"))
    os.environ.pop("WORLD_SIZE")
    found = {}
    every = [(name, check, way) for name, (check, ways) in CHECKS.items() for way in ways]
    every += [(f"refused: {name}", check, way) for name, (check, way) in REFUSED.items()]
    for number, (name, check, (before, after)) in enumerate(every):
        folder = FOLDER / f"check-{number}"
        folder.mkdir(exist_ok=True)
        first = in_a_group(f"{number}a", rank, before, partial(check, folder, rank, before, False))
        left = sorted(path.name for path in folder.iterdir())
        second = in_a_group(f"{number}b", rank, after, partial(check, folder, rank, after, True))
        found[f"{name} {before}->{after}"] = {
            "first": first, "left": left, "second": second, "after": sorted(path.name for path in folder.iterdir()),
        }  # fmt: skip
    Path(FOLDER, f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
