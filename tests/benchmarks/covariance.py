"""One update of ``StreamingCovariance`` beside the bare product ``x.T @ x`` in float32, in one run.

They take turns on the same rows; the table gives the least and the median of each, and their ratio to the bare product's. The
last column is the product alone, of rows centred before, in the precision of its line.

    python tests/benchmarks/covariance.py
    python tests/benchmarks/covariance.py --widths 768 --rows 4096 --rounds 50
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from tensordict import TensorDict

import tdgeom as tg
from tdgeom.numerics.products import add_upper, factors


def contestants(rows: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by name: the bare product first."""
    td = TensorDict({"tokens": rows})
    timed: dict[str, Callable[[], object]] = {"float32 x.T @ x": lambda: rows.T @ rows}
    for precision in ("float64", "float32"):
        stage = tg.StreamingCovariance(precision=precision)
        stage.update(td)
        timed[f"update, {precision}"] = lambda stage=stage: stage.update(td)
        y = factors(rows.double() - rows.double().mean(0), getattr(torch, precision))
        total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        timed[f"product, {precision}"] = lambda total=total, y=y: add_upper(total, y)
    return timed


def taken(timed: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(rounds + 1):
        for name, work in timed.items():
            start = time.perf_counter()
            work()
            if turn:  # the first is the warm-up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Print a table for every width and number of threads."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 4096])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    print(
        f"PyTorch {torch.__version__}, {platform.machine()}, {given.rows} rows, {given.rounds} rounds in turn\n"
    )
    print("| D | threads | | least | ratio | median | ratio |\n|---|---|---|---|---|---|---|")
    for width in given.widths:
        for threads in given.threads:
            torch.set_num_threads(threads)
            timed = contestants(torch.randn(given.rows, width) + 0.3)
            seconds = taken(timed, given.rounds if width < 2048 else max(3, given.rounds // 4))
            least, middle = ({name: f(of) for name, of in seconds.items()} for f in (min, statistics.median))
            bare = next(iter(timed))
            for name in timed:
                print(
                    f"| {width:,} | {threads} | {name} | {1e3 * least[name]:.1f} ms | {least[name] / least[bare]:.2f} | "
                    f"{1e3 * middle[name]:.1f} ms | {middle[name] / middle[bare]:.2f} |"
                )


if __name__ == "__main__":
    main()
