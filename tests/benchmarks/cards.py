"""How far a geometry card's landmarks are off all rows: CKA and Procrustes of n rows, in 8 bits too, against 40,000.

    python tests/benchmarks/cards.py [rows]

Prints a Markdown table; docs/howto/geometry_cards.md holds the last one.
"""

from __future__ import annotations

import sys

import torch

import tdgeom as tg
from tdgeom.training.geometry_card import _packed, _unpacked

SHAPES = ((256, 1.0), (256, 2.0), (1024, 1.0))  # features, exponent of the spectrum


def two_sites(rows: int, d: int, exponent: float) -> list[torch.Tensor]:
    """Rows of two sites with spectra λ ~ i^-exponent; the second is a bent mixture of the first."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    z, mixture = normal(rows, 256), normal(256, 256) / 16
    scale = torch.arange(1, 257, dtype=torch.float64) ** (-exponent / 2)
    return [
        (hidden * scale) @ normal(256, d) / 16 + 0.02 * normal(rows, d)
        for hidden in (z, torch.tanh(z @ mixture) + 0.5 * z)
    ]


def main(rows: int) -> None:
    print(
        "| features, λ ~ | CKA, Procrustes | landmarks | CKA off | Procrustes off | in 8 bits |\n|---|---|---|---|---|---|"
    )
    measures = (tg.functional.linear_cka_debiased, tg.functional.procrustes)
    for d, exponent in SHAPES:
        sites = two_sites(rows, d, exponent)
        full = [float(measure(*sites)) for measure in measures]
        for n in (256, 1024, 4096):
            off = torch.zeros(4)
            for first in range(0, min(rows, 6 * 4096) - n + 1, 4096):
                sample = [site[first : first + n] for site in sites]
                coarse = [_unpacked(_packed(one.float(), 1)).double() for one in sample]
                found = [
                    float(measure(*one)) - value
                    for one in (sample, coarse)
                    for measure, value in zip(measures, full)
                ]
                off = torch.maximum(off, torch.tensor(found).abs())
            cells = f"{off[0]:.3f} | {off[1]:.3f} | {off[2]:.3f}, {off[3]:.3f}"
            print(f"| {d}, i^-{exponent:g} | {full[0]:.2f}, {full[1]:.2f} | {n:,} | {cells} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40_000)
