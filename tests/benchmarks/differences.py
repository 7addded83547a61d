"""How often two halves of one corpus are called different, metric by metric and with the correction for all of them.

Run as ``python -m tests.benchmarks.differences [--sets 100]``; prints the table of docs/significance.md. One model of random
weights reads two halves of documents of one kind, each with words of its own that come back; nothing differs but which documents
they are.
"""

from __future__ import annotations

import argparse
import sys
import warnings

import pandas as pd
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import tdgeom as tg

VOCABULARY, DOCUMENTS, LENGTH = 64, 120, 10


def half(seed: int) -> list[dict[str, torch.Tensor]]:
    """Batches of documents that draw from few words each."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(0, VOCABULARY, (DOCUMENTS, 6), generator=generator)
    ids = own.gather(1, torch.randint(0, 6, (DOCUMENTS, LENGTH), generator=generator))
    return [{"input_ids": part} for part in ids.split(30)]


def compared(sets: int) -> list[pd.DataFrame]:
    """The differences of so many pairs of halves."""
    torch.manual_seed(0)
    sizes = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 24,
        "vocab_size": VOCABULARY,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    asked = {"metrics": ["spectrum", "sample", "novelty"], "errors": True, "progress": False}
    return [
        tg.difference(*(tg.analyze_model(model, half(2 * number + side), **asked) for side in (0, 1)))
        for number in range(sets)
    ]


def main(sets: int) -> None:
    """Print the table."""
    frames = compared(sets)
    each = pd.concat(frames, ignore_index=True)
    each = each[each["p"].notna()].assign(low=each["p"] <= 0.05)
    shares = each.groupby("metric", sort=True)["low"].mean()
    any_of = sum(bool(frame["differs"].any()) for frame in frames) / sets
    print(f"{sets} pairs of halves, {len(frames[0])} numbers each\n")
    print("| metric | p <= 0.05, single |\n|---|---|")
    for name, share in shares.items():
        print(f"| `{name}` | {share:.3f} |")
    error = (any_of * (1 - any_of) / sets) ** 0.5
    print(f"| any of all, corrected (Holm) | {any_of:.3f} ± {error:.3f} |")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=100)
    main(parser.parse_args().sets)
    sys.exit(0)
