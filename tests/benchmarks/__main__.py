"""Every benchmark in one command: each table is measured again, beside its peers, and put where the page has it.

    python -m tests.benchmarks --all --out docs/benchmarks.md    # an hour; makes environments for the peers
    python -m tests.benchmarks --only covariance --out docs/benchmarks.md
    python -m tests.benchmarks --quick                           # small and without peers: proves that every one runs

A page holds a table between the lines ``% measured: NAME`` and ``% end``. Peers whose dependencies clash with ours get an
environment of their own, which the next run finds again.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
TORCH = f"torch=={version('torch').split('+')[0]}"
PEERS = {
    "dadapy": ["dadapy==0.3.4", "numpy<2"],
    "peers": ["scikit-dimension==0.5.0", "tdhook==0.3.0", "pytorch-cka==1.1.3", TORCH],
}
"""Environments beside ours, and what is in them."""


@dataclass(frozen=True)
class Part:
    """A table: the lines after ``python`` that print it, all of it and a small one; what it needs beside us."""

    full: Sequence[str]
    quick: Sequence[str]
    needs: Sequence[str] = ()
    ours: Sequence[str] = ()  # of the extra "bench"


PARTS = {
    "analysis": Part(
        ["analysis.py --rounds 4"],
        ["analysis.py --rounds 1 --batches 1 --layers 2 --without-peer"],
        ours=["representation-geometry"],
    ),
    "analysis_errors": Part(
        ["analysis.py --errors --rounds 5"], ["analysis.py --errors --rounds 1 --batches 1 --layers 2"]
    ),
    "analysis_memory": Part(["analysis.py --memory"], ["analysis.py --one ours --batches 1 --layers 2"]),
    "neighbours": Part(
        ["neighbours.py --dadapy-python {dadapy} --peers-python {peers}"],
        ["neighbours.py --only twonn --only growth --rows 500 --rounds 1"],
        needs=["dadapy", "peers"],
    ),
    "store": Part(
        ["store.py"], ["store.py --gigabytes 0.01 --sites 2 --width 64 --shard-mebibytes 2 --rounds 1"]
    ),
    "similarity": Part(
        ["similarity.py --peers-python {peers}"],
        ["similarity.py --only sample --rows 256 --rounds 1"],
        needs=["peers"],
    ),
    "probes": Part(["probes.py --rows 40000 --rounds 3"], ["probes.py --rows 2000 --width 32 --rounds 1"]),
    "hooks": Part(["hooks.py"], [], ours=["tdhook"]),
    "patching": Part(["patching.py"], ["patching.py --rounds 1 --short"]),
    "covariance": Part(
        ["covariance.py --rounds 60 --widths 768", "covariance.py --rounds 24 --widths 4096"],
        ["covariance.py --rounds 2 --widths 96 --rows 256"],
    ),
    "scaling": Part(["-m tests.benchmarks.scaling"], ["scaling.py covariance 2 64 4096"]),
    "alarms": Part(["alarms.py"], ["alarms.py 2"]),
    "cards": Part(["cards.py"], ["cards.py 1500"]),
    "accelerator": Part(["accelerator.py"], ["accelerator.py --device cpu --small"]),
}


def environment(name: str, folder: Path) -> Path:
    """The Python of a peer's environment, made where it is not there yet."""
    python = folder / name / "bin" / "python"
    if not python.exists():
        venv.create(folder / name, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PEERS[name]], check=True)
    return python


def measured(lines: Sequence[str], pythons: dict[str, Path]) -> str:
    """What the commands print, which is shown as it comes."""
    printed = []
    for line in lines:
        words = line.format(**pythons).split()
        words = words if words[0] == "-m" else [str(HERE / words[0]), *words[1:]]
        print(f"$ python {line}", file=sys.stderr, flush=True)
        done = subprocess.run(
            [sys.executable, *words], cwd=HERE.parents[1], stdout=subprocess.PIPE, text=True, check=True
        )
        print(done.stdout, flush=True)
        if "|" not in done.stdout and not done.stdout.strip().isdigit():
            raise SystemExit(f"{line} printed no table")
        printed.append(done.stdout.strip())
    return "\n\n".join(printed)


def put(page: str, name: str, table: str) -> str:
    """The page with that table in its place, or at its end.

    >>> put("a\\n% measured: x\\nold\\n% end\\nb\\n", "x", "new")
    'a\\n% measured: x\\n\\nnew\\n\\n% end\\nb\\n'
    """
    block = f"% measured: {name}\n\n{table}\n\n% end\n"
    place = re.compile(rf"^% measured: {re.escape(name)}\n.*?^% end\n", re.DOTALL | re.MULTILINE)
    return place.sub(lambda _: block, page) if place.search(page) else f"{page.rstrip()}\n\n{block}"


def machine() -> str:
    """What it was measured on: of every table that is measured anew, one line."""
    packages = ("torch", "tensordict", "transformers", "numpy", "scipy")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, {versions}."


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="every table, beside its peers")
    which.add_argument("--only", action="append", choices=list(PARTS), help="these tables")
    which.add_argument(
        "--quick", action="store_true", help="small ones, without peers: whether each still runs"
    )
    parser.add_argument("--out", type=Path, help="the page whose tables are replaced")
    parser.add_argument(
        "--environments",
        type=Path,
        default=Path.home() / ".cache" / "tdgeom-benchmarks",
        help="where peers are installed (default: %(default)s)",
    )
    given = parser.parse_args(arguments)
    for name in given.only or PARTS:
        part = PARTS[name]
        if given.quick:
            measured(part.quick, {})
            continue
        missing = [package for package in part.ours if not installed(package)]
        if missing:
            raise SystemExit(
                f'{name} needs {missing}: python -m pip install -e ".[bench]" -c tests/constraints.txt'
            )
        pythons = {need: environment(need, given.environments) for need in part.needs}
        table = f"{machine()}\n\n{measured(part.full, pythons)}"
        if given.out:
            given.out.write_text(put(given.out.read_text(encoding="utf-8"), name, table), encoding="utf-8")


def installed(package: str) -> bool:
    """Whether a package is in this environment."""
    try:
        return bool(version(package))
    except ImportError:
        return False


if __name__ == "__main__":
    main()
