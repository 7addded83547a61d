"""Activation patching beside a loop of hooks written by hand: processor time a cell, and the same grid.

The loop runs the clean pass once, and for every layer and position a pass of the corrupted batch with one hook on the block.
Both in one process on one thread, in turn, round after round; the table gives medians.

    python tests/benchmarks/patching.py             # GPT-2 small (random weights) and a tiny Llama
    python tests/benchmarks/patching.py --rounds 1 --short
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import models
import tdgeom as tg


def by_hand(model: nn.Module, blocks: nn.ModuleList, clean: Tensor, corrupted: Tensor) -> Tensor:
    """(layers, positions, B): the difference of two logits, cell by cell."""
    seen: dict[int, Tensor] = {}
    handles = [
        block.register_forward_pre_hook(lambda m, args, i=i: seen.update({i: args[0]}))
        for i, block in enumerate(blocks)
    ]
    with torch.no_grad():
        model(clean)
        for handle in handles:
            handle.remove()
        rows = []
        for layer, block in enumerate(blocks):
            for position in range(clean.shape[1]):

                def put(
                    module: nn.Module, args: tuple, layer: int = layer, position: int = position
                ) -> tuple:
                    x = args[0].clone()
                    x[:, position] = seen[layer][:, position]
                    return (x, *args[1:])

                handle = block.register_forward_pre_hook(put)
                logits = model(corrupted).logits[:, -1]
                handle.remove()
                rows.append(logits[:, 5] - logits[:, 9])
    return torch.stack(rows).reshape(len(blocks), clean.shape[1], -1)


def compare(
    name: str, model: nn.Module, blocks: nn.ModuleList, pair: tuple[Tensor, Tensor], rounds: int
) -> None:
    """Time a cell of both, and the largest difference of their grids."""
    clean, corrupted = pair
    cells = len(blocks) * clean.shape[1]

    def ours() -> Tensor:
        runs = {"input_ids": clean}, {"input_ids": corrupted}
        return tg.activation_patching(model, *runs, answers=(5, 9), progress=False)[
            "per_example", "residual_input"
        ]

    def loop() -> Tensor:
        return by_hand(model, blocks, clean, corrupted)

    times: dict[str, list[float]] = {"tdgeom": [], "loop": []}
    contestants: dict[str, Callable[[], Tensor]] = {"tdgeom": ours, "loop": loop}
    grids = {}
    for turn in range(rounds + 1):
        for who, call in contestants.items():
            start = time.thread_time()
            grids[who] = call()
            if turn or rounds == 1:  # the first finds out about the model
                times[who].append((time.thread_time() - start) / cells)
    ratio = statistics.median(a / b for a, b in zip(times["tdgeom"], times["loop"]))
    gap = float((grids["tdgeom"] - grids["loop"]).abs().max())
    own, hand = (statistics.median(times[who]) * 1e3 for who in ("tdgeom", "loop"))
    print(f"| {name} | {cells} | {own:.2f} ms | {hand:.2f} ms | {ratio:.2f} | {gap:.0e} |", flush=True)


def pairs(batch: int, length: int, vocabulary: int, one: bool) -> tuple[Tensor, Tensor]:
    """A clean and a corrupted batch, that differ at every position or at one in the middle."""
    ids = torch.randint(10, vocabulary, (2, batch, length), generator=torch.Generator().manual_seed(0))
    if one:
        other = ids[0].clone()
        other[:, length // 2] = ids[1, :, length // 2]
        return ids[0], other
    return ids[0], ids[1]


def main() -> None:
    """All rows of the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    small = GPT2LMHeadModel(GPT2Config(n_layer=4 if settings.short else 12)).eval()
    tiny = models.llama()
    print("| batch; where the runs differ | cells | tdgeom, a cell | loop, a cell | ratio | grids apart |")
    print("|---|---|---|---|---|---|")
    for batch, one in ((1, False), (2, False), (2, True)):
        where = "one position" if one else "every position"
        name = f"GPT-2 small, {batch} x 8 tokens, {where}"
        compare(name, small, small.transformer.h, pairs(batch, 8, 50257, one), settings.rounds)
    for length in (8, 12, 24):
        name = f"tiny Llama, 3 x {length} tokens, every position"
        pair = pairs(3, length, models.VOCAB, one=False)
        compare(name, tiny, tiny.model.layers, pair, 4 * settings.rounds)


if __name__ == "__main__":
    main()
