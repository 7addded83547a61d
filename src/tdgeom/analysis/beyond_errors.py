"""What differs between two analyses beyond its errors: metric by metric, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student

from tdgeom.analysis.group_parts import Parts, group_parts, groups_of
from tdgeom.analysis.results import AnalysisResults
from tdgeom.core.guessed_names import answer_guesses
from tdgeom.measures.jackknife import scale_of
from tdgeom.measures.significance.many_tests import adjusted_p_values

__all__ = ["difference"]

_ONLY_ONE = "is in one of the two only"


@answer_guesses
def difference(
    a: AnalysisResults | str | Path,
    b: AnalysisResults | str | Path,
    *,
    level: float = 0.05,
    correction: Literal["holm", "fdr"] = "holm",
    metrics: Sequence[str] | None = None,
    paired: bool | None = None,
) -> pd.DataFrame:
    """Which metrics of two analyses differ beyond their errors, corrected for how many were looked at.

    Every metric with a ``<metric>_se`` in both is tested, site by site and pair by pair: t = (b - a)/error on the scale where the
    metric is closest to normal (logarithms of dimensions, Fisher's z of correlations, log odds of shares), two-sided, with
    the degrees of freedom of Welch and Satterthwaite. Where both runs read the same documents, what a group of documents does
    to one it does to the other: the error is then that of the differences group by group, which is far smaller.

    Args:
        a, b: results of ``analyze_model(..., errors=True)``, or the folders of saved ones.
        level: at which a corrected p-value counts as a difference.
        correction: "holm" (no false difference at all, with chance 1 - level) or "fdr" (few among those called).
        metrics: only these columns; the correction is then for these alone.
        paired: whether the documents were the same. None: they were if both runs read equal batches (``run``'s record of the
            data), counted the same rows and dealt them to as many groups.

    Returns:
        One row a metric and place, smallest p first: ``table`` ("metrics" or "pairs"), ``site``, ``metric``, ``a``, ``b``,
        ``difference`` (b - a), ``se`` (of it), ``p``, ``p_adjusted``, ``differs``, ``paired``; k90, k95 and k99 between whole
        numbers, as their errors are. ``attrs["only_in_one"]`` lists what could not be compared.

    Raises:
        ValueError: no errors in a run; nothing in common; different sites or rows that are not the same kind of thing;
            ``paired=True`` where groups do not match.

    Busing, Meijer and van der Leeden 1999 (errors); Holm 1979; Benjamini and Hochberg 1995.
    """
    if not 0 < level < 1:
        raise ValueError(f"difference: level lies between 0 and 1, got {level!r}.")
    runs = [one if isinstance(one, AnalysisResults) else AnalysisResults.load(one) for one in (a, b)]
    for name, one in zip("ab", runs):
        if not any(str(column).endswith("_se") for column in one.metrics):
            raise ValueError(
                f"difference: run {name} ({_called(one)}) has no standard errors, so nothing says what is more than chance. "
                f"Measure it with errors=True (--errors)."
            )
    units = [one.metadata.get("row_unit") for one in runs]
    if units[0] != units[1]:
        raise ValueError(
            f"difference: the rows of one run are {units[0]}, of the other {units[1]}, whose numbers say different things. "
            f"Measure both with the same select=."
        )
    same = _same_documents(*runs) if paired is None else paired
    parts = [group_parts(one.result) for one in runs]
    rows, missing = [], []
    for table in ("metrics", "pairs"):
        found, lost = _compared(
            table, (runs[0], runs[1]), (parts[0], parts[1]), same=same, required=paired is True
        )
        rows += found
        missing += lost
    if not rows:
        raise ValueError(
            f"difference: the two runs have no metric with an error at a common site: {_called(runs[0])} has "
            f"{sorted(runs[0].metrics.get('site', []))[:4]}, {_called(runs[1])} {sorted(runs[1].metrics.get('site', []))[:4]}."
        )
    frame = pd.DataFrame(rows)
    if metrics is not None:
        if unknown := sorted(set(metrics) - set(frame["metric"])):
            raise ValueError(
                f"difference: no metric {unknown} with errors; there is {sorted(set(frame['metric']))}."
            )
        frame = frame[frame["metric"].isin(list(metrics))].reset_index(drop=True)
    adjusted = adjusted_p_values(torch.tensor(frame["p"].to_numpy(dtype=np.float64)), correction)
    frame["p_adjusted"] = adjusted.numpy()
    frame["differs"] = frame["p_adjusted"] <= level
    frame["paired"] = frame.pop("paired")
    frame = frame.sort_values(["p", "table", "site", "metric"], kind="stable").reset_index(drop=True)
    frame.attrs["only_in_one"] = missing
    return frame


def _called(one: AnalysisResults) -> str:
    return str(one.artifact_dir or one.metadata.get("model_id") or one.metadata.get("model_class"))


def _same_documents(a: AnalysisResults, b: AnalysisResults) -> bool:
    """Whether both runs read equal batches, by the record that each keeps of its data."""
    data = [one.metadata.get("data_sha256") for one in (a, b)]
    counts = [
        [one.metadata.get(f"{name}_observed") for name in ("rows", "tokens", "batches")] for one in (a, b)
    ]
    return bool(data[0]) and data[0] == data[1] and counts[0] == counts[1]


def _keyed(one: AnalysisResults, table: str) -> Iterator[tuple[str, Any]]:
    frame = one.metrics if table == "metrics" else one.pairs
    if "weights" in frame:
        frame = frame[frame["weights"] != "untrained"]
    for row in frame.to_dict(orient="records"):
        yield str(row["site"] if table == "metrics" else f"{row['a']}->{row['b']}"), row


def _one_value_each(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose cells of several values (Gride's scales) are as many columns: ``name[0]``, ``name[0]_se``, ..."""
    found: dict[str, Any] = {}
    for name, cell in row.items():
        if not isinstance(cell, list | tuple | np.ndarray):
            found[name] = cell
            continue
        stem, is_error = name.removesuffix("_se"), name.endswith("_se")
        for place, value in enumerate(np.asarray(cell).ravel()):
            found[f"{stem}[{place}]{'_se' * is_error}"] = value
    return found


def _compared(
    table: str,
    runs: tuple[AnalysisResults, AnalysisResults],
    by_group: tuple[Parts, Parts],
    *,
    same: bool,
    required: bool,
) -> tuple[list[dict[str, Any]], list[str]]:
    left, right = (dict(_keyed(one, table)) for one in runs)
    missing = [f"{where} {_ONLY_ONE}" for where in left.keys() ^ right.keys()]
    rows = []
    for where in (name for name in left if name in right):
        own, other = _one_value_each(left[where]), _one_value_each(right[where])
        names = [{key.removesuffix("_se") for key in row if key.endswith("_se")} for row in (own, other)]
        missing += [f"{where} {name} {_ONLY_ONE}" for name in sorted(names[0] ^ names[1])]
        for name in (key for key in own if key in names[0] & names[1]):
            values = [float(row[name]) for row in (own, other)]
            held = [parts.get((where, name)) for parts in by_group]
            errors = [_error(row[f"{name}_se"], one) for row, one in zip((own, other), held)]
            if name in ("k90", "k95", "k99"):
                if held[0] is None or held[1] is None:  # the error is of the value between whole numbers
                    missing.append(f"{where} {name} needs the arrays of a bundle")
                    continue
                values = [float(one[0]) for one in held if one is not None]
            pair = same and held[0] is not None and held[1] is not None and held[0].shape == held[1].shape
            parts = [None if one is None else one[1:] for one in held]
            if required and not pair:
                raise ValueError(
                    f"difference(paired=True): {name} at {where} keeps no groups that match in both runs. Measure both with "
                    f"errors= of the same number of groups, or leave paired= out."
                )
            groups = [groups_of(one, part) for one, part in zip(runs, parts)]
            rows.append(
                {"table": table, "site": where, "metric": name, "a": values[0], "b": values[1],
                 "difference": values[1] - values[0],
                 **_tested(name, values, errors, groups, parts if pair else None), "paired": pair}
            )  # fmt: skip
    return rows, missing


def _error(error: Any, parts: np.ndarray | None) -> float:
    """An error; where groups differ by rounding alone, that."""
    unresolved = np.isnan(float(error)) and parts is not None and bool(np.isfinite(parts[1:]).all())
    return float(np.sqrt((parts[1:] ** 2).sum())) if unresolved and parts is not None else float(error)


def _tested(
    name: str, values: list[float], errors: list[float], groups: list[int], parts: list[Any] | None
) -> dict[str, float]:
    """Error of the difference in the metric's own units, and p on its scale."""
    ends, slope = _slopes(name, values)
    if parts is not None:
        plain = float(np.sqrt(((parts[1] - parts[0]) ** 2).sum()))
        scaled = float(np.sqrt(((slope[1] * parts[1] - slope[0] * parts[0]) ** 2).sum()))
        degrees: float = min(groups) - 1
    else:
        own = [(one * error) ** 2 for one, error in zip(slope, errors)]
        plain, scaled = float(np.hypot(errors[0], errors[1])), float(np.sqrt(sum(own)))
        below = sum(part**2 / max(number - 1, 1) for part, number in zip(own, groups))
        degrees = scaled**4 / below if below > 0 else np.nan
    gap = ends[1] - ends[0]
    if not np.isfinite(gap) or not np.isfinite(scaled):
        return {"se": plain, "p": np.nan}
    if scaled == 0:
        return {"se": plain, "p": 1.0 if gap == 0 else np.nan}
    return {"se": plain, "p": float(2 * student.sf(abs(gap) / scaled, degrees))}


def _slopes(name: str, values: list[float]) -> tuple[list[float], list[float]]:
    """Both values on the metric's scale, and the slopes there; linear where a value lies outside of the scale."""
    scale, x = scale_of(name), np.asarray(values, dtype=np.float64)
    with np.errstate(all="ignore"):
        if scale == "log" and (x > 0).all():
            return list(np.log(x)), list(1 / x)
        if scale == "fisher" and (abs(x) < 1).all():
            return list(np.arctanh(x)), list(1 / (1 - x**2))
        if scale == "logit" and ((x > 0) & (x < 1)).all():
            return list(np.log(x / (1 - x))), list(1 / (x * (1 - x)))
    return list(x), [1.0, 1.0]
