"""Every estimator of intrinsic dimension on spheres of known dimension: the table of docs/measures/dimension.md.

    python -m tests.benchmarks.dimension_table

A cell is the mean of three data sets: uniform rows of a sphere of d dimensions, turned arbitrarily into 64 features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tdgeom import functional as F

ESTIMATORS = {
    "`twonn`": lambda x: F.twonn(x)[0],
    "`gride`, n = 16": lambda x: F.gride(x, range_max=32)[0][..., -1],
    "`levina_bickel`, k = 20": lambda x: F.levina_bickel(x, k=20)[0],
    "`mom`, k = 20": lambda x: F.mom(x, k=20)[0],
    "`tle`, k = 20": lambda x: F.tle(x, k=20)[0],
    "`local_pca`, k = 100": lambda x: F.local_pca(x, k=100)[0],
    "`ca_pca`, k = 100": lambda x: F.ca_pca(x, k=100)[0],
}
DIMENSIONS = (2, 5, 10, 20, 30)
ROWS = (1000, 3000)


def sphere(n: int, d: int, seed: int) -> Tensor:
    """Uniform rows of a sphere of ``d`` dimensions, in 64 features."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d + 1, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(64, d + 1, generator=generator, dtype=torch.float64))[0]
    return x / x.norm(dim=1, keepdim=True) @ turn.T


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("| estimator | rows | " + " | ".join(f"d = {d}" for d in DIMENSIONS) + " |")
    print("|---|---|" + "---|" * len(DIMENSIONS))
    for name, estimate in ESTIMATORS.items():
        for n in ROWS:
            cells = []
            for d in DIMENSIONS:
                found = [float(torch.as_tensor(estimate(sphere(n, d, seed)))) for seed in range(3)]
                cells.append(f"{sum(found) / len(found):.1f}")
            print(f"| {name} | {n:,} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
