"""Several models in one table: a column ``model`` says whose row it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
from tensordict import is_tensor_collection

__all__ = ["MODEL", "as_one_table", "by_model"]

MODEL = "model"


def by_model(given: Any) -> dict[str, Any] | None:
    """Results by the name of their model: a mapping's own, a list's from the metadata, made different; None of one result.

    >>> list(by_model([pd.DataFrame(), pd.DataFrame({"model_label": ["gpt2"]})]))
    ['1', 'gpt2']
    """
    if isinstance(given, Mapping) and not is_tensor_collection(given):
        return {str(name): one for name, one in given.items()}
    if not isinstance(given, list | tuple):
        return None
    named: dict[str, Any] = {}
    for number, one in enumerate(given, 1):
        name = _name_of(one) or str(number)
        named[f"{name} ({number})" if name in named else name] = one
    return named


def as_one_table(given: Any, table_of: Callable[[Any], pd.DataFrame]) -> pd.DataFrame:
    """The table of one result, or those of several, one behind the other, told apart by the column ``model``.

    >>> as_one_table({"small": 1, "large": 2}, lambda size: pd.DataFrame({"d_pr": [size]})).values.tolist()
    [['small', 1], ['large', 2]]

    Raises:
        ValueError: none is given.
    """
    named = by_model(given)
    if named is None:
        return table_of(given)
    if not named:
        raise ValueError("no results are given: give one, or a list or mapping of several.")
    parts = []
    for name, one in named.items():
        table = table_of(one)
        sides = MODEL in table and table[MODEL].nunique() > 1  # of a comparison
        own = table[MODEL].astype(str) if sides else None
        table = table.drop(columns=MODEL, errors="ignore")
        table.insert(0, MODEL, name if own is None else f"{name}, " + own)
        parts.append(table)
    return pd.concat(parts, ignore_index=True)


def _name_of(one: Any) -> str | None:
    metadata = getattr(one, "metadata", None)
    if isinstance(metadata, Mapping):
        return str(metadata.get("run_name") or metadata.get("model_id") or "") or None
    if isinstance(one, pd.DataFrame):
        for column in (MODEL, "model_label"):
            if column in one and one[column].nunique() == 1:
                return str(one[column].iloc[0])
    return None
