"""What each process does in run/test_shared_models.py: models that ranks share, run as one."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

import tdgeom as tg
from tdgeom.run.identity import weights_identity

SITES = ["residual_output.0", "attn_output.1", "mlp_output.0", "final_norm"]


def llama():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads)).eval()


class Blocks(nn.Module):
    """A stream of two blocks, of a model that is nobody's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def fsdp(model, mesh):
    for block in model.model.layers if isinstance(model, LlamaForCausalLM) else model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def parallel(model, mesh, **column):
    if isinstance(model, Blocks):
        for block in model.blocks:
            parallelize_module(block, mesh, {"0": ColwiseParallel(**column), "2": RowwiseParallel()})
        return model
    by_column = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
    by_row = ["self_attn.o_proj", "mlp.down_proj"]
    for block in model.model.layers:
        plan = {name: ColwiseParallel(**column) for name in by_column}
        parallelize_module(block, mesh, plan | {name: RowwiseParallel() for name in by_row})
    return model


def texts(count, rows=3):
    """Batches without padding, of different lengths."""
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(3, 50, (rows, 4 + number % 3), generator=generator)
        yield {"input_ids": ids, "sequence_id": torch.arange(rows) + rows * number}


def padded(count):
    """Batches of which some are padded, on one side or the other."""
    for number, batch in enumerate(texts(count)):
        mask = torch.ones_like(batch["input_ids"])
        if number % 3:
            mask[0, :2] = mask[2, :1] = 0
        yield {**batch, "attention_mask": mask if number < 4 else mask.flip(1)}


def vectors(count):
    for number in range(count):
        yield {"x": torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(number))}


def measured(model, batches, sites=SITES, **options):
    capture = tg.Capture(model, sites, **({"in_keys": ["x"]} if isinstance(model, Blocks) else {}))
    s = capture.sites
    measures = (tg.ForEach(tg.StreamingCovariance(), s), tg.RowSample(s, size=8))
    pipeline = TensorDictSequential(capture, tg.SelectTokens(s), *measures)
    return tg.run(pipeline, batches, progress=False, **options)


def split(batches, readers, reader, uneven):
    """A part for every reader: every so-many-th batch, or one each and the first all others."""
    batches = list(batches)
    first = len(batches) - readers + 1
    if not uneven:
        return batches[reader::readers]
    return batches[:first] if reader == 0 else batches[first + reader - 1 : first + reader]


OPTIONS = {"all": {}, "max_rows": {"max_rows": 41}}


def runs(model, readers, reader):
    """Name -> a run whose numbers are those of one process with the whole model."""
    for name, options in OPTIONS.items():
        yield name, lambda options=options: measured(model(), list(texts(5)), **options)
        if readers > 1 or reader is None:
            parts = list(texts(5)) if reader is None else split(texts(5), readers, reader, not options)
            yield f"{name}, split", lambda p=parts, o=options: measured(model(), p, sharded=True, **o)
            parts = list(texts(3)) if reader is None else list(texts(3)) if reader == 0 else []
            yield f"{name}, one without", lambda p=parts, o=options: measured(model(), p, sharded=True, **o)
    yield "padded", lambda: measured(model(), list(padded(6)))
    yield "one batch", lambda: measured(model(), list(texts(1)))


def numbers(result):
    if result is None:
        return None
    kept = ("moments", "sample", "sample_row_id", "run")
    named = {
        k: result.get(k) for k in result.keys(True, True) if (k[0] if isinstance(k, tuple) else k) in kept
    }
    return {
        repr(key): value.double().tolist()
        for key, value in named.items()
        if isinstance(value, torch.Tensor) and "seconds" not in key
    }


def edited(model):
    """What a model gives under edits at several places; of the own one where an activation lies in parts on the ranks."""
    if isinstance(model, Blocks):
        edits, given = {"module_output:blocks.0.1": tg.Scale(2.0, features=[3, 12])}, next(vectors(1))["x"]
    else:
        steer = tg.Steer(torch.linspace(-1, 1, 16))
        edits = {"residual_output.0": steer, "attn_output.1": tg.Scale(0.5)}
        given = next(texts(1))["input_ids"]
    with tg.Intervene(model, edits), torch.no_grad():
        output = model(given)
    return {"output": getattr(output, "logits", output).double().tolist()}


def inner(model, path):
    capture = tg.Capture(model, path, in_keys=["x"])
    td = capture(TensorDict(next(vectors(1))))
    return {"acts": td["acts", capture.sites[0]].double().tolist()}


def refused(work):
    begin = time.monotonic()
    try:
        work()
    except Exception as error:
        return {"kind": type(error).__name__, "said": str(error), "seconds": time.monotonic() - begin}
    return {"kind": None}


def in_context(mesh):
    positions = torch.arange(8)[None]
    with context_parallel(mesh, buffers=[positions], buffer_seq_dims=[1]):
        measured(llama(), list(texts(2)))


def staged():
    model = llama()
    model.hf_split_points = ["model.layers.1"]
    measured(model, list(texts(2)))


class Failing(nn.Module):
    def forward(self, x):
        if dist.get_rank() == dist.get_world_size() - 1:
            raise ArithmeticError("out of range")
        return x


def failing(mesh):
    model = Blocks()
    model.blocks[1].insert(1, Failing())
    return measured(fsdp(model, mesh), list(vectors(4)), ["module_output:blocks.1"])


def two_ranks(found):
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    for name, run in runs(lambda: fsdp(llama(), mesh), 2, rank):
        found[f"fsdp: {name}"] = numbers(run())
    for name, run in runs(lambda: parallel(llama(), mesh), 1, 0):
        found[f"tensor parallel: {name}"] = numbers(run())
    given = list(texts(5))
    found["tensor parallel: all, split"] = numbers(measured(parallel(llama(), mesh), given, sharded=True))
    whole = parallel(Blocks(), mesh, use_local_output=False)
    found["edited"] = [edited(parallel(llama(), mesh)), edited(whole)]
    found["tensor parallel: gathered"] = inner(whole, "module_output:blocks.0.1")
    found["weights"] = [weights_identity(one) for one in (fsdp(llama(), mesh), parallel(llama(), mesh))]
    part, inside = parallel(Blocks(), mesh), ["module_output:blocks.0"]
    found["refused"] = {
        "a part": refused(lambda: inner(part, "module_output:blocks.0.0")),
        **{
            f"heads, {kind}": refused(lambda k=kind: tg.Capture(parallel(llama(), mesh), k)) for kind in HEADS
        },
        "heads edited": refused(lambda: tg.Intervene(parallel(llama(), mesh), {"z.0": tg.Ablate(heads=[1])})),
        "a part edited": refused(lambda: edit_part(part)),
        "other batches": refused(lambda: measured(part, list(vectors(2))[rank:], inside, sharded=True)),
        "pipeline": refused(staged),
        "context": refused(lambda: in_context(mesh)),
    }
    found["failing"] = refused(lambda: failing(init_device_mesh("cpu", (2,))))


HEADS = ("q", "k", "v", "z", "head_output", "attn_pattern", "attn_scores")


def edit_part(model):
    with tg.Intervene(model, {"module_input:blocks.0.2": tg.Scale(2.0)}), torch.no_grad():
        model(next(vectors(1))["x"])


def four_ranks(found):
    """FSDP over groups of ranks that are tensor-parallel; and FSDP whose shards are copied."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    both = lambda: fsdp(parallel(llama(), mesh["tp"]), mesh["dp"])
    for name, run in runs(both, 2, rank // 2):
        found[f"both: {name}"] = numbers(run())
    for name, run in runs(lambda: fsdp(llama(), mesh), 4, rank):
        found[f"hybrid: {name}"] = numbers(run())
    found["weights"] = [weights_identity(both())]


def three_ranks(found):
    mesh = init_device_mesh("cpu", (3,))
    for name, run in runs(lambda: fsdp(llama(), mesh), 3, dist.get_rank()):
        found[f"fsdp: {name}"] = numbers(run())


def main():
    """A worker under torchrun; where it leaves what it saw."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=40))
    found: dict = {}
    {2: two_ranks, 3: three_ranks, 4: four_ranks}[dist.get_world_size()](found)
    Path(sys.argv[1], f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
    time.sleep(1.0)  # a launcher ends the others when one has ended
    os._exit(0)


if __name__ == "__main__":
    main()
