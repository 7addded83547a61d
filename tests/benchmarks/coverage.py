"""How often 95 % intervals hold the truth: data sets of documents whose tokens are alike, with truths that are known.

    python tests/benchmarks/coverage.py --out tests/benchmarks/coverage.csv   # 300 data sets; the table of docs/errors.md
    python tests/benchmarks/coverage.py --sets 30                             # what the slow tests run

Four kinds of data, all of documents of several tokens, and intervals as ``tg.intervals`` makes them (20 groups of documents,
Student's t with 19 degrees of freedom, on the measure's scale; about the value less its jackknife bias where it has one):

- *spectra*: N = 2,000 rows, 200 documents of 10 tokens, D = 24. x = L(√ρ u + √(1-ρ) v), u of the document and v of the token
  standard normal, ρ = 0.7, LLᵀ with eigenvalues 1/i, a third of it beyond the fourth. y = T(0.8 x + 0.6 x'), x' as x and
  independent of it, T a rotation that turns directions i and i + 4 by 0.3, 0.5, 0.7 and 0.9. Truths are the population's.
- *neighbours*: N = 1,600 rows, 80 documents of 20 tokens, each of one of two kinds by the toss of a coin: in a plane, or in five
  dimensions elsewhere; inside a kind tokens correlate by 0.5. y = x and noise that is small in the plane and large elsewhere.
  What these measures say depends on how many rows there are, also for ever so many documents: the truth is their expectation
  at this N, the mean over other data sets, four times as many.
- *probe*: 300 documents of 10 tokens, D = 8, one label a document, x = ±0.8 e + √ρ u + √(1-ρ) v, ρ = 0.7. A quarter of the
  documents is held out. The truth is the accuracy that the very probe that was fitted has on the population, in closed form.
- *features*: 60 documents of 5 tokens, 64 features a side of infinitely many, each a random direction of a space of 200 whose
  variances fall as 1/√i (of y the first 100 alone); tokens correlate by 0.7. Intervals as ``SampledCKA`` gives them.

The last column takes rows for independent (``by="row"``; of the probe, a binomial share).
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import platform
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import Tensor

import tdgeom as tg
from tdgeom import functional as F
from tdgeom.measures.jackknife import scale_of
from tdgeom.measures.spectrum_errors import replicate_spectrum_metrics

WIDTH, LEADING, ANGLES, SHARED = 24, 4, (0.3, 0.5, 0.7, 0.9), 0.8
SPECTRUM = ("d_pr", "d_entropy", "effective_rank", "k90")
APART = 0.8
Values = tuple[float, float, float, float]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def alike(generator: torch.Generator, documents: int, tokens: int, width: int, rho: float) -> Tensor:
    """Standard normal rows of documents, whose tokens correlate by ``rho`` in every direction."""
    own = normal(generator, documents, width).repeat_interleave(tokens, 0)
    return math.sqrt(rho) * own + math.sqrt(1 - rho) * normal(generator, documents * tokens, width)


def row_ids(documents: int, tokens: int) -> Tensor:
    """As ``SelectTokens`` makes them."""
    index = torch.arange(documents * tokens)
    return (index // tokens) << 20 | index % tokens


def population() -> tuple[Tensor, Tensor]:
    """The eigenvalues, and the turn from x to y."""
    turn = torch.eye(WIDTH, dtype=torch.float64)
    for i, angle in enumerate(ANGLES):
        j, c, s = i + LEADING, math.cos(angle), math.sin(angle)
        turn[i, i], turn[i, j], turn[j, i], turn[j, j] = c, -s, s, c
    values = 1 / torch.arange(1, WIDTH + 1, dtype=torch.float64)
    values[LEADING:] /= 3  # the leading subspace stands out
    return values, turn


def population_truths() -> dict[str, float]:
    """What the population of *spectra* has."""
    values, turn = population()
    covariance = torch.diag(values)
    cross = SHARED * covariance @ turn.mT
    cka = float(cross.square().sum() / covariance.square().sum())
    spectra = replicate_spectrum_metrics(values)
    return {
        **{name: float(spectra[name]) for name in SPECTRUM},
        "feature_subspace_novelty": sum(map(math.sin, ANGLES)) / LEADING,
        "linear_cka": cka,
        "linear_cka_debiased": cka,
    }


def spectra(seed: int, by: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Replicates of what follows from covariances: name, (groups+1,), rows a group."""
    generator = torch.Generator().manual_seed(seed)
    values, turn = population()
    ids = row_ids(200, 10)
    x, other = (alike(generator, 200, 10, WIDTH, 0.7) * values.sqrt() for _ in range(2))
    y = (SHARED * x + math.sqrt(1 - SHARED**2) * other) @ turn.mT
    found = []
    for rows in (x, y):
        td = tg.GroupedCovariance(by=by)(TensorDict(tokens=rows, row_id=ids))
        found.append(tg.LeaveOutSpectrum(k=LEADING)(td)["replicates"])
    for name in SPECTRUM:
        yield name, replicate_spectrum_metrics(found[0]["spectra"])[name], found[0]["rows"]
    novelty = F.feature_subspace_novelty(found[0]["subspaces"], found[1]["subspaces"])
    yield "feature_subspace_novelty", novelty, found[0]["rows"]
    td = tg.SampleGroups(by=by)(TensorDict({"sample": {"a": x, "b": y}, "sample_row_id": ids}))
    td = tg.LeaveOutPair(tg.LinearCKA(estimator="both"))(td)
    for name in ("linear_cka", "linear_cka_debiased"):
        yield name, td["between", name], td["sample_group_rows"]


def neighbours(seed: int, by: str | None) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Replicates of what nearest neighbours say; without ``by`` the values alone."""
    generator = torch.Generator().manual_seed(seed)
    n, flat = 1600, torch.arange(5) < 2
    kind = (torch.rand(80, generator=generator) < 0.5).repeat_interleave(20)[:, None]
    x = alike(generator, 80, 20, 5, 0.5) * torch.where(kind, flat, True)
    noise = torch.where(kind, 0.05 * flat, 0.8) * normal(generator, n, 5)
    label = (x[:, 0] + torch.where(kind[:, 0], 0.0, 0.7) * normal(generator, n) > 0).long()
    a, b = (torch.cat((rows, 40.0 * kind), 1) for rows in (x, x + noise))
    td = TensorDict({"sample": a, "both": {"a": a, "b": b}, "sample_row_id": row_ids(80, 20),
                     "sample_carried": {"label": label}})  # fmt: skip
    overlap = tg.NeighborhoodOverlap(k=10, in_keys=[("both", "a"), ("both", "b")])
    sites = (tg.TwoNN(), tg.Gride(), tg.LabelOverlap(k=10))
    stages = [*sites, overlap] if by is None else [*map(tg.LeaveOut, sites), tg.LeaveOutPair(overlap)]
    td = tg.SampleGroups(by=by or "row")(td)
    for stage in stages:
        td = stage(td)
    rows = td["sample_group_rows"]
    yield "twonn_estimate", td["dimension", "twonn", "estimate"], rows
    for step, value in enumerate(td["dimension", "gride", "estimate"].unbind(-1)):
        yield f"gride (n = {2**step})", value, rows
    yield "label_overlap", td["neighborhood", "label_overlap"], rows
    yield "neighborhood_overlap", td["between", "neighborhood_overlap"], rows


def features(seed: int) -> tuple[float, Values, Values]:
    """The alignment of two populations of features, and what 64 of each side say of it by documents and by rows."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, 201, dtype=torch.float64) ** -0.5
    cut = torch.where(torch.arange(200) < 100, spectrum, 0.0)
    truth = float((spectrum * cut).sum() / (spectrum.square().sum() * cut.square().sum()).sqrt())
    latent = alike(generator, 60, 5, 200, 0.7)
    x, y = (latent @ (one.sqrt()[:, None] * normal(generator, 200, 64)) for one in (spectrum, cut))
    made = []
    for document in (torch.arange(300) // 5, None):
        found = F.linear_cka_sampled_error(x, y, document, seed=seed)
        low, high = F.error_interval(found.value, found.standard_error, 19)
        made.append((float(found.value), float(found.standard_error), float(low), float(high)))
    return truth, made[0], made[1]


def interval(name: str, values: Tensor, rows: Tensor, corrected: bool) -> Values:
    """Value, error, and the interval's ends."""
    found = F.group_jackknife(values, rows)
    centre = found.estimate - found.bias if corrected else found.estimate
    scale = "log" if "gride" in name else scale_of(name)
    low, high = F.error_interval(centre, found.standard_error, found.degrees, scale=scale)
    return float(found.estimate), float(found.standard_error), float(low), float(high)


def probe(seed: int) -> tuple[float, Values, Values]:
    """The accuracy that the fitted probe has, what it was found to have by documents, and by rows."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(2, (300,), generator=generator)
    x = alike(generator, 300, 10, 8, 0.7).reshape(300, 10, 8)
    x[:, :, 0] += APART * (2 * label[:, None] - 1)
    batches = [{"x": part, "label": own} for part, own in zip(x.split(50), label.split(50))]
    probing = tg.Probing(
        torch.nn.Identity(),
        "module_input:",
        tg.LinearProbe(permutations=0, seed=seed),
        capture={"in_keys": ["x"]},
        errors=True,
    )
    row = probing.run(batches).iloc[0]
    (fitted,) = probing.probes.values()
    weight, bias = fitted.fitted["weight"], fitted.fitted["bias"]
    w, b = weight[1] - weight[0], float(bias[1] - bias[0])
    ends = [(APART * float(w[0]) + sign * b) / (float(w.norm()) * math.sqrt(2)) for sign in (1, -1)]
    truth = sum(0.5 * (1 + math.erf(end)) for end in ends) / 2
    value, error, rows = row["accuracy"], row["accuracy_se"], row["test_rows"]
    plain = math.sqrt(value * (1 - value) / rows)
    made = []
    for se, degrees in ((error, 19), (plain, rows - 1)):
        low, high = F.error_interval(torch.tensor(value), torch.tensor(se), degrees, scale="logit")
        made.append((value, se, float(low), float(high)))
    return truth, made[0], made[1]


def one_set(seed: int) -> dict[tuple[str, str], Values | float]:
    """Of each measure, by documents and by rows: value, error, and the interval's ends; what is known only of a set."""
    torch.set_num_threads(1)
    found: dict[tuple[str, str], Values | float] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for by in ("document", "row"):
            for name, values, rows in spectra(seed, by):
                found[name, by] = interval(name, values, rows, corrected=True)
            for name, values, rows in neighbours(seed, by):
                found[name, by] = interval(name, values, rows, corrected=False)
        found["accuracy", "truth"], found["accuracy", "document"], found["accuracy", "row"] = probe(seed)
        name = "linear_cka_sampled"
        found[name, "truth"], found[name, "document"], found[name, "row"] = features(seed)
        for other in range(4):
            for name, value, _ in neighbours(10**6 + 4 * seed + other, None):
                found[name, f"expected_{other}"] = float(value)
    return found


def coverage(sets: int, workers: int = 1, raw: Path | None = None) -> dict[str, dict[str, float]]:
    """A row a measure: truth, spread over the data sets, mean error over it, and the share of intervals that hold the truth."""
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            results = list(pool.map(one_set, range(sets)))
    else:
        results = [one_set(seed) for seed in range(sets)]
    known = population_truths()
    table, lines = {}, []
    for name in dict.fromkeys(measure for measure, by in results[0] if by == "document"):
        expected = [v for one in results for (key, by), v in one.items() if key == name and "expected" in by]
        truths = [
            one.get((name, "truth"), known.get(name, sum(expected) / max(len(expected), 1)))
            for one in results
        ]
        values = torch.tensor([one[name, "document"][0] for one in results])
        truth = torch.tensor(truths)
        row = {
            "truth": float(truth.mean()),
            "mean": float(values.mean()),
            "spread": float((values - truth).std()),
        }
        for by in ("document", "row"):
            errors = torch.tensor([one[name, by][1] for one in results])
            held = [one[name, by][2] <= t <= one[name, by][3] for one, t in zip(results, truths)]
            row[f"error_{by}"] = float(errors.square().mean().sqrt()) / row["spread"]
            row[f"held_{by}"] = sum(held) / sets
            lines += [
                (name, by, seed, t, *one[name, by]) for seed, (one, t) in enumerate(zip(results, truths))
            ]
        table[name] = row
    if raw is not None:
        with raw.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["measure", "groups_of", "seed", "truth", "value", "error", "low", "high"])
            writer.writerows([*line[:3], *(f"{number:.6g}" for number in line[3:])] for line in lines)
    return table


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=300)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="a CSV of every interval")
    options = parser.parse_args()
    table = coverage(options.sets, options.workers, options.out)
    print(f"{options.sets} data sets, torch {torch.__version__}, Python {platform.python_version()}\n")
    print("| measure | truth | mean | error / spread | intervals that hold it | with rows as independent |")
    print("|---|---|---|---|---|---|")
    for name, row in table.items():
        print(
            f"| `{name}` | {row['truth']:.4g} | {row['mean']:.4g} | {row['error_document']:.2f} | "
            f"{100 * row['held_document']:.1f} % | {100 * row['held_row']:.1f} % |"
        )


if __name__ == "__main__":
    main()
