"""The interval of every metric that has an error: as rows, and as columns beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch

from tdgeom.analysis.group_parts import biases_of, group_parts, groups_of
from tdgeom.measures.jackknife import error_interval, scale_of, too_biased

__all__ = ["interval_rows", "with_intervals"]

_FEW = "few rows: the bias is more than a fifth of the value"
_UNKNOWN = "no error: the groups of documents do not tell one, or differ by rounding alone"


def with_intervals(one: Any, level: float = 0.95) -> dict[str, pd.DataFrame]:
    """The tables of sites and of pairs with ``<metric>_low`` and ``<metric>_high`` behind every ``<metric>_se``."""
    tables = {"metrics": one.metrics.copy(), "novelty": one.pairs.copy()}
    ends: dict[tuple[str, str], dict[int, list[Any]]] = {}
    for row in interval_rows(one, level):
        table = "metrics" if row["table"] == "metrics" else "novelty"
        for end in ("low", "high"):
            ends.setdefault((table, f"{row['metric']}_{end}"), {}).setdefault(row["row"], []).append(row[end])
    for (table, name), by_row in ends.items():
        frame, (stem, _, end) = tables[table], name.rpartition("_")
        if any(len(values) > 1 for values in by_row.values()):
            continue  # an estimate at several scales is drawn by itself
        if name in frame:  # of an earlier call
            del frame[name]
        place = [*map(str, frame)].index(f"{stem}_se") + (1 if end == "low" else 2)
        frame.insert(place, name, [by_row[number][0] for number in range(len(frame))])
    return tables


def interval_rows(one: Any, level: float) -> Iterator[dict[str, Any]]:
    """The rows of ``tg.intervals``, of results with ``result``, ``metrics``, ``pairs`` and ``metadata``."""
    parts, biases = group_parts(one.result), biases_of(one.result)
    for table in ("metrics", "pairs"):
        frame = one.metrics if table == "metrics" else one.pairs
        names = [name for name in map(str, frame) if f"{name}_se" in frame]
        for number, row in enumerate(frame.to_dict(orient="records")):
            where = str(row["site"] if table == "metrics" else f"{row['a']}->{row['b']}")
            trained = row.get("weights") != "untrained"
            weights = {"weights": row["weights"]} if "weights" in row else {}
            for name in names:
                held = parts.get((where, name)) if trained else None
                value = np.atleast_1d(row[name] if held is None else held[0]).astype(float)
                error = np.atleast_1d(row[f"{name}_se"]).astype(float)
                bias = np.broadcast_to(biases.get((where, name), np.nan) if trained else np.nan, value.shape)
                known = torch.from_numpy(value), torch.from_numpy(error), torch.from_numpy(bias.copy())
                degrees = groups_of(one, None if held is None else held[1:]) - 1
                low, high = error_interval(
                    *known[:2], degrees, scale=scale_of(name), level=level, bias=known[2]
                )
                lost = too_biased(*known).tolist()
                found = zip(value, error, bias, low.tolist(), high.tolist())
                for step, numbers in enumerate(found):
                    reason = _FEW if lost[step] else _UNKNOWN if np.isnan(error[step]) else ""
                    yield {"row": number, "table": table, "site": where, **weights, "metric": name, "step": step,
                           **dict(zip(("value", "se", "bias", "low", "high"), map(float, numbers))),
                           "scale": scale_of(name), "reason": reason}  # fmt: skip
