"""Plain data as JSON: values made plain, one spelling for equal ones, bounds on size and depth on the way in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from tdgeom.core.stage_settings import Configured, plain_setting
from tdgeom.files.atomic import read_whole
from tdgeom.files.errors import StoreError

__all__ = ["canonical_json", "plain", "read_json", "read_json_file"]

LARGEST_JSON = 16 * 2**20
DEEPEST_JSON = 64


def plain(value: Any) -> Any:
    """Plain JSON values: tensors, NumPy arrays and scalars unpacked, NaN and Inf as None, a stage as its settings.

    Anything else becomes its string.
    """
    if isinstance(value, Configured):
        return plain_setting(value)
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(part) for part in value]
    if isinstance(value, np.ndarray | torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    return None if value is pd.NA else str(value)


def canonical_json(value: Any) -> str:
    """JSON text with sorted keys and no spaces, the same for equal values.

    >>> canonical_json({"b": [1, None], "a": "x"})
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
        depth = _depth(value)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{what}: not valid JSON ({error}).") from error
    if depth > DEEPEST_JSON + 1:
        raise StoreError(f"{what}: JSON nested deeper than {DEEPEST_JSON} levels is refused.")
    return value


def read_json_file(path: Path, largest: int = LARGEST_JSON) -> Any:
    """``read_json`` of a file."""
    return read_json(read_whole(path, largest), str(path), largest)


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


def _depth(value: Any) -> int:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return max(map(_depth, parts), default=0) + 1
