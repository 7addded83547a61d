"""Confidence intervals of everything that an analysis measured with errors, as one tidy table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tensordict import TensorDictBase

from tdgeom.analysis.beyond_errors import group_parts, groups_of
from tdgeom.analysis.result_tables import ERROR_BIAS
from tdgeom.analysis.results import AnalysisResults
from tdgeom.core.guessed_names import answer_guesses
from tdgeom.measures.jackknife import error_interval, scale_of, too_biased
from tdgeom.run.to_frame import leaves

__all__ = ["intervals"]

_FEW = "few rows: the bias is more than a fifth of the value"
_UNKNOWN = "no error: the groups of documents do not tell one, or differ by rounding alone"


@answer_guesses
def intervals(results: AnalysisResults | str | Path, *, level: float = 0.95) -> pd.DataFrame:
    """The interval of every metric that has a standard error: one row a metric and place.

    Student's t with groups - 1 degrees of freedom on the scale where the metric is closest to normal (``scale_of``), about the
    value less its jackknife bias: the finite number of documents makes spectra look steeper than they are, and this is most of
    what is wrong with a plain effective rank. The interval is then of the population's value. Where no bias is known (what
    nearest neighbours say; a CKA over all rows, whose error is the sample's; rows wider than their groups are held) it is about
    the value itself and of its expectation at this many rows. A bias has an error too: a third of it counts as one. Where it is
    more than a fifth of the value the rows are too few to correct for, and there is no interval.

    Args:
        results: of ``analyze_model(..., errors=True)`` or ``compare(..., errors=True)``, or the folder of saved ones. A folder
            saved as CSV alone has no biases.
        level: of the interval.

    Returns:
        Columns ``table`` ("metrics" or "pairs"), ``site``, ``metric``, ``step`` (of estimates at several scales), ``value``,
        ``se``, ``bias`` (NaN: not known), ``low``, ``high``, ``scale``, ``reason`` (of ends that are NaN); of an untrained
        baseline, its rows with ``weights``. k90, k95 and k99 between whole numbers.

    Raises:
        ValueError: no standard errors in the results; a level that is none.

    Busing, Meijer and van der Leeden 1999; how often these intervals hold the truth is in docs/errors.md.

        >>> import torch, tdgeom as tg
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 6))
        >>> batches = [{"input": torch.randn(400, 6)}]
        >>> results = tg.analyze_model(model, batches, sites="module_output:0", errors=True, metrics="spectrum", progress=False)
        >>> table = tg.intervals(results).set_index("metric")
        >>> bool(table.loc["d_pr", "low"] < table.loc["d_pr", "value"] < table.loc["d_pr", "high"])
        True
    """
    one = results if isinstance(results, AnalysisResults) else AnalysisResults.load(results)
    rows = list(_rows(one, level))
    if not rows:
        raise ValueError(
            "intervals: the results have no standard errors. Measure with errors=True (--errors on the command line)."
        )
    return pd.DataFrame(rows)


def _rows(one: AnalysisResults, level: float) -> Iterator[dict[str, Any]]:
    parts, biases = group_parts(one.result), _biases(one.result)
    for table in ("metrics", "pairs"):
        frame = one.metrics if table == "metrics" else one.pairs
        names = [name for name in map(str, frame) if f"{name}_se" in frame]
        for row in frame.to_dict(orient="records"):
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
                    yield {"table": table, "site": where, **weights, "metric": name, "step": step,
                           **dict(zip(("value", "se", "bias", "low", "high"), map(float, numbers))),
                           "scale": scale_of(name), "reason": reason}  # fmt: skip


def _biases(result: TensorDictBase | None) -> dict[tuple[str, str], np.ndarray]:
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
