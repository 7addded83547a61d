"""Intervals of spectra where rows are few for the features: how often they hold the truth, by what is known of their bias.

    python tests/benchmarks/biased_intervals.py   # the table of docs/errors.md, three minutes of one core

Data sets of normal rows whose covariance is known (``SHAPES``), D = 20, 100 and 300, 40 to 2,000 documents, of one token or
of four that correlate by 0.7; 24 sets each, 12 of D = 300. "neither" puts the interval about the value less its jackknife
bias whatever that is; "both" is ``error_interval(bias=)``.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterator

import torch
from tensordict import TensorDict
from torch import Tensor

import tdgeom as tg
from tdgeom import functional as F
from tdgeom.measures.jackknife import scale_of
from tdgeom.measures.spectrum_errors import replicate_spectrum_metrics

NAMES = ("d_pr", "d_entropy", "effective_rank", "k90", "stable_rank")
SHAPES = {
    "equal": torch.ones_like,
    "four large among equal ones": lambda i: torch.where(i <= 4, 20.0, 1.0),
    "1/i": lambda i: 1 / i,
    "1/i^2": lambda i: i**-2,
    "exp(-i/10)": lambda i: torch.exp(-i / 10),
}


def data_sets() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows, their ids, and the eigenvalues of the population."""
    for width in (20, 100, 300):
        for documents in (40, 80, 200, 600, 2000):
            for tokens in (1,) if documents > 600 else (1, 4):
                for shape in SHAPES.values():
                    values = shape(torch.arange(1.0, width + 1, dtype=torch.float64)).double()
                    for seed in range(24 if width < 300 else 12):
                        generator = torch.Generator().manual_seed(1000 * seed + width + documents)
                        own = torch.randn(documents, width, generator=generator, dtype=torch.float64)
                        rows = own.repeat_interleave(tokens, 0)
                        if tokens > 1:
                            noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
                            rows = math.sqrt(0.7) * rows + math.sqrt(0.3) * noise
                        index = torch.arange(documents * tokens)
                        yield rows * values.sqrt(), (index // tokens) << 20 | index % tokens, values


def main() -> None:
    """Print the table."""
    held: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for rows, ids, values in data_sets():
        truths = replicate_spectrum_metrics(values)
        td = TensorDict(tokens=rows, row_id=ids)
        for stage in (tg.GroupedCovariance(), tg.LeaveOutSpectrum(k=4), tg.SpectrumErrors(parts=True)):
            td = stage(td)
        degrees = int((td["replicates", "rows"] > 0).sum()) - 1
        plain = replicate_spectrum_metrics(td["eigenvalues"])
        for name in NAMES:
            value, error, bias = plain[name], td["spectrum", f"{name}_se"], td["spectrum_bias", name]
            scale = scale_of(name)
            for rule, (low, high) in {
                "neither": F.error_interval(value - bias, error, degrees, scale=scale),
                "both": F.error_interval(value, error, degrees, scale=scale, bias=bias),
            }.items():
                if bool(low.isfinite()):
                    held[name, rule].append(bool((low <= truths[name]) & (truths[name] <= high)))
    print("| | neither rule | both | given |\n|---|---|---|---|")
    for name in NAMES:
        neither, both = held[name, "neither"], held[name, "both"]
        shares = [100 * sum(one) / len(one) for one in (neither, both)]
        print(
            f"| `{name}` | {shares[0]:.1f} % | {shares[1]:.1f} % | {100 * len(both) / len(neither):.0f} % |"
        )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
