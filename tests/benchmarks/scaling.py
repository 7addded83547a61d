"""What a run holds: state files and the growth of the process, each in a process of its own.

python -m tests.benchmarks.scaling
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tensordict.nn import TensorDictSequential

import tdgeom as tg

CASES = (
    ("covariance", 4, 768, 8192),
    ("covariance", 4, 768, 32768),
    ("covariance", 8, 768, 8192),
    ("covariance", 4, 2048, 8192),
    ("sample", 4, 768, 8192),
    ("sample", 4, 768, 32768),
    ("grouped", 4, 768, 8192),
    ("sketch", 4, 2048, 8192),
)
BATCH = 2048


def stage(kind: str, sites: list[str]) -> torch.nn.Module:
    """The streaming stage of one case."""
    each = {
        "covariance": tg.StreamingCovariance,
        "grouped": tg.GroupedCovariance,
        "sketch": tg.StreamingSketch,
    }
    return tg.RowSample(sites, size=4096) if kind == "sample" else tg.ForEach(each[kind](), sites)


def measure(kind: str, sites: int, width: int, rows: int) -> None:
    """Print one line of the table."""
    torch.set_num_threads(1)
    names = [f"site{number}" for number in range(sites)]
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[dict[str, object]]:
        for number in range(rows // BATCH):
            x = torch.randn(BATCH, width, generator=generator)
            yield {"tokens": dict.fromkeys(names, x), "row_id": (torch.arange(BATCH) + number * BATCH) << 20}

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state"
        tg.run(TensorDictSequential(stage(kind, names)), batches(), state=file, progress=False)
        size = file.stat().st_size / 2**20
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"| {sites} | {width:,} | {rows:,} | {kind} | {size:.1f} | {grown:.0f} |", flush=True)


def main() -> None:
    """Every case, one process each."""
    if len(sys.argv) == 5:
        measure(sys.argv[1], *map(int, sys.argv[2:]))
        return
    print("| sites | D | rows | stage | state, MiB | process, MiB |\n|---|---|---|---|---|---|", flush=True)
    for case in CASES:
        subprocess.run([sys.executable, "-m", "tests.benchmarks.scaling", *map(str, case)], check=True)


if __name__ == "__main__":
    main()
