"""What an analysis with standard errors keeps of its groups of documents, by site or pair and column."""

from __future__ import annotations

from typing import Any

import numpy as np
from tensordict import TensorDictBase

from tdgeom.analysis.result_tables import ERROR_BIAS, ERROR_PARTS
from tdgeom.run.to_frame import leaves

__all__ = ["Parts", "biases_of", "group_parts", "groups_of"]

Parts = dict[tuple[str, str], np.ndarray]


def group_parts(result: TensorDictBase | None) -> Parts:
    """By (site or pair, column): the value that an error is of, then what each group of documents adds to it."""
    held = [] if result is None else [result, *(v for v in result.values() if isinstance(v, TensorDictBase))]
    found = {}
    for one in held:
        for root in ERROR_PARTS:
            branch = one.get(root, None)
            for path, value in [] if branch is None else leaves(branch):
                own, where, *rest = path if root == "error_parts" else (root, *path)
                if value.ndim == 1:
                    found[where, "_".join(rest) or own] = value.double().cpu().numpy()
    return found


def groups_of(one: Any, parts: np.ndarray | None) -> int:
    """How many groups of documents an error is of."""
    if parts is not None:
        return int((parts != 0).sum()) or len(parts)
    record = (one.metadata.get("settings") or {}).get("errors")
    number = record.get("groups") if isinstance(record, dict) else record
    return int(number) if isinstance(number, int) and number > 1 else 20


def biases_of(result: TensorDictBase | None) -> dict[tuple[str, str], np.ndarray]:
    """By (site or pair, column): what the value is too large by."""
    held = [] if result is None else [result, *(v for v in result.values() if isinstance(v, TensorDictBase))]
    found = {}
    for one in held:
        for root in ERROR_BIAS:
            branch = one.get(root, None)
            for path, value in [] if branch is None else leaves(branch):
                own, where, *rest = path if root == "error_bias" else (root, *path)
                found[where, "_".join(rest) or own] = value.double().cpu().numpy()
    return found
