"""How often independent representations are called alike: p-values of linear CKA and of moved documents, one pair and many.

Run as ``python -m tests.benchmarks.false_positives [--sets 5000]``; prints the table of docs/significance.md. Two models of D
features each read the same documents and share nothing: every document has a direction of its own on either side that its rows
lean to, of half their variance, and neighbouring rows vary together. What is counted is p <= 0.05; where documents are moved
and measured again, over a fifth of the sets.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Iterator
from functools import partial

import numpy
import torch
from torch import Tensor

import tdgeom as tg
from tdgeom import functional as F


def representation(document: Tensor, width: int, generator: torch.Generator, sets: int) -> Tensor:
    """(sets, N, width) rows of a power-law spectrum, which vary together inside documents and from row to row."""
    counts = document.bincount()
    shape = (sets, len(counts), width)
    own = torch.randn(shape, generator=generator)[:, document]
    steps = [torch.randn(shape, generator=generator)]
    for _ in range(int(counts.max()) - 1):
        steps.append(0.6 * steps[-1] + 0.8 * torch.randn(shape, generator=generator))
    place = torch.arange(len(document)) - (counts.cumsum(0) - counts)[document]
    rows = torch.stack(steps)[place, :, document].movedim(0, 1)
    scale = torch.arange(1, width + 1).pow(-0.5)
    return (own + rows) * scale


def documents(number: int, longest: int, generator: torch.Generator) -> Tensor:
    """(N,) which document a row is of; lengths 1 to ``longest``."""
    lengths = torch.randint(1, longest + 1, (number,), generator=generator)
    return torch.repeat_interleave(torch.arange(number), lengths)


def p_values(width: int, number: int, longest: int, sets: int, seed: int) -> dict[str, Tensor]:
    """Pairs of independent sides over the same documents."""
    generator = torch.Generator().manual_seed(seed)
    document = documents(number, longest, generator)
    x, y = (representation(document, width, generator, sets) for _ in range(2))
    return {
        "over documents": F.linear_cka_null(x, y, document).p,
        "rows taken as independent": F.linear_cka_null(x, y).p,
    }


def moved(
    stage: tg.PairStage, width: int, number: int, longest: int, sets: int, seed: int
) -> dict[str, Tensor]:
    """The same, by moving documents and measuring again."""
    generator = torch.Generator().manual_seed(seed)
    document = documents(number, longest, generator)
    x, y = (representation(document, width, generator, sets) for _ in range(2))
    judge = tg.Calibrated(stage, repeats=99, alike=True, seed=seed + 10**6)
    place = judge.out_names.index(f"{stage.out_names[0]}_p")
    found = [judge(sample_a=a, sample_b=b, sample_row_id=document << 20)[place] for a, b in zip(x, y)]
    return {f"{type(stage).__name__}, documents moved": torch.stack(found)}


def best_of_all(
    layers: int, width: int, number: int, longest: int, sets: int, seed: int
) -> dict[str, Tensor]:
    """The smallest p-value of all pairs of layers of two models; layers of a model resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    document = documents(number, longest, generator)
    sides = []
    for _ in range(2):
        layer = representation(document, width, generator, sets)
        sides.append([layer])
        for _ in range(layers - 1):
            layer = layer + 0.5 * representation(document, width, generator, sets)
            sides[-1].append(layer)
    stage = tg.CKANull(draws=199, seed=seed + 10**6)
    prepared = [[stage.prepare(x) for x in side] for side in sides]
    row_id = document << 20
    out = [dict(zip(stage.out_names, stage.compare(a, b, row_id))) for a in prepared[0] for b in prepared[1]]
    mean, deviation, z, p, draws = (
        torch.stack([one[f"linear_cka_{name}"] for one in out])
        for name in ("null_mean", "null_sd", "z", "p", "draws")
    )
    joint = [F.joint_p_values(*one) for one in zip((mean + z * deviation).T, draws.movedim(1, 0))]
    return {
        "for the best of all": torch.stack(joint).amin(1),
        "Holm": F.adjusted_p_values(p.T).amin(1),
        "uncorrected": p.amin(0),
    }


SETTINGS = [
    (16, 60, 1), (16, 60, 6), (64, 25, 12), (64, 100, 1), (64, 100, 6), (256, 60, 1), (256, 60, 4), (768, 60, 1), (768, 60, 4),
]  # fmt: skip
MOVED = [tg.NeighborhoodOverlap(k=5), tg.RSA(), tg.Procrustes(), tg.CKNNA(k=10)]
DEPTHS = [
    (2, 32, 60, 1), (2, 256, 60, 4), (4, 32, 60, 4), (6, 16, 60, 4), (6, 16, 30, 1), (6, 16, 30, 4), (6, 16, 200, 1),
    (8, 16, 30, 4), (8, 64, 60, 4),
]  # fmt: skip


def rates(
    sets: int, at_once: int, one: Callable[[int, int], dict[str, Tensor]]
) -> dict[str, tuple[float, float]]:
    """Share of p <= 0.05 and its standard error, over so many sets, ``at_once`` of them over the same documents."""
    found = [one(min(at_once, sets - start), start) for start in range(0, sets, at_once)]
    shares = {name: float((torch.cat([p[name] for p in found]) <= 0.05).double().mean()) for name in found[0]}
    return {name: (share, (share * (1 - share) / sets) ** 0.5) for name, share in shares.items()}


def table(sets: int) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| independent sides | p-value | p <= 0.05 |"
    yield "|---|---|---|"
    for width, number, longest in SETTINGS:
        at_once = 20 if width < 500 else 5
        yield from lines(
            _said(width, number, longest), sets, at_once, partial(p_values, width, number, longest)
        )
    for stage in MOVED:
        yield from lines(_said(32, 60, 4), sets // 5, 1, partial(moved, stage, 32, 60, 4))
    for layers, width, number, longest in DEPTHS:
        where = f"{layers * layers} pairs of layers, {_said(width, number, longest)}"
        yield from lines(where, sets, 10, partial(best_of_all, layers, width, number, longest))


def lines(where: str, sets: int, at_once: int, one: Callable[[int, int], dict[str, Tensor]]) -> Iterator[str]:
    """A line a test."""
    for name, (share, error) in rates(sets, at_once, one).items():
        yield f"| {where} | {name} | {share:.3f} ± {error:.3f} |"


def _said(width: int, number: int, longest: int) -> str:
    return f"D = {width}, {number} documents of {'1 row' if longest == 1 else f'1 to {longest} rows'}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=5000)
    for line in table(parser.parse_args().sets):
        print(line, flush=True)
    print(f"\ntorch {torch.__version__}, numpy {numpy.__version__}, {platform.machine()}")
    sys.exit(0)
