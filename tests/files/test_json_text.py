"""JSON text: what comes back, and what is refused."""

from __future__ import annotations

import pytest

from tdgeom.files.errors import StoreError
from tdgeom.files.json_text import DEEPEST_JSON, LARGEST_JSON, canonical_json, read_json


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"), ('{"a":1,"a":1}', "names a key twice"), ("NaN", "no finite number"),
        ("[1e999]", "no finite number"), ("[" * 100_000, "not valid JSON"),
        ("[" * (DEEPEST_JSON + 2) + "]" * (DEEPEST_JSON + 2), "nested deeper than 64 levels"),
        (" " * (LARGEST_JSON + 1), "more than 16,777,216 are refused"), (b"\xff\xff", "not valid JSON"),
        ("9" * 5000, "not valid JSON"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_hostile_json_is_refused(text, message):
    with pytest.raises(StoreError, match=f"a text: .*{message}"):
        read_json(text, "a text")


def test_json_comes_back():
    value = {"b": [1, 2.5, None, True, "α🦆"], "a": {"x": {}}}
    assert read_json(canonical_json(value), "a text") == value
    assert canonical_json({"b": 1, "a": 2}) == canonical_json({"a": 2, "b": 1})
