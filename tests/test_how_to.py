"""The pages of docs/howto, docs/coming_from and docs/measures: each of their Python blocks runs and asserts what it claims.

A page is given the model and the data that docs/howto/index.md speaks of, and nothing else: what it uses it imports. A block of
``py`` is a call of another tool, shown beside ours and not run.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

import models

matplotlib.use("Agg")
DOCS = Path(__file__).parents[1] / "docs"
FOLDERS = ("howto", "coming_from", "measures")
PAGES = sorted(page for folder in FOLDERS for page in (DOCS / folder).glob("*.md") if page.stem != "index")
PROCESSES = DOCS / "howto/several_processes.md"  # its block is a script for several


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != PROCESSES], ids=lambda page: f"{page.parent.name}/{page.stem}"
)
def test_every_block_runs_and_asserts(page, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    loader = models.labelled_batches(12)
    batch = {name: value for name, value in loader[0].items() if name != "label"}
    names = {"model": models.gpt2(), "loader": loader, "batch": batch}
    blocks = blocks_of(page)
    assert blocks or page.stem == "troubleshooting"
    for number, block in enumerate(blocks):
        tree = ast.parse(block)
        assert any(isinstance(node, ast.Assert) for node in ast.walk(tree)), (
            f"block {number} of {page} asserts nothing"
        )
        exec(compile(tree, f"{page.name}, block {number}", "exec"), names)


@pytest.mark.parametrize("folder", FOLDERS)
def test_an_index_leads_to_every_page(folder) -> None:
    index = (DOCS / folder / "index.md").read_text(encoding="utf-8")
    listed = re.search(r"```{toctree}.*?\n\n(.*?)```", index, re.DOTALL)[1].split()
    assert sorted(listed) == sorted(page.stem for page in PAGES if page.parent.name == folder)
    assert set(re.findall(r"\]\((\w+)\.md\)", index)) == set(listed)


@pytest.mark.slow
def test_the_script_runs_in_two_processes(tmp_path) -> None:
    (script,) = blocks_of(PROCESSES)
    (tmp_path / "measure.py").write_text(script, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "measure.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["rows", "150"]
