"""A measure over depth as a chart: one line a series, equal lines once, error bars, and differences between runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tdgeom.measures.columns import Column, column_of, error_column, fixed_ends, interval_columns
from tdgeom.report.contents import Chart
from tdgeom.report.line_charts import bars_of, line_chart

BARS = {
    "interval": "Bars are 95 % intervals, about the value less its bias; none where a bias is too large to take off.",
    "error": "Bars are ± one standard error.",
}

__all__ = ["drawn_once", "measure_chart", "measures_chart", "said"]


def measure_chart(rows: pd.DataFrame, name: str, x: str, *, log: bool = False) -> Chart | None:
    """One measure of all series, with bars of its interval (or ± one standard error) where known; below, what runs differ by."""
    column = column_of(name)
    points = _points(rows, name)
    if not len(points):
        return None
    points, series = drawn_once(points)
    words = said(points, column, x)
    spec = line_chart(
        points, column, column_of(x), series=series, log=log, domain=fixed_ends(column, points["y"]),
        whole=x != "relative_depth", words=f"{column.label}. {words}", places=_places(rows),
    )  # fmt: skip
    below = _difference(rows, name, x) if rows["_run"].nunique() > 1 else None
    return Chart(_heading(column), _says(column.says, words, points, series), spec, words, difference=below)


def measures_chart(
    rows: pd.DataFrame,
    names: Sequence[str],
    title: str,
    says: str,
    x: str,
    *,
    unit: str = "",
    log: bool = False,
) -> Chart | None:
    """Several measures of one series in one chart, a line each."""
    parts = []
    for name in names:
        points = _points(rows, name)
        parts.append(points.assign(series=column_of(name).label.removeprefix("intrinsic dimension, ")))
    points = pd.concat(parts, ignore_index=True)
    if not len(points):
        return None
    points, series = drawn_once(points)
    column = column_of(names[0])._replace(label=title, unit=unit)
    words = said(points, column, x)
    spec = line_chart(
        points, column, column_of(x), series=series, log=log, domain=None if log else fixed_ends(column, points["y"]),
        whole=x != "relative_depth", words=f"{title}. {words}",
    )  # fmt: skip
    return Chart(_heading(column), _says(says, words, points, series), spec, words)


def _says(says: str, words: str, points: pd.DataFrame, series: Sequence[str]) -> str:
    """How to read a chart; of a single line also what it does, which the eye finds itself among several."""
    bars = BARS.get(bars_of(points), "")
    return " ".join(part for part in (says, words if len(series) == 1 else "", bars) if part)


def _places(rows: pd.DataFrame) -> dict[str, int]:
    return {str(name): place for place, name in enumerate(dict.fromkeys(rows["_series"]))}


def _difference(rows: pd.DataFrame, name: str, x: str) -> Chart | None:
    """What each further series has more than the first, where they share half of its places."""
    column, first = column_of(name), str(rows["_series"].iloc[0])
    points = _points(rows, name, bars=False)
    base = points[points["series"] == first].set_index("x")["y"]
    others = points[points["series"] != first]
    if base.index.has_duplicates:
        return None
    others = others.assign(y=others["y"].to_numpy() - base.reindex(others["x"]).to_numpy())
    others = others[np.isfinite(others["y"])]
    shared = others.groupby("series")["x"].transform("count")
    others = others[(shared > 1) & (shared >= len(base) / 2)]
    if not len(others):
        return None
    others, series = drawn_once(others)
    change = column._replace(label=f"{column.label}, difference", low=None, high=None)
    words = said(others, change, x)
    title = f"{column.label[0].upper()}{column.label[1:]}: difference from {first}"
    spec = line_chart(
        others, change, column_of(x), series=series, whole=x != "relative_depth", words=f"{title}. {words}", height=110,
        zero=True, places=_places(rows),
    )  # fmt: skip
    return Chart(title, f"Difference from {first}", spec, words)


def drawn_once(points: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Series that coincide become one, whose name says so.

    >>> rows = pd.DataFrame({"series": ["a", "b"], "x": [0, 0], "y": [1.0, 1.0], "site": ["s", "s"]})
    >>> drawn_once(rows)[1]
    ['a = b']
    """
    kept: dict[str, tuple[list[str], pd.DataFrame]] = {}
    for name, part in points.groupby("series", sort=False):
        part = part.sort_values("x", kind="stable")
        for names, other in kept.values():
            same = len(other) == len(part) and np.array_equal(other["x"], part["x"])
            if same and np.allclose(other["y"], part["y"], rtol=1e-6, atol=0, equal_nan=True):
                names.append(str(name))
                break
        else:
            kept[str(name)] = ([str(name)], part)
    parts = [part.assign(series=" = ".join(names)) for names, part in kept.values()]
    return pd.concat(parts, ignore_index=True), [" = ".join(names) for names, _ in kept.values()]


def said(points: pd.DataFrame, column: Column, x: str) -> str:
    """A chart of lines in words: where each starts and ends, and its extremes; of many lines, the extremes alone."""
    place = "depth" if x == "relative_depth" else "layer"
    sentences = []
    for name, part in points.groupby("series", sort=False):
        part = part[np.isfinite(part["y"].to_numpy(float))].sort_values("x", kind="stable")
        if not len(part):
            continue
        low, high = part.iloc[part["y"].argmin()], part.iloc[part["y"].argmax()]
        who = f"{name}: " if points["series"].nunique() > 1 else ""
        if _number(low["y"]) == _number(high["y"]):
            sentences.append(f"{who}{_number(low['y'])} throughout")
            continue
        sentences.append(
            f"{who}from {_number(part.iloc[0]['y'])} to {_number(part.iloc[-1]['y'])}, highest {_number(high['y'])} at "
            f"{place} {high['x']:.3g}, lowest {_number(low['y'])} at {place} {low['x']:.3g}"
        )
    if len(sentences) > 3:
        top, least = points.iloc[points["y"].argmax()], points.iloc[points["y"].argmin()]
        return (
            f"Highest {_number(top['y'])} ({top['series']}, {place} {top['x']:.3g}), lowest {_number(least['y'])} "
            f"({least['series']}, {place} {least['x']:.3g})."
        )
    text = "; ".join(sentences)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else "0" if abs(value) < 1e-9 else f"{value:.3g}"


def _heading(column: Column) -> str:
    unit = f" ({column.unit})" if column.unit and column.unit[:-1] not in column.label else ""
    return f"{column.label[0].upper()}{column.label[1:]}{unit}"


def _points(rows: pd.DataFrame, name: str, *, bars: bool = True) -> pd.DataFrame:
    """The places, values and bars of one measure, in order of depth."""
    where = "site" if "site" in rows else "pair" if "pair" in rows else None
    sites = (
        rows[where] if where else [f"{a} -> {b}" for a, b in zip(rows["a"], rows["b"])] if "a" in rows else ""
    )
    points = pd.DataFrame(
        {
            "x": rows["_x"].to_numpy(float),
            "y": pd.to_numeric(rows[name], errors="coerce").to_numpy(float),
            "series": rows["_series"].astype(str),
            "site": sites,
        }
    )
    ends, error = interval_columns(name, rows.columns), error_column(name, rows.columns)
    if bars and ends is not None and rows[ends[0]].notna().any():
        for end, held in zip(("low", "high"), ends):
            points[end] = pd.to_numeric(rows[held], errors="coerce").to_numpy(float)
        points["bars"] = "interval"
    elif bars and error is not None:
        bar = pd.to_numeric(rows[error], errors="coerce").to_numpy(float)
        points["low"], points["high"], points["bars"] = points["y"] - bar, points["y"] + bar, "error"
    return points[np.isfinite(points["y"]) & np.isfinite(points["x"])]
