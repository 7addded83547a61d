"""The house: what lies where, under which name, and what a room says of itself."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

import tdgeom as tg

SOURCE = Path(tg.__file__).parent
FILES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))
ROOMS = sorted({path.parent for path in FILES} - {Path()})


def test_the_hall_holds_the_public_names_and_nothing_else():
    here = {path.name for path in SOURCE.iterdir() if path.is_file()}
    assert here == {"__init__.py", "__init__.pyi", "__main__.py", "functional.py", "py.typed"}


def test_no_two_files_have_one_name():
    counts = Counter(path.stem for path in FILES if path.stem != "__init__")
    assert [name for name, count in counts.items() if count > 1] == []
    shapes = {"utils", "util", "helpers", "helper", "common", "misc", "tools", "base"}
    assert shapes.isdisjoint(counts)


@pytest.mark.parametrize("room", ROOMS, ids=str)
def test_a_room_says_what_comes_in_and_what_goes_out(room):
    tree = ast.parse((SOURCE / room / "__init__.py").read_text(encoding="utf-8"))
    words = ast.get_docstring(tree) or ""
    assert "Comes in: " in words and "Goes out: " in words
    if len(room.parts) == 1:
        assert "Uses: " in words or "Uses " in words, room


def test_every_file_says_what_it_holds():
    unsaid = [
        str(path) for path in FILES if not ast.get_docstring(ast.parse((SOURCE / path).read_text("utf-8")))
    ]
    assert unsaid == []
