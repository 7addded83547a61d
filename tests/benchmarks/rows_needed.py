"""How many rows each measure needs: its estimate against the number of rows, on populations whose truth is known.

    python tests/benchmarks/rows_needed.py    # writes docs/measures/measured.json, from which the pages' curves are drawn

Every population is stated where it is made. The truth is a closed form of the population where there is one (`exact`); else it is
the mean over the data sets at the most rows (`settled`), which the pages say. One measure has at most nine numbers of rows, each
measured on `SETS` data sets; kept are the mean and the 10 % and 90 % quantiles.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tensordict.nn import TensorDictSequential
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import tdgeom as tg
from tdgeom import functional as F

RESULT = Path(__file__).parents[2] / "docs" / "measures" / "measured.json"
SETS = 10
Measured = dict[str, float]
double: Any = {"dtype": torch.float64}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------ one site: a power law

WIDE = 384
POWER_LAW = 1 / torch.arange(1, WIDE + 1, **double)


def power_law_rows(n: int, seed: int) -> Tensor:
    """Gaussian rows of 384 features with eigenvalues 1/i, turned by a fixed rotation."""
    turn = torch.linalg.qr(torch.randn(WIDE, WIDE, generator=generator(-1), **double)).Q
    return (torch.randn(n, WIDE, generator=generator(seed), **double) * POWER_LAW.sqrt()) @ turn


def spectrum(n: int, seed: int) -> Measured:
    x = power_law_rows(n, seed)
    found = F.spectrum_metrics(F.sample_eigenvalues(x))
    names = ("d_pr", "d_entropy", "effective_rank", "k90", "alpha_req")
    norm4 = (x - x.mean(0)).square().sum(-1).square().sum()
    corrected = F.participation_ratio(torch.tensor(n), F.covariance(x), norm4)
    rankme = F.rankme(torch.tensor(n), x.mean(0), F.covariance(x))
    return {name: float(found[name]) for name in names} | {
        "participation_ratio": float(corrected.estimate),
        "rankme": float(rankme),
    }


def spectrum_truth() -> Measured:
    p, s = POWER_LAW / POWER_LAW.sum(), POWER_LAW.sqrt() / POWER_LAW.sqrt().sum()
    d_pr, roots = float(1 / p.square().sum()), float(torch.exp(-(s * s.log()).sum()))
    return {
        "d_pr": d_pr,
        "participation_ratio": d_pr,
        "d_entropy": float(torch.exp(-(p * p.log()).sum())),
        "effective_rank": roots,
        "rankme": roots,
        "k90": float((p.cumsum(0) < 0.9).sum() + 1),
        "alpha_req": 1.0,
    }


def sample(n: int, seed: int) -> Measured:
    """The same rows with an offset of length 2 and one feature ten times as large."""
    x = power_law_rows(n, seed) + 2 / WIDE**0.5
    x[:, 0] *= 10
    found = F.sample_metrics(x)
    return {
        name: float(found[name]) for name in ("cos_sim_mean", "norm_q50", "norm_q95", "top_feature_share")
    }


def ablation(n: int, seed: int) -> Measured:
    """d_pr under each normalisation, of the rows of `sample`."""
    x = power_law_rows(n, seed) + 2 / WIDE**0.5
    x[:, 0] *= 10
    variants = ("raw", "token_l2", "feature_standardized")
    return {v: float(F.spectrum_metrics(F.sample_eigenvalues(F.normalized(x, v)))["d_pr"]) for v in variants}


# -------------------------------------------------------------------------------------------- two sites of 64 features

WIDTH, NOISE = 64, 0.7
SIDE = 1 / torch.arange(1, WIDTH + 1, **double) ** 0.5
TURN = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator(-2), **double)).Q
LEADING = 8


def two_sides(n: int, seed: int, related: bool) -> tuple[Tensor, Tensor]:
    """x Gaussian of 64 features with eigenvalues 1/√i; y = x turned plus noise of 0.7 of x's scale, or the same without x."""
    draw = [
        torch.randn(n, WIDTH, generator=generator(3 * seed + i), **double) * SIDE.sqrt() for i in range(3)
    ]
    x, first = draw[0], draw[0] if related else draw[1]
    return x, (first + NOISE * draw[2]) @ TURN


def novelty(x: Tensor, y: Tensor) -> Tensor:
    """Of the leading eight directions, y turned back: what differs is what the noise has moved."""
    sides = [F.eigen_spectrum(F.covariance(rows), LEADING)[1] for rows in (x, y @ TURN.T)]
    return F.feature_subspace_novelty(*sides)


PAIRS: dict[str, dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "linear_cka": {"linear_cka": F.linear_cka, "linear_cka_debiased": F.linear_cka_debiased},
    "kernels": {"rbf_cka": F.rbf_cka, "distance_correlation": F.distance_correlation},
    "cca": {"cca_mean": F.cca_mean, "cca_r2": F.cca_r2, "svcca": F.svcca, "pwcca_ab": F.pwcca_ab},
    "shapes": {"procrustes": F.procrustes, "soft_matching": F.soft_matching},
    "rsa": {
        "rsa": F.rsa,
        "rsa_euclidean": lambda x, y: F.rsa(x, y, "euclidean"),
    },
    "linear_r2": {"linear_r2_ab": F.linear_r2_ab},
    "neighborhoods": {
        "neighborhood_overlap": lambda x, y: F.neighborhood_overlap(x, y, k=10),
        "jaccard_knn": lambda x, y: F.jaccard_knn(x, y, k=10),
        "cknna": F.cknna,
    },
    "information_imbalance": {"information_imbalance_ab": lambda x, y: F.information_imbalance(x, y)[0]},
    "subspaces": {
        "feature_subspace_novelty": novelty,
        "layer_cosine_sim": lambda x, y: F.layer_cosine_sim(x, y @ TURN.T),
    },
}  # fmt: skip


def pair(family: str, n: int, seed: int, related: bool) -> Measured:
    x, y = two_sides(n, seed, related)
    return {name: float(measure(x, y)) for name, measure in PAIRS[family].items()}


def related_truth() -> Measured:
    """From the population: Cov(x) = diag(s), Cov(y) = (1 + 0.49) Cov(x) turned, Cov(x, y) = Cov(x) turned."""
    kept = 1 / (1 + NOISE**2)
    return {
        "linear_cka": 1 / (1 + NOISE**2),
        "linear_cka_debiased": 1 / (1 + NOISE**2),
        "cca_mean": math.sqrt(kept),
        "cca_r2": kept,
        "pwcca_ab": math.sqrt(kept),
        "linear_r2_ab": kept,
        "procrustes": 2 - 2 * math.sqrt(kept),
        "feature_subspace_novelty": 0.0,
    }


UNRELATED = {
    "linear_cka": 0.0, "linear_cka_debiased": 0.0, "rbf_cka": 0.0, "distance_correlation": 0.0, "cca_mean": 0.0, "cca_r2": 0.0,
    "svcca": 0.0, "pwcca_ab": 0.0, "procrustes": 2.0, "soft_matching": 0.0, "rsa": 0.0, "rsa_euclidean": 0.0,
    "linear_r2_ab": 0.0, "neighborhood_overlap": 0.0, "jaccard_knn": 0.0, "cknna": 0.0, "information_imbalance_ab": 1.0,
    "layer_cosine_sim": 0.0,
}  # fmt: skip


# --------------------------------------------------------------------------------- a manifold of ten dimensions, classes

DIMENSION = 10


def sphere(n: int, seed: int) -> Tensor:
    """Uniform rows of a sphere of 10 dimensions, in 64 features."""
    x = torch.randn(n, DIMENSION + 1, generator=generator(seed), **double)
    return torch.nn.functional.normalize(x, dim=-1) @ TURN[: DIMENSION + 1]


def ratios(n: int, seed: int) -> Measured:
    x = sphere(n, seed)
    by_scale = F.gride(x, range_max=32).estimate
    return {
        "twonn": float(F.twonn(x).estimate),
        "gride (n = 1)": float(by_scale[0]),
        "gride (n = 16)": float(by_scale[-1]),
    }


def local(n: int, seed: int) -> Measured:
    x = sphere(n, seed)
    found = {
        "levina_bickel": F.levina_bickel(x, k=20),
        "mom": F.mom(x, k=20),
        "local_knn": F.local_knn(x),
    }
    if n <= 3200:
        found["tle"] = F.tle(x, k=20)
    return {name: float(one.estimate) for name, one in found.items()}


def linear(n: int, seed: int) -> Measured:
    x = sphere(n, seed)
    found = {
        "local_pca": F.local_pca(x, k=min(50, n // 2)),
        "ca_pca": F.ca_pca(x),
        "global_pca": F.global_pca(x),
    }
    return {name: float(one.estimate) for name, one in found.items()}


CLASSES = 5


def labels(n: int, seed: int) -> Measured:
    """Five overlapping Gaussian classes in 16 features."""
    label = torch.randint(CLASSES, (n,), generator=generator(seed))
    means = torch.randn(CLASSES, 16, generator=generator(-3), **double) * 0.7
    x = means[label] + torch.randn(n, 16, generator=generator(seed + 10**6), **double)
    return {
        "label_overlap (k = 10)": float(F.label_overlap(x, label, k=10)),
        "label_overlap (k = 30)": float(F.label_overlap(x, label, k=30)),
    }


# --------------------------------------------------------------------------------------- probes, concepts, routers

GAP = 2.0


def two_classes(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two Gaussian classes in 64 features of eigenvalues 1/√i, two standard deviations apart along a fixed direction."""
    label = torch.randint(2, (n,), generator=generator(seed))
    apart = torch.randn(WIDTH, generator=generator(-4), **double)
    apart = GAP * apart / apart.norm() * SIDE.sqrt()
    noise = torch.randn(n, WIDTH, generator=generator(seed + 10**6), **double) * SIDE.sqrt()
    return noise + (label[:, None].double() - 0.5) * apart, label


def probes(n: int, seed: int) -> Measured:
    """Accuracy on 4,000 rows that the probe has not seen."""
    (x, label), test = two_classes(n, seed), two_classes(4000, seed + 5 * 10**6)
    made = {
        "ridge": tg.LinearProbe(),
        "lda": tg.LinearProbe(solver="lda"),
        "mean_difference": tg.MeanDifferenceProbe(),
    }
    return {name: float(probe.fit(x, label).score(*test)["accuracy"]) for name, probe in made.items()}


def probe_truth() -> Measured:
    best = 0.5 * (1 + math.erf(GAP / 2 / math.sqrt(2)))  # Φ(GAP/2), of the best linear rule
    return {"ridge": best, "lda": best}


def concepts(n: int, seed: int) -> Measured:
    """|cosine| between a direction found and the population's, of the power law in 384 features."""
    turn = torch.linalg.qr(torch.randn(WIDE, WIDE, generator=generator(-1), **double)).Q
    basis = F.concept_basis(F.covariance(power_law_rows(n, seed)), n=8)["basis"]
    cosine = (turn @ basis).abs()
    return {f"direction {i + 1}": float(cosine[i, i]) for i in (0, 3, 7)}


EXPERTS = 8


def router(n: int, seed: int) -> Measured:
    """Eight experts chosen independently with probabilities proportional to 1/√i."""
    share = 1 / torch.arange(1, EXPERTS + 1, **double) ** 0.5
    chosen = torch.multinomial(share, n, replacement=True, generator=generator(seed))
    found = F.router_load(torch.bincount(chosen, minlength=EXPERTS))
    return {name: float(found[name]) for name in ("router_entropy_norm", "load_imbalance", "top_expert_load")}


def router_truth() -> Measured:
    share = 1 / torch.arange(1, EXPERTS + 1, **double) ** 0.5
    share = share / share.sum()
    entropy = float(-(share * share.log()).sum())
    return {
        "router_entropy_norm": entropy / math.log(EXPERTS),
        "load_imbalance": float(share.max()) * EXPERTS,
        "top_expert_load": float(share.max()),
    }


# ------------------------------------------------------------------------------------------------------------- lenses

TOKENS, SOME, VOCABULARY = 32, 6, 200


@cache
def small_model() -> Any:
    """GPT-2 of four layers, width 48, random weights large enough that its words differ."""
    settings = dict(n_layer=4, n_embd=48, n_head=4, vocab_size=VOCABULARY, n_positions=TOKENS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(**settings, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
        return GPT2LMHeadModel(config).eval()


def lens_means(n: int, seed: int) -> Measured:
    """Means over the tokens of n/32 documents, each of which repeats six words of its own."""
    draw = generator(seed)
    own = torch.randint(1, VOCABULARY, (n // TOKENS, SOME), generator=draw)
    ids = own.gather(1, torch.randint(SOME, (n // TOKENS, TOKENS), generator=draw))
    found = tg.logit_lens(small_model(), {"input_ids": ids}, outputs=["entropy", "kl"])
    sites = [f"residual_output.{layer}" for layer in (0, 2)]
    return {
        f"{name}, layer {site[-1]}": float(found["lens", site, name].double().mean())
        for name in ("entropy", "kl")
        for site in sites
    }


# ---------------------------------------------------------------------------------------------------------- the curves

POWERS = [2**i for i in range(6, 15)]
FEWER = POWERS[:7]
Experiment = tuple[Callable[[int, int], Measured], list[int], Measured]


def experiments() -> dict[str, Experiment]:
    """Curve -> what measures it, at which numbers of rows, and the exact truths."""
    found: dict[str, Experiment] = {
        "spectrum": (spectrum, POWERS, spectrum_truth()),
        "sample": (sample, POWERS, {}),
        "ablation": (ablation, POWERS, {}),
        "ratios": (
            ratios,
            POWERS[1:8],
            {name: 10.0 for name in ("twonn", "gride (n = 1)", "gride (n = 16)")},
        ),
        "local": (local, POWERS[1:8], {name: 10.0 for name in ("levina_bickel", "mom", "tle", "local_knn")}),
        "linear": (linear, POWERS[1:7], {"local_pca": 10.0, "ca_pca": 10.0, "global_pca": 11.0}),
        "labels": (labels, FEWER, {}),
        "probes": (probes, POWERS[:8], probe_truth()),
        "concepts": (concepts, POWERS, {f"direction {i}": 1.0 for i in (1, 4, 8)}),
        "router": (router, POWERS, router_truth()),
        "lenses": (lens_means, POWERS[:8], {}),
    }
    for family in PAIRS:
        for related in (True, False):
            if family != "subspaces" or related:
                truth = related_truth() if related else UNRELATED
                found[f"{family}, {'related' if related else 'unrelated'}"] = (
                    lambda n, seed, family=family, related=related: pair(family, n, seed, related),
                    FEWER,
                    truth,
                )
    return found


def curve(name: str, sets: int = SETS, rows: list[int] | None = None) -> dict[str, Any]:
    """One curve: measure -> mean and quantiles at every number of rows, and the truth."""
    measure, numbers, exact = experiments()[name]
    found: dict[str, list[list[float]]] = {}
    for n in numbers if rows is None else rows:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = [measure(n, seed) for seed in range(sets)]
        for key in values[0]:
            held = torch.tensor([one[key] for one in values], **double)
            parts = (held.mean(), held.quantile(0.1), held.quantile(0.9))
            found.setdefault(key, []).append([n, *(float(f"{float(part):.4g}") for part in parts)])
    return {
        key: {"exact": key in exact, "truth": float(f"{exact.get(key, points[-1][1]):.5g}"), "points": points}
        for key, points in found.items()
    }


# ------------------------------------------------------------------------------------------- pictures: MiniLM's layers

LAYER_ROWS = 2000


def layer_rows() -> tuple[list[str], Tensor]:
    """Sites of all-MiniLM-L6-v2 and (sites, 2000, 384) tokens of the demo's text there."""
    model, tokenizer = tg.demo.demo_model()
    loader = tg.text.TextBatches(tg.demo.demo_texts()[:200], tokenizer, batch_size=8, max_length=128)
    capture = tg.Capture(model, sites=["embed", "residual_output"])
    tokens = TensorDictSequential(
        capture, tg.SelectTokens(capture.sites), tg.RowSample(capture.sites, size=LAYER_ROWS)
    )
    found = tg.run(tokens, loader, progress=False)
    rows = torch.stack([found["sample", site].double() for site in capture.sites])
    return list(capture.sites), rows


def pictures() -> dict[str, Any]:
    """Over MiniLM's layers: lines of what one site has, tables of what two have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sites, rows = layer_rows()
        fewer = rows[:, :500]
        one = [F.spectrum_metrics(F.sample_eigenvalues(x)) for x in rows]
        own = [F.sample_metrics(x) for x in rows]
        variants = ("raw", "token_l2", "feature_standardized", "remove_top_pc")
        dimension = {
            "twonn": F.twonn, "gride (n = 16)": lambda x: last(F.gride(x, range_max=32)),
            "levina_bickel": lambda x: F.levina_bickel(x, k=20), "mom": lambda x: F.mom(x, k=20), "local_knn": F.local_knn,
            "local_pca": lambda x: F.local_pca(x, k=50), "ca_pca": F.ca_pca, "global_pca": F.global_pca,
        }  # fmt: skip
        lines = {
            **{
                name: [float(s[name]) for s in one] for name in ("d_pr", "d_entropy", "effective_rank", "k90")
            },
            **{
                name: [float(s[name]) for s in own]
                for name in ("cos_sim_mean", "norm_q50", "top_feature_share")
            },
            **{
                f"d_pr, {v}": [
                    float(F.spectrum_metrics(F.sample_eigenvalues(F.normalized(x, v)))["d_pr"]) for x in rows
                ]
                for v in variants
            },
            **{name: [float(estimate(x).estimate) for x in rows] for name, estimate in dimension.items()},
        }
        concepts_of = [F.concept_basis(F.covariance(x), n=10)["explained_variance"] for x in rows]
        lines["first concept"] = [float(v[0]) for v in concepts_of]
        lines["first ten concepts"] = [float(v.sum()) for v in concepts_of]
        tables = {
            name: [[float(f"{float(measure(x, y)):.4g}") for y in fewer] for x in fewer]
            for family in PAIRS
            for name, measure in PAIRS[family].items()
            if name not in ("rsa_euclidean", "soft_matching", "feature_subspace_novelty", "layer_cosine_sim")
        }
        bases = [F.eigen_spectrum(F.covariance(x), 32)[1] for x in rows]
        tables["feature_subspace_novelty"] = [
            [float(f"{float(F.feature_subspace_novelty(u, v)):.4g}") for v in bases] for u in bases
        ]
        tables["layer_cosine_sim"] = [
            [float(f"{float(F.layer_cosine_sim(x, y)):.4g}") for y in fewer] for x in fewer
        ]
    rounded = {name: [float(f"{value:.4g}") for value in values] for name, values in lines.items()}
    return {"sites": sites, "lines": rounded, "tables": tables}


def last(found: Any) -> Any:
    """The estimate at the widest scale."""
    return found._replace(estimate=found.estimate[-1])


def main() -> None:
    """Measure what is asked for, and keep the rest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="one curve, or 'pictures'")
    only = parser.parse_args().only
    result = json.loads(RESULT.read_text("utf-8")) if RESULT.exists() else {"rows": {}, "layers": {}}
    for name in experiments():
        if only in (None, name):
            result["rows"][name] = curve(name)
            print(name, flush=True)
    if only in (None, "pictures"):
        result["layers"] = pictures()
    text = json.dumps(result, ensure_ascii=False, indent=0)
    RESULT.write_text(text.replace(",\n", ", ").replace("}, ", "},\n"), encoding="utf-8")


if __name__ == "__main__":
    main()
