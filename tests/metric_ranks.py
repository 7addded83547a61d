"""What each of two processes does in training/test_stage_metric.py: python metric_ranks.py RANK FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

import tdgeom as tg


def rows(n=90, d=4):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 3


def spectrum():
    return TensorDictSequential(tg.StreamingCovariance(), tg.EigenSpectrum(k=1), tg.SpectrumMetrics())


def refused(call, *args) -> str:
    try:
        call(*args)
    except ValueError as error:
        return str(error)
    return ""


def main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    own = [rows()[:70], rows()[70:]][rank]
    values = tg.as_metric(spectrum(), metrics=["d_pr", "covariance"])
    sampled = tg.as_metric(tg.RowSample(["x"], size=8))  # states of other shapes on each rank
    one_sided = tg.as_metric(tg.StreamingMean(), metrics=["mean", "count"])
    everywhere = tg.as_metric(tg.StreamingMean(), metrics=["count"], dist_sync_on_step=True)
    for first in range(0, len(own), 25):
        part = own[first : first + 25]
        ids = torch.arange(first, first + len(part)) + 70 * rank
        values.update(tokens=part)
        sampled.update(TensorDict({("tokens", "x"): part, "row_id": ids}))
        if rank == 0:
            one_sided.update(part)
    found = {"values": values.compute(), "sampled": sampled.compute(), "one_sided": one_sided.compute()}
    found["own again"] = tg.as_metric(spectrum(), metrics=["count"], sync_on_compute=False)(tokens=own)
    found["step"] = everywhere(tokens=own[:10])
    values.update(tokens=own)  # what was gathered has been put back
    found["later"] = values.compute()
    found["forgetting"] = refused(
        recent := tg.as_metric(tg.StreamingMean(halflife=5), metrics=["mean"]), own
    ) or refused(recent.compute)
    stage = tg.StreamingMean(halflife=5)
    stage.update(TensorDict(tokens=own))
    found["sync_"] = refused(stage.sync_)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
