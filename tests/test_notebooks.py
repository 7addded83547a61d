"""The notebooks as they are kept: no outputs, public names only, claims that are asserted, and a line in the index.

The documentation runs them (`python -m sphinx -W`), where a cell that fails or warns fails the build.
"""

from __future__ import annotations

import ast
import json
import re
from importlib import import_module
from pathlib import Path

import pytest

import tdgeom

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == kind]


def code(path: Path) -> ast.Module:
    return ast.parse("\n".join("".join(cell["source"]) for cell in cells(path, "code")))


@every
def test_no_output_is_kept(path) -> None:
    assert path.stat().st_size < 40_000
    for cell in cells(path, "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None


@every
def test_what_is_claimed_is_asserted(path) -> None:
    assert any(isinstance(node, ast.Assert) for node in ast.walk(code(path)))


@every
def test_prose_leads_and_titles_the_page(path) -> None:
    prose = ["".join(cell["source"]) for cell in cells(path, "markdown")]
    assert prose[0].startswith("# ") and sum(text.startswith("# ") for text in prose) == 1
    assert sum(text.startswith("## ") for text in prose) >= 2
    assert len(cells(path, "code")) <= 16


@every
def test_only_public_names(path) -> None:
    tree, missing = code(path), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tdgeom":
            module = import_module(node.module)
            assert node.module in ("tdgeom", "tdgeom.text", "tdgeom.demo", "tdgeom.functional"), node.module
            missing += [alias.name for alias in node.names if alias.name not in module.__all__]
        if isinstance(node, ast.Attribute):
            said = ast.unparse(node)
            if re.fullmatch(r"tg(\.\w+)+", said) and not is_public(said.split(".")[1:]):
                missing.append(said)
            if node.attr.startswith("_") and not node.attr.endswith("__"):
                missing.append(said)
    assert not missing


def is_public(names: list[str]) -> bool:
    found: object = tdgeom
    for name in names:
        if name not in getattr(found, "__all__", dir(found)):
            return False
        found = getattr(found, name)
    return True


def test_the_index_lists_each_with_a_picture() -> None:
    index = (ROOT / "docs/notebooks/index.md").read_text("utf-8")
    names = {path.stem for path in NOTEBOOKS}
    assert set(re.findall(r"\]\((\w+)\.ipynb\)", index)) == names
    assert set(re.findall(r"_images/notebooks/(\w+)\.png", index)) == names
    assert set(re.findall(r"^(\w+)$", index, re.MULTILINE)) == names  # the toctree
