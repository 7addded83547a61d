"""The API reference holds every name that guides, messages and docstrings send users to, and the names exist."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from importlib import import_module
from pathlib import Path

import tdgeom

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs" / "_ext"))
from public_names import documented  # noqa: E402

MENTION = re.compile(r"(?<![\w./'-])(?:tdgeom|tg)\.([a-z_]+(?:\.[A-Za-z_]\w*)+|[A-Za-z_]\w*)")
# the map of the source, for those who change it
FOR_CONTRIBUTORS = {"contributing.md"}


def mentioned() -> dict[str, str]:
    """Dotted names behind ``tdgeom.`` or ``tg.`` in guides, in public docstrings and in messages: name -> where."""
    found: dict[str, str] = {}
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        if path.name not in FOR_CONTRIBUTORS:
            found |= dict.fromkeys(MENTION.findall(path.read_text(encoding="utf-8")), path.name)
    for name in tdgeom.__all__:
        made = getattr(tdgeom, name)
        if inspect.isclass(made) or inspect.isroutine(made):
            found |= dict.fromkeys(MENTION.findall(made.__doc__ or ""), f"the docstring of {name}")
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and "warn" in ast.dump(node.func)):
                words = [
                    n.value
                    for n in ast.walk(node)
                    if isinstance(n, ast.Constant) and isinstance(n.value, str)
                ]
                found |= dict.fromkeys(MENTION.findall("".join(words)), f"a message in {path.name}")
    return found


def test_what_users_are_sent_to_is_in_the_reference():
    known = set(documented())
    names = mentioned()
    # methods, fields and parts of calls are in the entry of what they belong to
    missing = {
        name: where
        for name, where in names.items()
        if name not in known and name.rpartition(".")[0] not in known
    }
    assert len(names) > 100
    assert not missing, missing


def test_an_entry_is_a_name_that_there_is():
    for name in documented():
        head, _, last = f"tdgeom.{name}".rpartition(".")
        assert hasattr(import_module(head), last) or import_module(f"{head}.{last}"), name


def test_modules_beside_the_top_level_have_their_entries():
    known = set(documented())
    assert {
        "text.TextBatches",
        "text.read_jsonl",
        "demo.demo_model",
        "measures.registry.known_measures",
        "plot.matrix",
    } <= known
