"""Streamed probes beside scikit-learn on all rows in memory: the same coefficients, seconds and peak memory.

Rows of 384 features from a fixed seed come in batches of 2,048, as a loader would give them; ours sees each batch once
and drops it, scikit-learn first gathers them all. Every contestant runs in a process of its own, in turn, several rounds;
the table gives median seconds (made of reading and fitting), peak memory above the imports, and how far coefficients differ.

    python tests/benchmarks/probes.py                       # 200,000 rows
    python tests/benchmarks/probes.py --rows 1000000
    python tests/benchmarks/probes.py --rows 20000 --rounds 1   # a trial
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
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

BATCH, CLASSES, FOLDS = 2048, 5, 5
ALPHAS = [float(a) for a in np.logspace(-1, 5, 7)]
TASKS = ("ridge", "ridge, alpha by 5 folds", "lda", "mean difference")


def batches(rows: int, width: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Rows, classes and row ids (sequences of 64 rows), the same in every process."""
    fixed = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=fixed) / width**0.5
    centres = torch.randn(CLASSES, width, generator=fixed) / 2
    for index, start in enumerate(range(0, rows, BATCH)):
        generator = torch.Generator().manual_seed(1 + index)
        size = min(BATCH, rows - start)
        label = torch.randint(CLASSES, (size,), generator=generator)
        number = torch.arange(start, start + size)
        x = torch.randn(size, width, generator=generator) @ mixing + centres[label]
        yield x, label, (number // 64 << 20) | number % 64


def ours(task: str, rows: int, width: int) -> np.ndarray:
    """One pass; nothing is kept but moments."""
    import tdgeom as tg

    keys = {"in_keys": ["x", "label", "row_id"], "holdout": 0.0}
    probe = {
        "ridge": lambda: tg.LinearProbe(alpha=10.0, **keys),
        "ridge, alpha by 5 folds": lambda: tg.LinearProbe(alpha=ALPHAS, folds=FOLDS, **keys),
        "lda": lambda: tg.LinearProbe(solver="lda", **keys),
        "mean difference": lambda: tg.MeanDifferenceProbe(**keys),
    }[task]()
    loader = ({"x": x, "label": label, "row_id": row_id} for x, label, row_id in batches(rows, width))
    result = tg.run(probe, loader, progress=False)
    return result["probe_fit", "weight"].numpy()


def sklearn(task: str, rows: int, width: int) -> np.ndarray:
    """All rows in memory first, in float64 as scikit-learn computes ridge with full precision."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import Ridge, RidgeClassifier
    from sklearn.model_selection import GridSearchCV, PredefinedSplit

    from tdgeom.functional import fold_index, row_groups

    parts = list(batches(rows, width))
    x = torch.cat([part[0] for part in parts]).double().numpy()
    y = torch.cat([part[1] for part in parts]).numpy()
    row_id = torch.cat([part[2] for part in parts])
    del parts
    if task == "ridge":
        return RidgeClassifier(alpha=10.0).fit(x, y).coef_
    if task == "lda":
        return LinearDiscriminantAnalysis(solver="lsqr").fit(x, y).coef_
    if task == "mean difference":
        means = np.stack([x[y == c].mean(0) for c in range(CLASSES)])
        return means - x.mean(0)
    split = PredefinedSplit(fold_index(row_groups(row_id), FOLDS).numpy())
    search = GridSearchCV(Ridge(), {"alpha": ALPHAS}, cv=split, scoring="neg_mean_squared_error")
    return search.fit(x, 2.0 * np.eye(CLASSES)[y] - 1).best_estimator_.coef_


def reading(task: str, rows: int, width: int) -> np.ndarray:
    """The batches alone: what both contestants pay before any work."""
    return np.zeros(sum(len(x) for x, *_ in batches(rows, width)))[:1]


CONTESTANTS = {"tdgeom": ours, "scikit-learn": sklearn, "reading": reading}


def child(contestant: str, task: str, rows: int, width: int, out: str) -> None:
    """Run one contestant and report seconds and memory."""
    import sklearn.linear_model  # noqa: F401
    from sklearn.model_selection import GridSearchCV  # noqa: F401

    import tdgeom  # noqa: F401

    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    weight = CONTESTANTS[contestant](task, rows, width)
    seconds = time.perf_counter() - begin
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    np.save(out, weight)
    print(json.dumps({"seconds": seconds, "mebibytes": peak}))


def measure(contestant: str, task: str, rows: int, width: int) -> tuple[dict[str, float], np.ndarray]:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "weight.npy")
        command = [
            sys.executable,
            __file__,
            "--child",
            contestant,
            task,
            "--rows",
            str(rows),
            "--width",
            str(width),
        ]
        done = subprocess.run([*command, "--out", out], check=True, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1]), np.load(out)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        warnings.simplefilter("ignore")
        child(*given.child, given.rows, given.width, given.out)
        return
    read = [measure("reading", TASKS[0], given.rows, given.width)[0] for _ in range(given.rounds)]
    print(f"{given.rows:,} rows x {given.width}, {CLASSES} classes, {given.rounds} rounds, one thread; making the batches takes "
          f"{statistics.median(r['seconds'] for r in read):.2f} s of every time below\n")  # fmt: skip
    print(
        "| task | tdgeom s | scikit-learn s | ratio | tdgeom MiB | scikit-learn MiB | largest relative difference |"
    )
    print("|---|---|---|---|---|---|---|")
    for task in TASKS:
        rounds = [{name: measure(name, task, given.rows, given.width) for name in ("tdgeom", "scikit-learn")}
                  for _ in range(given.rounds)]  # fmt: skip

        def median(name: str, what: str, rounds: list = rounds) -> float:
            return statistics.median(turn[name][0][what] for turn in rounds)

        ratio = statistics.median(
            turn["tdgeom"][0]["seconds"] / turn["scikit-learn"][0]["seconds"] for turn in rounds
        )
        a, b = (rounds[-1][name][1] for name in ("tdgeom", "scikit-learn"))
        gap = np.abs(a - b).max() / np.abs(b).max()
        print(
            f"| {task} | {median('tdgeom', 'seconds'):.2f} | {median('scikit-learn', 'seconds'):.2f} | {ratio:.2f} | "
            f"{median('tdgeom', 'mebibytes'):.0f} | {median('scikit-learn', 'mebibytes'):.0f} | {gap:.1e} |"
        )


if __name__ == "__main__":
    main()
