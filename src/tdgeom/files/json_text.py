"""JSON text: one spelling for equal values on the way out, bounds on size and depth on the way in."""

from __future__ import annotations

import json
import math
from typing import Any

from tdgeom.files.errors import StoreError

__all__ = ["canonical", "read_json"]

LARGEST_JSON = 16 * 2**20
DEEPEST_JSON = 64


def canonical(value: Any) -> str:
    """JSON text with sorted keys and no spaces, the same for equal values.

    >>> canonical({"b": [1, None], "a": "x"})
    '{"a":"x","b":[1,null]}'

    Raises:
        ValueError: NaN or Inf, or text that is no valid Unicode. TypeError: what JSON does not know.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    text.encode()
    return text


def read_json(text: str | bytes, what: str, largest: int = LARGEST_JSON) -> Any:
    """Parse JSON that may be hostile: bounded size and depth, no key twice, finite numbers.

    >>> read_json('{"a": [1, 2]}', "an example")
    {'a': [1, 2]}

    Raises:
        StoreError: anything else; ``what`` opens the message.
    """
    if len(text) > largest:
        raise StoreError(f"{what}: {len(text):,} bytes of JSON, more than {largest:,} are refused.")
    try:
        value = json.loads(text, object_pairs_hook=_no_key_twice, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{what}: not valid JSON ({error}).") from error
    if _is_deeper(value, DEEPEST_JSON):
        raise StoreError(f"{what}: JSON nested deeper than {DEEPEST_JSON} levels is refused.")
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object names a key twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    layer = [value]
    for _ in range(levels + 1):
        inner: list[Any] = []
        for one in layer:
            if isinstance(one, dict):
                inner.extend(one.values())
            elif isinstance(one, list):
                inner.extend(one)
        if not inner:
            return False
        layer = inner
    return True
