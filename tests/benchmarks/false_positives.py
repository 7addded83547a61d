"""How often independent representations are called alike: p-values of linear CKA and of shuffled documents, one pair and many.

Run as ``python -m tests.benchmarks.false_positives [--sets 1000]``; prints the table of docs/significance.md. Two models of D
features each read the same documents and share nothing: every document has a direction of its own on either side that its rows
lean to, of half their variance, and neighbouring rows vary together. What is counted is p <= 0.05.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import tdgeom as tg
from tdgeom import functional as F


def representation(document: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """(N, width) rows of a power-law spectrum, which vary together inside documents and from row to row."""
    counts = document.bincount()
    own = torch.randn(len(counts), width, generator=generator)[document]
    steps = [torch.randn(len(counts), width, generator=generator)]
    for _ in range(int(counts.max()) - 1):
        steps.append(0.6 * steps[-1] + 0.8 * torch.randn(len(counts), width, generator=generator))
    place = torch.arange(len(document)) - (counts.cumsum(0) - counts)[document]
    rows = torch.stack(steps)[place, document]
    scale = torch.arange(1, width + 1).pow(-0.5)
    return (own + rows) * scale


def documents(number: int, longest: int, generator: torch.Generator) -> Tensor:
    """(N,) which document a row is of; lengths 1 to ``longest``."""
    lengths = torch.randint(1, longest + 1, (number,), generator=generator)
    return torch.repeat_interleave(torch.arange(number), lengths)


def p_values(width: int, number: int, longest: int, seed: int) -> dict[str, float]:
    """One pair of independent sides."""
    generator = torch.Generator().manual_seed(seed)
    document = documents(number, longest, generator)
    x, y = (representation(document, width, generator) for _ in range(2))
    found = {
        "one row a document, closed form": float(F.linear_cka_null(x, y, document).p),
        "rows taken as independent (wrong)": float(F.linear_cka_null(x, y).p),
        "documents shuffled": float(shuffled(x, y, document, seed)),
    }
    return found


def shuffled(x: Tensor, y: Tensor, document: Tensor, seed: int) -> Tensor:
    """The stage's p-value."""
    stage = tg.Calibrated(tg.LinearCKA(), repeats=99, seed=seed + 10**6)
    out = stage(sample_a=x, sample_b=y, sample_row_id=document << 20)
    return out[stage.out_names.index("linear_cka_p")]


def best_of_all(layers: int, width: int, number: int, longest: int, seed: int) -> dict[str, float]:
    """The smallest p-value of all pairs of layers of two models; layers of a model resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    document = documents(number, longest, generator)
    sides = []
    for _ in range(2):
        layer = representation(document, width, generator)
        sides.append([layer])
        for _ in range(layers - 1):
            layer = layer + 0.5 * representation(document, width, generator)
            sides[-1].append(layer)
    stage = tg.Calibrated(tg.LinearCKA(), repeats=99, keep_draws=True, seed=seed + 10**6)
    prepared = [[stage.prepare(x) for x in side] for side in sides]
    row_id = document << 20
    out = [dict(zip(stage.out_names, stage.compare(a, b, row_id))) for a in prepared[0] for b in prepared[1]]
    joint = F.joint_p_values(
        torch.stack([one["linear_cka"] for one in out]), torch.stack([one["linear_cka_draws"] for one in out])
    )
    single = torch.stack([one["linear_cka_p"] for one in out])
    return {
        "joint null": float(joint.min()),
        "Holm": float(F.adjusted_p_values(single).min()),
        "uncorrected (wrong)": float(single.min()),
    }


SETTINGS = [(16, 60, 1), (64, 100, 1), (64, 100, 6), (256, 100, 6), (768, 60, 1), (768, 60, 4)]


def rates(sets: int, one: Callable[[int], dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Share of p <= 0.05 and its standard error."""
    found = [one(seed) for seed in range(sets)]
    shares = {name: sum(p[name] <= 0.05 for p in found) / sets for name in found[0]}
    return {name: (share, (share * (1 - share) / sets) ** 0.5) for name, share in shares.items()}


def table(sets: int) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| independent sides | test | p <= 0.05 |"
    yield "|---|---|---|"
    for width, number, longest in SETTINGS:
        for name, (share, error) in rates(sets, partial(p_values, width, number, longest)).items():
            yield f"| D = {width}, {number} documents of 1 to {longest} rows | {name} | {share:.3f} ± {error:.3f} |"
    for name, (share, error) in rates(sets, partial(best_of_all, 4, 32, 120, 4)).items():
        yield f"| best of 16 pairs, D = 32, 120 documents of 1 to 4 rows | {name} | {share:.3f} ± {error:.3f} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=1000)
    for line in table(parser.parse_args().sets):
        print(line, flush=True)
    sys.exit(0)
