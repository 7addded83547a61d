"""How often ``ChangeAlarms`` cries wolf: stationary runs of many kinds, and how soon it sees a change.

    python tests/benchmarks/alarms.py [runs]

Prints Markdown tables; docs/howto/alarms.md holds the last ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch

import tdgeom as tg
from tdgeom.measures.eigen_spectrum import covariance_eigenvalues

UPDATES = 1000
NOISES: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "Gaussian": lambda rng, shape: rng.standard_normal(shape),
    "t with 4 degrees of freedom": lambda rng, shape: rng.standard_t(4, shape),
    "log-normal (σ = 0.7)": lambda rng, shape: np.exp(0.7 * rng.standard_normal(shape)),
}
PHIS = (0, 0.5, 0.9, 0.99, 1)
ANY = tg.AlarmRule("any", falls=False, scale="linear", least=1e-9)


def autoregressive(noise: str, phi: float, runs: int, updates: int, seed: int = 0) -> np.ndarray:
    """(runs, updates) of x_t = φ·x_{t-1} + e_t, begun 1,000 updates before (φ < 1)."""
    rng = np.random.default_rng(seed)
    before = 0 if phi == 1 else 1000
    e = NOISES[noise](rng, (runs, before + updates))
    x = np.zeros_like(e)
    for t in range(1, e.shape[1]):
        x[:, t] = phi * x[:, t - 1] + e[:, t]
    return x[:, before:]


def alarmed(series: np.ndarray, **settings) -> int:
    """Of (runs, updates), in how many runs there is any alarm."""
    found = 0
    for run in series:
        alarms = tg.ChangeAlarms(**settings)
        found += any(alarms.update(step, {"x": value}) for step, value in enumerate(run))
    return found


def correlated_batches(
    runs: int, updates: int, seed: int = 0, rows: int = 64, d: int = 16
) -> dict[str, np.ndarray]:
    """Metrics (runs, updates) of batches whose features' scales, and whose rows within a batch, depend on one another."""
    generator = torch.Generator().manual_seed(seed)
    scale = 0.3 * torch.randn(runs, 1, d, generator=generator)
    found: dict[str, list[np.ndarray]] = {
        "d_pr": [],
        "effective_rank": [],
        "top1_share": [],
        "stable_rank": [],
    }
    for _ in range(updates):
        scale = 0.9 * scale + 0.3 * 0.19**0.5 * torch.randn(runs, 1, d, generator=generator)
        shared = torch.randn(runs, rows // 8, 1, d, generator=generator).expand(-1, -1, 8, -1).flatten(1, 2)
        x = (shared + torch.randn(runs, rows, d, generator=generator)) * scale.exp()
        values = covariance_eigenvalues(tg.functional.covariance(x))
        metrics = tg.functional.spectrum_metrics(values)
        for name, one in found.items():
            one.append(metrics[name].numpy())
    return {name: np.stack(one, 1) for name, one in found.items()}


def alarmed_by_batches(metrics: dict[str, np.ndarray], **settings) -> int:
    """In how many runs of ``correlated_batches`` there is any alarm, of any metric."""
    runs, updates = next(iter(metrics.values())).shape
    found = 0
    for run in range(runs):
        alarms = tg.ChangeAlarms(**settings)
        found += any(
            alarms.update(step, {name: values[run, step] for name, values in metrics.items()})
            for step in range(updates)
        )
    return found


def main(runs: int) -> None:
    print(
        f"| {runs} stationary runs of {UPDATES:,} updates | "
        + " | ".join(f"φ = {phi}" for phi in PHIS)
        + " |"
    )
    print("|---" * (1 + len(PHIS)) + "|")
    for noise in NOISES:
        counts = [alarmed(autoregressive(noise, phi, runs, UPDATES), rules={"x": ANY}) for phi in PHIS]
        print(f"| {noise} | " + " | ".join(f"{100 * count / runs:.1f} %" for count in counts) + " |")
    batches = correlated_batches(runs, 500)
    tight = {name: tg.AlarmRule("any", least=1e-9) for name in batches}
    usual, all_counts = (
        alarmed_by_batches(batches, horizon=500, **rules) for rules in ({}, {"rules": tight})
    )
    print(
        f"\ncorrelated batches, 4 metrics, 500 updates: {usual} of {runs} runs, {all_counts} without least=\n"
    )
    print(
        "| fall of d_pr, of noise 3 % a step (φ = 0.5) | seen in | updates after it (median) |\n|---|---|---|"
    )
    noise = 0.03 * autoregressive("Gaussian", 0.5, runs, 200) * 0.75**0.5
    for ratio in (0.85, 0.7, 0.5, 0.1):
        late = []
        for run in noise:
            alarms = tg.ChangeAlarms()
            values = 40 * np.exp(run) * np.where(np.arange(200) < 150, 1, ratio)
            steps = [step for step, value in enumerate(values) if alarms.update(step, {"d_pr": value})]
            late += [step - 149 for step in steps if step >= 150][:1]
        print(f"| to {ratio:.0%} | {len(late)} of {runs} | {np.median(late) if late else float('nan'):.0f} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
