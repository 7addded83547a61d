"""What each of two processes does: the same training with and without a watch, replicated and sharded."""

from __future__ import annotations

import sys
import warnings

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import models
import tdgeom as tg

STEPS = 4


def trained(how, watch=None):
    torch.manual_seed(3)
    bare = models.gpt2(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2).train()
    if how == "sharded":
        for block in bare.transformer.h:
            fully_shard(block)
        model = fully_shard(bare)
    else:
        model = DistributedDataParallel(bare)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    torch.manual_seed(10 + dist.get_rank())
    losses = []
    for _ in range(STEPS):
        ids = torch.randint(3, models.VOCAB, (4, 10))

        def one_step(ids=ids):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

        if watch is None:
            one_step()
        else:
            with watch.step(model):
                one_step()
    assert not any(module._forward_hooks for module in bare.modules() if how != "sharded")
    ends = [
        float(p.full_tensor().double().sum()) if how == "sharded" else float(p.double().sum())
        for p in model.parameters()
    ]
    return losses, ends, torch.rand(2).tolist()


def main() -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)
    probe = [{"input_ids": torch.randint(3, models.VOCAB, (5, 10), generator=generator)} for _ in range(4)]
    for how in ("replicated", "sharded"):
        plain = trained(how)
        for dataloader in (probe, None):
            for budget in (None, 1e9) if how == "replicated" else (None,):
                watch = tg.GeometryWatch(dataloader, every=2, metrics="spectrum", budget=budget)
                assert trained(how, watch) == plain, (how, dataloader is None)
                if dist.get_rank():
                    assert not watch.values
                    continue
                wanted = [0, 2, 4] if dataloader is not None else [0, 2]
                assert watch.frame()["step"].unique().tolist() == wanted
                rows = 4 * 5 * 10 if dataloader is not None else 2 * 4 * 10
                assert watch.last.metadata["rows_observed"] == rows
    dist.barrier()
    if dist.get_rank() == 0:
        print("the same")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
