"""The benchmarks run, and their tables find their places in the page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_every_benchmark_runs() -> None:
    done = command("--quick")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Tests on it" in done.stdout and " failed" not in done.stdout
    assert done.stderr.count("$ python ") >= 10


def test_tables_go_where_the_page_has_them() -> None:
    import runpy

    suite = runpy.run_path(str(ROOT / "tests" / "benchmarks" / "__main__.py"))
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    held = {
        line.removeprefix("% measured: ") for line in page.splitlines() if line.startswith("% measured: ")
    }
    assert held and held <= set(suite["PARTS"])
    changed = suite["put"](page, "covariance", "| new |")
    assert "% measured: covariance\n\n| new |\n\n% end\n" in changed
    assert changed.count("% measured: ") == page.count("% measured: ")
    assert page.partition("% measured: covariance")[0] == changed.partition("% measured: covariance")[0]
    assert suite["put"](page, "scaling", "| more |").endswith("% measured: scaling\n\n| more |\n\n% end\n")
