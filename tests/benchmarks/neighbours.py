"""Neighbour-based measures beside DADApy 0.3.4, scikit-dimension 0.5.0 and tdhook 0.3.0, in one run.

DADApy needs numpy<2 and so an environment of its own; the other two share one. Each tool works in a process of its own
that is started once; the tools take turns, several rounds, on the same rows. Tables give median seconds and the median of
each round's ratio, and what each tool answered.

    python -m venv .venv-dadapy && .venv-dadapy/bin/pip install "dadapy==0.3.4" "numpy<2"
    python -m venv .venv-peers && .venv-peers/bin/pip install scikit-dimension==0.5.0 tdhook==0.3.0
    python tests/benchmarks/neighbours.py --dadapy-python .venv-dadapy/bin/python --peers-python .venv-peers/bin/python
    python tests/benchmarks/neighbours.py --only growth                  # time and memory against N, ours alone
    python tests/benchmarks/neighbours.py --only growth --rows 90000     # the size of the paper
    python tests/benchmarks/neighbours.py --only gpu                     # TwoNN at N = 20,000 on an accelerator
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

WIDTH = 768


def rows_like_activations(n: int, width: int, seed: int) -> np.ndarray:
    """Rows on a curved manifold of dimension 12 in ``width`` features, with noise: float32."""
    generator = np.random.default_rng(seed)
    shape = np.random.default_rng(0)  # one manifold, whatever the rows
    latent = generator.standard_normal((n, 12))
    rows = np.tanh(latent @ shape.standard_normal((12, width)) / 3) + 0.02 * generator.standard_normal(
        (n, width)
    )
    return rows.astype(np.float32)


# --- what each tool does; called in a process of its own


def tdgeom_twonn(x: np.ndarray, _: np.ndarray) -> list[float]:
    """Ours, from raw rows to the estimate."""
    import torch

    from tdgeom.measures.dimension.twonn import twonn

    return [float(twonn(torch.from_numpy(x)).estimate)]


def dadapy_twonn(x: np.ndarray, _: np.ndarray) -> list[float]:
    """DADApy, asked for no more neighbours than it needs."""
    from dadapy import Data

    return [float(Data(coordinates=x, maxk=2).compute_id_2NN()[0])]


def skdim_twonn(x: np.ndarray, _: np.ndarray) -> list[float]:
    """scikit-dimension with its defaults."""
    import skdim

    return [float(skdim.id.TwoNN().fit(x).dimension_)]


def tdhook_twonn(x: np.ndarray, _: np.ndarray) -> list[float]:
    """tdhook's TwoNN, which discards the last point only."""
    import torch
    from tdhook.latent.dimension_estimation import TwoNnDimensionEstimator
    from tensordict import TensorDict

    return [float(TwoNnDimensionEstimator()(TensorDict({"data": torch.from_numpy(x)}, []))["dimension"])]


def tdgeom_imbalance(x: np.ndarray, y: np.ndarray) -> list[float]:
    """Ours, both directions, all ranks."""
    import torch

    from tdgeom.measures.neighbors.information_imbalance import information_imbalance

    return [float(value) for value in information_imbalance(torch.from_numpy(x), torch.from_numpy(y))]


def dadapy_imbalance(x: np.ndarray, y: np.ndarray) -> list[float]:
    """DADApy, both directions, one subset of all rows."""
    from dadapy.metric_comparisons import MetricComparisons

    both = MetricComparisons(coordinates=x, maxk=len(x) - 1).return_information_imbalace(
        y, subset_size=len(x)
    )
    return [float(value[0]) for value in both]


def tdgeom_overlaps(x: np.ndarray, _: np.ndarray) -> list[float]:
    """Ours: the matrix of overlaps between 12 layers (66 pairs), rotations and noise of one another."""
    import torch
    from tensordict import TensorDict

    from tdgeom import ForEachPair
    from tdgeom.measures.neighbors.neighborhood_overlap import NeighborhoodOverlap

    generator = torch.Generator().manual_seed(0)
    rows = torch.from_numpy(x)
    sites = [f"residual_output.{i}" for i in range(12)]
    layers = {
        site: rows + 0.05 * i * torch.randn(rows.shape, generator=generator) for i, site in enumerate(sites)
    }
    td = ForEachPair(NeighborhoodOverlap(k=30), sites, pairs="all")(TensorDict({"sample": layers}))
    return [float(td["between", f"{sites[0]}->{sites[11]}", "neighborhood_overlap"])]


def tdgeom_search(x: np.ndarray, _: np.ndarray) -> list[float]:
    """Ours: one search for 30 neighbours."""
    import torch

    from tdgeom.measures.neighbors.nearest_neighbors import nearest_neighbors

    return [float(nearest_neighbors(torch.from_numpy(x), 30).distance.mean())]


def matrix_product(x: np.ndarray, _: np.ndarray) -> list[float]:
    """The fastest float32 product of torch here: half of all rows with all rows, as one search needs."""
    import torch

    rows = torch.from_numpy(x)
    block = min(len(x), 4096)
    left, right = rows[:block], rows[-block:].T.contiguous()
    out = torch.empty(block, block)
    repeats = max(1, round(len(x) ** 2 / 2 / block**2))
    for _ in range(repeats):
        torch.mm(left, right, out=out)
    return [2.0 * repeats * block**2 * x.shape[1]]


TASKS: dict[str, Callable[[np.ndarray, np.ndarray], list[float]]] = {
    function.__name__: function
    for function in (
        tdgeom_twonn,
        dadapy_twonn,
        skdim_twonn,
        tdhook_twonn,
        tdgeom_imbalance,
        dadapy_imbalance,
        tdgeom_overlaps,
        tdgeom_search,
        matrix_product,
    )
}


# --- the workers


def serve() -> None:
    """Answer tasks, one JSON object a line: what was answered, seconds, and the peak beyond what was there before."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # tools print
    for line in sys.stdin:
        task = json.loads(line)
        x, y = np.load(task["x"]), np.load(task["y"])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begin = time.perf_counter()
        value = TASKS[task["name"]](x, y)
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        reply = {"value": value, "seconds": seconds, "mib": (peak - before) / 1024}
        print(json.dumps(reply), file=answers, flush=True)


class Worker:
    """A tool's process."""

    def __init__(self, python: str) -> None:
        self.process = subprocess.Popen(
            [python, "-W", "ignore", __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, name: str, data: tuple[Path, Path]) -> dict[str, Any]:
        """One task."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"name": name, "x": str(data[0]), "y": str(data[1])}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{name}: the worker ended with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def save(folder: Path, n: int, width: int = WIDTH) -> tuple[Path, Path]:
    """Two sets of n rows; the second tells part of the first."""
    paths = folder / f"x{n}.npy", folder / f"y{n}.npy"
    if not paths[0].exists():
        x = rows_like_activations(n, width, 1)
        np.save(paths[0], x)
        noise = np.random.default_rng(2).standard_normal(x.shape, dtype=np.float32)
        np.save(paths[1], np.tanh(x + 0.3 * noise))
    return paths


def beside(
    title: str,
    contestants: dict[str, tuple[str, str]],
    data: tuple[Path, Path],
    small: tuple[Path, Path],
    rounds: int,
) -> None:
    """Print a table of tools that take turns; the first is ours. ``contestants``: name -> (python, task)."""
    workers = {name: Worker(python) for name, (python, _) in contestants.items()}
    for name, worker in workers.items():
        worker.run(contestants[name][1], small)  # imports and compilation
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, worker in workers.items():
            found[name].append(worker.run(contestants[name][1], data))
    for worker in workers.values():
        worker.close()
    # Peaks from processes that did nothing else but import and this once.
    peaks = {}
    for name, (python, task) in contestants.items():
        worker = Worker(python)
        worker.run(task, small)
        peaks[name] = worker.run(task, data)["mib"]
        worker.close()
    first = next(iter(contestants))
    ours = [entry["seconds"] for entry in found[first]]
    print(f"\n### {title}, {rounds} rounds\n")
    print("| | seconds (median) | min - max | x ours | peak MiB beyond start and rows | answer |")
    print("|---|---|---|---|---|---|")
    for name, entries in found.items():
        times = [entry["seconds"] for entry in entries]
        ratio = statistics.median(a / b for a, b in zip(times, ours))
        answer = ", ".join(f"{value:.6g}" for value in entries[0]["value"])
        span = f"{min(times):.2f} - {max(times):.2f}"
        print(
            f"| {name} | {statistics.median(times):.2f} | {span} | {ratio:.1f} | {peaks[name]:.0f} | {answer} |"
        )


def twonn_table(options: argparse.Namespace, folder: Path) -> None:
    """TwoNN from raw rows."""
    contestants = {"tdgeom": (sys.executable, "tdgeom_twonn")}
    if options.dadapy_python:
        contestants["DADApy"] = (options.dadapy_python, "dadapy_twonn")
    if options.peers_python:
        contestants["scikit-dimension"] = (options.peers_python, "skdim_twonn")
        contestants["tdhook (discards the last point only)"] = (options.peers_python, "tdhook_twonn")
    n = options.rows[0] if options.rows else 10_000
    title = f"TwoNN from raw rows, N = {n:,}, D = {WIDTH}"
    beside(title, contestants, save(folder, n), save(folder, 1000), options.rounds)


def imbalance_table(options: argparse.Namespace, folder: Path) -> None:
    """Information imbalance over all ranks."""
    contestants = {"tdgeom": (sys.executable, "tdgeom_imbalance")}
    if options.dadapy_python:
        contestants["DADApy"] = (options.dadapy_python, "dadapy_imbalance")
    n = options.rows[0] if options.rows else 10_000
    title = f"Information imbalance, both directions, all ranks, N = {n:,}, D = {WIDTH}"
    beside(title, contestants, save(folder, n), save(folder, 1000), options.rounds)


def overlap_table(options: argparse.Namespace, folder: Path) -> None:
    """66 pairs of 12 layers beside one search."""
    n = options.rows[0] if options.rows else 4_000
    contestants = {
        "one search for 30 neighbours": (sys.executable, "tdgeom_search"),
        "12 x 12 overlaps (66 pairs)": (sys.executable, "tdgeom_overlaps"),
    }
    beside(
        f"Overlap matrix, N = {n:,}, D = {WIDTH}",
        contestants,
        save(folder, n),
        save(folder, 1000),
        options.rounds,
    )


def peak_table(options: argparse.Namespace, folder: Path) -> None:
    """The share of the machine's matrix-product peak that TwoNN reaches: half the products are needed."""
    n = options.rows[0] if options.rows else 10_000
    data, small = save(folder, n), save(folder, 1000)
    worker = Worker(sys.executable)
    for name in ("tdgeom_twonn", "matrix_product"):
        worker.run(name, small)
    shares, rates = [], []
    for _ in range(options.rounds):
        product, ours = worker.run("matrix_product", data), worker.run("tdgeom_twonn", data)
        rate = product["value"][0] / product["seconds"]
        rates.append(rate / 1e9)
        shares.append(n * n * WIDTH / ours["seconds"] / rate)
    worker.close()
    print(f"\n### Share of the matrix-product peak, TwoNN, N = {n:,}, D = {WIDTH}, {options.rounds} rounds\n")
    print("| torch.mm, GFLOP/s (median) | share reached (median) | min - max |")
    print("|---|---|---|")
    span = f"{min(shares):.0%} - {max(shares):.0%}"
    print(f"| {statistics.median(rates):.0f} | {statistics.median(shares):.0%} | {span} |")


def growth_table(options: argparse.Namespace, folder: Path) -> None:
    """Time and memory of TwoNN against N, a fresh process each."""
    print(f"\n### Growth with N, TwoNN, D = {WIDTH}\n")
    print(
        "| N | seconds | ns per pair | peak MiB beyond start and rows | the rows themselves, MiB | dimension |"
    )
    print("|---|---|---|---|---|---|")
    for n in options.rows or (2_000, 5_000, 10_000, 20_000, 50_000):
        worker = Worker(sys.executable)
        worker.run("tdgeom_twonn", save(folder, 1000))
        entry = worker.run("tdgeom_twonn", save(folder, n))
        worker.close()
        pair = entry["seconds"] / n**2 * 2e9
        size = n * WIDTH * 4 / 2**20
        print(
            f"| {n:,} | {entry['seconds']:.2f} | {pair:.1f} | {entry['mib']:.0f} | {size:.0f} | {entry['value'][0]:.3f} |",
            flush=True,
        )


def gpu_table(options: argparse.Namespace, folder: Path) -> None:
    """TwoNN on an accelerator, rows already there."""
    import torch

    from tdgeom.measures.dimension.twonn import twonn

    if not torch.cuda.is_available():
        print("no accelerator here")
        return
    n = options.rows[0] if options.rows else 20_000
    x = torch.from_numpy(rows_like_activations(n, WIDTH, 1)).cuda()
    times = []
    for _ in range(3 + options.rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        estimate = float(twonn(x).estimate)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    median = statistics.median(times[3:])
    print(f"\n### TwoNN on {torch.cuda.get_device_name()}, N = {n:,}, D = {WIDTH}\n")
    print(f"{median:.1f} ms (median of {options.rounds}), dimension {estimate:.3f}")


TABLES: dict[str, Callable[[argparse.Namespace, Path], None]] = {
    "twonn": twonn_table,
    "imbalance": imbalance_table,
    "overlap": overlap_table,
    "peak": peak_table,
    "growth": growth_table,
    "gpu": gpu_table,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dadapy-python", help="interpreter of an environment with dadapy 0.3.4")
    parser.add_argument(
        "--peers-python", help="interpreter of an environment with scikit-dimension and tdhook"
    )
    parser.add_argument(
        "--only", choices=list(TABLES), action="append", help="tables to make (default: all but gpu)"
    )
    parser.add_argument(
        "--rows", type=int, action="append", help="N instead of the default (growth takes several)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve()
        return
    import os

    import torch

    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only or [name for name in TABLES if name != "gpu"]:
            TABLES[name](options, Path(folder))


if __name__ == "__main__":
    main()
