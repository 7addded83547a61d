"""What each of two processes does in test_ranks.py; also run in one process for the numbers to compare with."""

from __future__ import annotations

import sys
import warnings

import torch
import torch.distributed as dist
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential

import models
import tdgeom as tg

D = 4


def text(n, seed, length=8):
    """A left-padded batch whose number of rows differs from batch to batch."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, models.VOCAB, (n, length), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(n):
        mask[i, : (i * 3 + seed) % 6] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def acts(n, seed, width=5):
    """Activations in the batch itself, with labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, D, generator=generator, dtype=torch.float64) + 3
    mask = torch.rand(n, width, generator=generator) > 0.3
    return {"acts": {"x": x}, "attention_mask": mask, "label": torch.randint(0, 4, (n,), generator=generator)}


def measures(sites, also=()):
    return TensorDictSequential(
        tg.ForEach(tg.StreamingCovariance(), sites),
        tg.ForEach(tg.StreamingMean(), sites),
        tg.RowSample(sites, size=12, also=list(also)),
        tg.Collect(sites),
        tg.ForEach(tg.RouterLoad(), sites),
        tg.ForEach(tg.EigenSpectrum(k=1), sites),
        tg.ForEach(tg.SpectrumMetrics(), sites),
        tg.ForEach(tg.SampleMetrics(), sites),
    )


def with_model(**select):
    capture = tg.Capture(models.gpt2(), ["residual_input.0", "residual_input.2"])
    return TensorDictSequential(capture, tg.SelectTokens(capture.sites, **select), measures(capture.sites))


def of_acts(**select):
    return TensorDictSequential(
        tg.SelectTokens(["x"], also=["label"], **select), measures(["x"], also=["label"])
    )


def raw(sizes=(7, 3, 9, 5, 1)):
    rows = torch.randn(sum(sizes), D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [{"tokens": {"x": part}} for part in rows.split(list(sizes))]


class Shards:
    """What a DistributedSampler gives each rank: every second document, the first repeated to even out the ranks."""

    def __init__(self, rank, world, documents=7):
        batch = acts(documents, 3)
        order = list(range(documents))
        if world > 1:
            order += order[: -len(order) % world]
            order = order[rank::world]
        self.batches = [
            {**{k: v[[i]] for k, v in batch.items() if k != "acts"}, "acts": {"x": batch["acts"]["x"][[i]]},
             "sequence_id": torch.tensor([100 + i])}
            for i in order
        ]  # fmt: skip


def pooled(batch):
    """A (B, D) site beside a (B, T) mask: the mask does not count its rows."""
    return {**batch, "acts": {"x": batch["acts"]["x"].mean(1)}}


def own_rows():
    flatten = TensorDictModule(lambda x: x.flatten(0, 1), in_keys=["series"], out_keys=[("tokens", "x")])
    return TensorDictSequential(flatten, measures(["x"]))


CASES = {
    "model": lambda r, w: (with_model(), [text(3, s) for s in range(5)], {}),
    "model_max_rows": lambda r, w: (with_model(), [text(3, s) for s in range(6)], {"max_rows": 43, "block_rows": 8}),
    "model_last": lambda r, w: (with_model(positions="last"), [text(3, s) for s in range(5)], {"max_rows": 10}),
    "model_pooled": lambda r, w: (
        with_model(pool="mean", skip_first=2), [text(8, s) for s in range(6)], {"max_rows": 35}
    ),
    "acts_max_rows": lambda r, w: (of_acts(skip_first=1), [acts(4, s) for s in range(5)], {"max_rows": 31}),
    "pooled_acts": lambda r, w: (of_acts(), [pooled(acts(4, s)) for s in range(5)], {"max_rows": 14}),
    "uneven": lambda r, w: (of_acts(), [acts(n, n) for n in (4, 1, 6)], {}),
    "fewer_batches_than_ranks": lambda r, w: (of_acts(), [acts(4, 0)], {}),
    "raw": lambda r, w: (measures(["x"]), raw(), {}),
    "raw_max_rows": lambda r, w: (measures(["x"]), raw(), {"max_rows": 17}),
    "own_rows": lambda r, w: (own_rows(), [{"series": torch.randn(n, 3, D, generator=torch.Generator().manual_seed(n))}
                                          for n in (2, 4, 3)], {"max_rows": 20}),
    "sharded": lambda r, w: (of_acts(), Shards(r, w).batches, {"sharded": True}),
    "sharded_uneven": lambda r, w: (
        of_acts(), [b for i, b in enumerate(Shards(0, 1).batches) if w == 1 or (i < 5) == (r == 0)], {"sharded": True}
    ),
    "sharded_raw": lambda r, w: (
        measures(["x"]),
        [{**b, "sequence_id": torch.arange(7) + 7 * i} for i, b in enumerate(raw((7, 7, 7))) if w == 1 or i % w == r],
        {"sharded": True},
    ),
    "dropped": lambda r, w: (of_acts(), [spoiled(acts(4, s)) for s in range(4)], {"nonfinite": "drop"}),
}  # fmt: skip


def spoiled(batch):
    batch["acts"]["x"][1, :, 0] = torch.nan
    return batch


def stored(folder):
    """What rows that all ranks stored give when all ranks read them."""
    loader = [acts(4, s) for s in range(5)]
    keep = tg.StoreActivations(folder, ["x"], also=["label"], shard_bytes=500)
    written = tg.run(TensorDictSequential(tg.SelectTokens(["x"], also=["label"]), keep), loader, block_rows=8)
    if dist.is_initialized():
        dist.barrier()  # the run is complete once rank 0 has said so
    [record] = keep.store.catalogue.records()
    assert written is None or int(written["stored", "rows"]) == record.rows
    return tg.run(measures(["x"], also=["label"]), keep.store.rows(record.id, batch_rows=5))


def results(rank, world, folder):
    """Every case's result on this rank; ``folder`` is for what is stored."""
    found = {"stored": stored(folder)}
    for name, case in CASES.items():
        pipeline, loader, options = case(rank, world)
        found[name] = tg.run(pipeline, loader, progress=False, **options)
        if name == "uneven":
            covariance = pipeline.module[1].module[0].module[0]
            covariance.sync_()  # a second time: nothing changes
            assert covariance.is_empty is (rank != 0)
            if rank == 0:
                again = covariance.publish(TensorDict({}))
                for key in covariance.out_keys:
                    assert torch.equal(again[key], found[name][key]), key
    return found


def main():
    """A worker: rank, address of the store, where rank 0 leaves its results."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module="torch")
    # few rows, of four features, whichever rank asks
    for category in (tg.UndefinedMeasureWarning, tg.FewRowsWarning):
        warnings.filterwarnings("ignore", category=category)
    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        found = results(rank, 2, out + ".activations")
        if rank == 0:
            torch.save({name: {key: value for key, value in flat(td)} for name, td in found.items()}, out)
        else:
            assert all(td is None for td in found.values()), "results belong to rank 0"
    finally:
        dist.destroy_process_group()


def flat(td):
    """Tensors by key, timings left out."""
    return [(k, td[k]) for k in td.keys(True, True) if "seconds" not in k and isinstance(td[k], torch.Tensor)]


if __name__ == "__main__":
    main()
