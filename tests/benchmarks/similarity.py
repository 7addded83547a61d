"""Similarity between 12 sites beside pytorch-cka 1.1.3 (minibatch CKA) and tdhook 0.3.0 (its pairwise stage), in one run.

Each tool works in a process of its own that is started once; the tools take turns, several rounds, on the same rows.
Tables give median seconds, the median of each round's ratio, and how far the answers are from the exact ones, which a
float64 computation over all rows gives. The matrix products alone, in float32, stand beside as the machine's limit.

    python -m venv .venv-peers && .venv-peers/bin/pip install pytorch-cka==1.1.3 tdhook==0.3.0
    python tests/benchmarks/similarity.py --peers-python .venv-peers/bin/python
    python tests/benchmarks/similarity.py --only sketch     # StreamingSketch beside frequent directions, ours alone
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SITES, WIDTH = 12, 768
NAMES = [f"residual_output.{i}" for i in range(SITES)]
PAIRS = [(i, j) for i in range(SITES) for j in range(i + 1, SITES)]
Rows = torch.Tensor  # (SITES, N, WIDTH)


def layers_like_activations(n: int) -> Rows:
    """Sites that drift from one to the next, with a spectrum like 1/i, a mean and one large feature: float32."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.arange(1, WIDTH + 1).float() ** -0.5
    site, found = torch.randn(n, WIDTH, generator=generator) * scales, []
    for _ in range(SITES):
        turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]
        site = 0.8 * site + 0.6 * torch.tanh(torch.randn(n, WIDTH, generator=generator) * scales) @ turn
        found.append(site + 0.5 * torch.randn(WIDTH, generator=generator))
        found[-1][:, 3] *= 20
    return torch.stack(found)


# --- what each tool does: all pairs' debiased CKA in the order of PAIRS, or the sample's biased one


def _blocks(rows: Rows, batch: int) -> list[dict[str, torch.Tensor]]:
    """Batches as a model gives them, gathered to blocks of 2,048 rows as ``run`` does."""
    blocks, held = [], []
    for part in rows.split(batch, dim=1):
        held.append(part)
        if sum(p.shape[1] for p in held) >= 2048 or part.data_ptr() == rows[:, -part.shape[1] :].data_ptr():
            blocks.append({name: torch.cat([p[i] for p in held]) for i, name in enumerate(NAMES)})
            held = []
    return blocks


def _streamed(rows: Rows, batch: int, **kwargs: Any) -> list[float]:
    from tensordict import TensorDict

    from tdgeom import ForEachPair
    from tdgeom.measures.similarity.linear_cka import LinearCKA
    from tdgeom.stream.cross_moments import StreamingCrossMoments

    stage = StreamingCrossMoments(NAMES, pairs="all", **kwargs)
    for block in _blocks(rows, batch):
        stage.update(TensorDict({"tokens": block}))
    td = stage.publish(TensorDict({}))
    source = "sketch" if kwargs else "moments"
    between = ForEachPair(LinearCKA(estimator="debiased", source=source), NAMES, pairs="all")(td)["between"]
    return [float(between[f"{NAMES[i]}->{NAMES[j]}", "linear_cka_debiased"]) for i, j in PAIRS]


def tdgeom_exact(rows: Rows, batch: int) -> list[float]:
    """Ours: exact over all rows, whatever the batch."""
    return _streamed(rows, batch)


def tdgeom_sketch(rows: Rows, batch: int) -> list[float]:
    """Ours from 256 random projections a site: unbiased, all rows."""
    return _streamed(rows, batch, sketch=256)


def pytorch_cka(rows: Rows, batch: int) -> list[float]:
    """pytorch-cka on a model that only hands the rows through, so that its own work is timed."""
    from cka import CKA

    class Sites(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sites = torch.nn.ModuleList(torch.nn.Identity() for _ in range(SITES))

        def forward(self, x: torch.Tensor) -> None:
            for site, part in zip(self.sites, x.unbind(1)):
                site(part)

    model = Sites()
    layers = [f"sites.{i}" for i in range(SITES)]
    batches = [part.transpose(0, 1) for part in rows.split(batch, dim=1)]
    with CKA(model, model, layers=layers, device="cpu") as cka:
        matrix = cka._compare(batches, progress=False)
    return [float(matrix[i, j]) for i, j in PAIRS]


def matrix_products(rows: Rows, batch: int) -> list[float]:
    """The products of all pairs and sites in float32, in blocks of 2,048 rows, and nothing else."""
    wide = torch.cat(list(rows), dim=1)
    for part in wide.split(2048):
        for i in range(SITES):
            part[:, i * WIDTH : (i + 1) * WIDTH].mT @ part[:, i * WIDTH :]
    return []


def tdgeom_sample(rows: Rows, batch: int) -> list[float]:
    """Ours on a sample: each site prepared once."""
    from tensordict import TensorDict

    from tdgeom import ForEachPair
    from tdgeom.measures.similarity.linear_cka import LinearCKA

    td = TensorDict({"sample": dict(zip(NAMES, rows))})
    between = ForEachPair(LinearCKA(), NAMES, pairs="all")(td)["between"]
    return [float(between[f"{NAMES[i]}->{NAMES[j]}", "linear_cka"]) for i, j in PAIRS]


def tdhook_sample(rows: Rows, batch: int) -> list[float]:
    """tdhook's stage, pair by pair."""
    from tdhook.latent.representation_similarity import CkaEstimator
    from tensordict import TensorDict

    stage = CkaEstimator()
    return [float(stage(TensorDict({"data_a": rows[i], "data_b": rows[j]}, []))["cka"]) for i, j in PAIRS]


TASKS: dict[str, Callable[[Rows, int], list[float]]] = {
    function.__name__: function
    for function in (
        tdgeom_exact,
        tdgeom_sketch,
        pytorch_cka,
        matrix_products,
        tdgeom_sample,
        tdhook_sample,
    )
}


# --- the workers


def serve() -> None:
    """Answer tasks, one JSON object a line."""
    answers, sys.stdout = sys.stdout, sys.stderr  # tools print
    for line in sys.stdin:
        task = json.loads(line)
        rows = torch.load(task["rows"])
        begin = time.perf_counter()
        value = TASKS[task["name"]](rows, task["batch"])
        reply = {"value": value, "seconds": time.perf_counter() - begin}
        print(json.dumps(reply), file=answers, flush=True)


class Worker:
    """A tool's process."""

    def __init__(self, python: str) -> None:
        self.process = subprocess.Popen(
            [python, "-W", "ignore", __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, name: str, rows: Path, batch: int) -> dict[str, Any]:
        """One task."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"name": name, "rows": str(rows), "batch": batch}) + "\n")
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


def exact(rows: Rows, *, debiased: bool) -> list[float]:
    """The definition in float64 over all rows, from N x N kernels (Song et al. 2012 for the debiased one)."""
    centred = [(site.double() - site.double().mean(0)) for site in rows]
    n = rows.shape[1]

    def kernel(x: torch.Tensor) -> torch.Tensor:
        k = x @ x.mT
        return k.fill_diagonal_(0) if debiased else k

    def product(k: torch.Tensor, m: torch.Tensor) -> float:
        value = (k * m).sum()
        if debiased:
            value = value + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ m.sum(0))
        return float(value)

    own = [product(k, k) for k in map(kernel, centred)]
    cross = {}
    for i in range(SITES):
        k = kernel(centred[i])
        for j in range(i + 1, SITES):
            cross[i, j] = product(k, kernel(centred[j]))
    return [cross[i, j] / (own[i] * own[j]) ** 0.5 for i, j in PAIRS]


def beside(
    title: str,
    contestants: dict[str, tuple[str, str]],
    rows: tuple[Path, Path],
    truth: list[float],
    batch: int,
    rounds: int,
) -> None:
    """Print a table of tools that take turns; the first is ours. ``contestants``: name -> (python, task)."""
    workers = {name: Worker(python) for name, (python, _) in contestants.items()}
    for name, worker in workers.items():
        worker.run(contestants[name][1], rows[1], batch)  # imports and warming up
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, worker in workers.items():
            found[name].append(worker.run(contestants[name][1], rows[0], batch))
    for worker in workers.values():
        worker.close()
    ours = [entry["seconds"] for entry in next(iter(found.values()))]
    print(f"\n### {title}, {rounds} rounds, {torch.get_num_threads()} threads\n")
    print("| | seconds (median) | min - max | x ours | worst error |")
    print("|---|---|---|---|---|")
    for name, entries in found.items():
        times = [entry["seconds"] for entry in entries]
        ratio = statistics.median(a / b for a, b in zip(times, ours))
        errors = [abs(a - b) for a, b in zip(entries[0]["value"], truth)]
        worst = f"{max(errors):.1e}" if errors else ""
        span = f"{min(times):.2f} - {max(times):.2f}"
        print(f"| {name} | {statistics.median(times):.2f} | {span} | {ratio:.2f} | {worst} |", flush=True)


def pair_tables(options: argparse.Namespace, folder: Path) -> None:
    """All pairs, streamed and from a sample."""
    paths = folder / "rows.pt", folder / "small.pt"
    rows = layers_like_activations(options.rows)
    torch.save(rows, paths[0])
    torch.save(rows[:, : options.rows // 4].clone(), paths[1])
    if options.only in (None, "stream"):
        truth = exact(rows, debiased=True)
        for batch in (64, 1024):
            contestants = {"tdgeom, exact": (sys.executable, "tdgeom_exact")}
            contestants["tdgeom, sketch=256"] = (sys.executable, "tdgeom_sketch")
            if options.peers_python:
                contestants["pytorch-cka, minibatches"] = (options.peers_python, "pytorch_cka")
            contestants["the products alone"] = (sys.executable, "matrix_products")
            title = f"Debiased CKA of {len(PAIRS)} pairs, {SITES} sites, {options.rows:,} rows, D = {WIDTH}, batch {batch}"
            beside(title, contestants, paths, truth, batch, options.rounds)
    if options.only in (None, "sample"):
        truth = exact(rows, debiased=False)
        contestants = {"tdgeom": (sys.executable, "tdgeom_sample")}
        if options.peers_python:
            contestants["tdhook"] = (options.peers_python, "tdhook_sample")
        title = f"Linear CKA of {len(PAIRS)} pairs from a sample of {options.rows:,} rows, D = {WIDTH}"
        beside(title, contestants, paths, truth, options.rows, options.rounds)


# --- StreamingSketch beside frequent directions


def frequent_directions(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Eigenvalues from ``size`` rows (Ghashami et al. 2016), shrunk through the small Gram matrix; centred beforehand."""
    held = torch.zeros(2 * size, rows.shape[1])
    for part in rows.split(size):
        held[size : size + len(part)], held[size + len(part) :] = part, 0
        values, vectors = torch.linalg.eigh((held @ held.mT).double())
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        kept = (values - values[size]).clamp(min=0)
        factor = torch.where(values > 0, (kept / values.clamp(min=1e-300)).sqrt(), 0)
        held = (vectors * factor).mT.float() @ held
    return torch.linalg.svdvals(held.double()).square() / (len(rows) - 1)


def sketch_table(options: argparse.Namespace) -> None:
    """Error of the leading 32 eigenvalues and seconds, for equal numbers of columns."""
    from tdgeom.stream.sketch import StreamingSketch

    n, d, k = 8192, 2048, 32
    print(f"\n### Leading {k} eigenvalues, {n:,} rows, D = {d:,}\n")
    print("| spectrum | columns | StreamingSketch: s | worst relative error | its bound/λ32 | d_pr error "
          "| frequent directions: s | worst relative error |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    i = torch.arange(1, d + 1).float()
    for name, variances in (("1/i", 1 / i), ("1/i^0.5", i**-0.5), ("exp(-i/40)", torch.exp(-i / 40) + 1e-4)):
        rows = torch.randn(n, d, generator=torch.Generator().manual_seed(0)) * variances.sqrt()
        truth = torch.linalg.eigvalsh(torch.cov(rows.double().mT)).flip(0)
        d_pr = truth.sum() ** 2 / truth.square().sum()
        for size in (128, 256, 512):
            stage = StreamingSketch(k=k, size=size)
            begin = time.perf_counter()
            for part in rows.split(2048):
                out = stage(tokens=part)
            ours = time.perf_counter() - begin
            begin = time.perf_counter()
            theirs = frequent_directions(rows - rows.mean(0), size)
            other = time.perf_counter() - begin
            errors = [float((found[:k] / truth[:k] - 1).abs().max()) for found in (out[2], theirs)]
            print(f"| {name} | {size} | {ours:.2f} | {errors[0]:.3f} | {float(out[7] / truth[k - 1]):.2f} "
                  f"| {float(out[5] / d_pr - 1):+.4f} | {other:.2f} | {errors[1]:.3f} |", flush=True)  # fmt: skip


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers-python", help="a Python that has pytorch-cka and tdhook")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--only", choices=("stream", "sample", "sketch"))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    if options.only != "sketch":
        with tempfile.TemporaryDirectory() as folder:
            pair_tables(options, Path(folder))
    if options.only in (None, "sketch"):
        sketch_table(options)


if __name__ == "__main__":
    main()
