"""How often 95 % intervals hold the truth: data sets of documents whose tokens are alike, with truths that are known.

    python tests/benchmarks/coverage.py             # 300 data sets; the table of docs/errors.md
    python tests/benchmarks/coverage.py --sets 30   # what the slow tests run

A data set is 200 documents of 10 tokens: x = L(√ρ u + √(1-ρ) v), u of the document and v of the token standard normal, so that
tokens of a document correlate by ρ in every direction and the covariance is LLᵀ. For spectra and what follows from them D = 24,
LLᵀ with eigenvalues 1/i, ρ = 0.6, N = 2,000; y = x turned by 0.6 in the planes of directions i and i + 4, and for CKA
with noise of its own. For neighbours D = 4, eigenvalues 1, ρ = 0.3, N = 1,000 (100 documents), y = x + noise. Truths are those of
the population; for what depends on how many rows there are (dimensions, overlaps) the mean over the data sets.
"""

from __future__ import annotations

import argparse
import math
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import torch
from tensordict import TensorDict
from torch import Tensor

import tdgeom as tg
from tdgeom import functional as F
from tdgeom.measures.jackknife import scale_of
from tdgeom.measures.spectrum_errors import replicate_spectrum_metrics

DOCUMENTS, TOKENS, WIDTH, RHO = 200, 10, 24, 0.6
LEADING = 4
SPECTRUM = ("d_pr", "d_entropy", "effective_rank", "k90")


def documents(seed: int, count: int, width: int, rho: float) -> tuple[Tensor, Tensor]:
    """Standard normal rows of ``count`` documents of ten tokens, and their row ids."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(count, width, generator=generator, dtype=torch.float64).repeat_interleave(TOKENS, 0)
    x = math.sqrt(rho) * own + math.sqrt(1 - rho) * torch.randn(
        count * TOKENS, width, generator=generator, dtype=torch.float64
    )
    index = torch.arange(count * TOKENS)
    return x, (index // TOKENS) << 20 | index % TOKENS


def population() -> tuple[Tensor, Tensor, float]:
    """The eigenvalues, the turn from x to y, and the size of the noise that y has for CKA."""
    turn = torch.eye(WIDTH, dtype=torch.float64)
    c, s = math.cos(0.6), math.sin(0.6)
    for i in range(LEADING):
        j = i + LEADING
        turn[i, i], turn[i, j], turn[j, i], turn[j, j] = c, -s, s, c
    values = 1 / torch.arange(1, WIDTH + 1, dtype=torch.float64)
    values[LEADING:] /= 3  # the leading subspace stands out
    return values, turn, 0.3


def truths() -> dict[str, float]:
    """What the population has."""
    values, turn, noise = population()
    covariance = torch.diag(values)
    other = turn @ covariance @ turn.T
    cross = covariance @ turn.T
    noisy = other + noise**2 * torch.eye(WIDTH, dtype=torch.float64)
    cka = float(cross.square().sum() / (covariance.norm() * noisy.norm()))
    spectra = replicate_spectrum_metrics(values)
    vectors = torch.eye(WIDTH, dtype=torch.float64)
    novelty = F.feature_subspace_novelty(vectors[:, :LEADING], (turn @ vectors)[:, :LEADING])
    return {
        **{name: float(spectra[name]) for name in SPECTRUM},
        "linear_cka": cka,
        "linear_cka_debiased": cka,
        "feature_subspace_novelty": float(novelty),
    }


def smooth(seed: int, by: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Replicates of what follows from covariances: name, (groups+1,), rows a group."""
    values, turn, noise = population()
    x, ids = documents(seed, DOCUMENTS, WIDTH, RHO)
    x = x * values.sqrt()
    y = x @ turn.T
    more = noise * torch.randn(
        x.shape, generator=torch.Generator().manual_seed(seed + 10**6), dtype=torch.float64
    )
    spectra = []
    for rows in (x, y):
        td = tg.GroupedCovariance(by=by)(TensorDict(tokens=rows, row_id=ids))
        spectra.append(tg.LeaveOutSpectrum(k=LEADING)(td)["replicates"])
    for name in SPECTRUM:
        yield name, replicate_spectrum_metrics(spectra[0]["spectra"])[name], spectra[0]["rows"]
    novelty = F.feature_subspace_novelty(spectra[0]["subspaces"], spectra[1]["subspaces"])
    yield "feature_subspace_novelty", novelty, spectra[0]["rows"]
    td = tg.SampleGroups(by=by)(TensorDict({"sample": {"a": x, "b": y + more}, "sample_row_id": ids}))
    td = tg.LeaveOutPair(tg.LinearCKA(estimator="both"))(td)
    for name in ("linear_cka", "linear_cka_debiased"):
        yield name, td["between", name], td["sample_group_rows"]


def near(seed: int, by: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Replicates of what nearest neighbours say."""
    x, ids = documents(seed, DOCUMENTS // 2, 4, 0.3)
    y = x + 0.5 * torch.randn(
        x.shape, generator=torch.Generator().manual_seed(seed + 10**6), dtype=torch.float64
    )
    label = (x[:, 0] > 0).long()
    td = TensorDict(
        {"sample": x, "both": {"a": x, "b": y}, "sample_row_id": ids, "sample_carried": {"label": label}}
    )
    sides = [("both", "a"), ("both", "b")]
    td = tg.SampleGroups(by=by)(td)
    for stage in (
        tg.LeaveOut(tg.TwoNN()),
        tg.LeaveOut(tg.Gride(range_max=16)),
        tg.LeaveOut(tg.LevinaBickel(k=20)),
        tg.LeaveOut(tg.LabelOverlap(k=30)),
        tg.LeaveOutPair(tg.NeighborhoodOverlap(k=10, in_keys=sides)),
    ):
        td = stage(td)
    rows = td["sample_group_rows"]
    yield "twonn", td["dimension", "twonn", "estimate"], rows
    for step, value in enumerate(td["dimension", "gride", "estimate"].unbind(-1)):
        yield f"gride (n = {2**step})", value, rows
    yield "levina_bickel", td["dimension", "levina_bickel", "estimate"], rows
    yield "label_overlap", td["neighborhood", "label_overlap"], rows
    yield "neighborhood_overlap", td["between", "neighborhood_overlap"], rows


def one_set(seed: int) -> dict[tuple[str, str], tuple[float, float, float, float]]:
    """Of each measure, by documents and by rows: value, error, and the interval's ends."""
    torch.set_num_threads(1)
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for by in ("document", "row"):
            for kind in (smooth, near):
                for name, values, rows in kind(seed, by):
                    result = F.group_jackknife(values, rows)
                    scale = "log" if "(" in name or name in ("twonn", "levina_bickel") else scale_of(name)
                    low, high = F.error_interval(
                        result.estimate, result.standard_error, result.degrees, scale=scale
                    )
                    parts = (result.estimate, result.standard_error, low, high)
                    found[name, by] = tuple(map(float, parts))
    return found


def coverage(sets: int, workers: int = 1) -> dict[str, dict[str, float]]:
    """A row a measure: truth, spread over the data sets, mean error over it, and the share of intervals that hold the truth."""
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            results = list(pool.map(one_set, range(sets)))
    else:
        results = [one_set(seed) for seed in range(sets)]
    known = truths()
    table = {}
    for name in dict.fromkeys(key[0] for key in results[0]):
        values = torch.tensor([one[name, "document"][0] for one in results])
        truth = known.get(name, float(values.mean()))
        row = {"truth": truth, "mean": float(values.mean()), "spread": float(values.std())}
        for by in ("document", "row"):
            errors = torch.tensor([one[name, by][1] for one in results])
            held = [one[name, by][2] <= truth <= one[name, by][3] for one in results]
            row[f"error_{by}"] = float(errors.square().mean().sqrt()) / row["spread"]
            row[f"held_{by}"] = sum(held) / sets
        table[name] = row
    return table


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=300)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    print("| measure | truth | mean | error / spread | intervals that hold it | with rows as independent |")
    print("|---|---|---|---|---|---|")
    for name, row in coverage(options.sets, options.workers).items():
        print(
            f"| `{name}` | {row['truth']:.4g} | {row['mean']:.4g} | {row['error_document']:.2f} | "
            f"{100 * row['held_document']:.1f} % | {100 * row['held_row']:.1f} % |"
        )


if __name__ == "__main__":
    main()
