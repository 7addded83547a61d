"""What stands out in a run, in sentences: marks, extremes, the sharpest change. Nothing here is a judgement of the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tdgeom.measures.columns import column_of
from tdgeom.report.protocol_section import warnings_of
from tdgeom.report.reported_run import ReportedRun, series_rows

__all__ = ["findings"]


def findings(runs: Sequence[ReportedRun]) -> list[tuple[str, str]]:
    """(kind, sentence) of each: "care" where numbers need care, "note" else."""
    rows, x = series_rows(runs, "metrics")
    found: list[tuple[str, str]] = []
    several = len(rows) and rows["_series"].nunique() > 1
    for series, part in rows.groupby("_series", sort=False) if len(rows) else ():
        who = f"{series}: " if several else ""
        found += [("note", f"{who}{said}") for said in _extremes(part, x)]
        found += [("care", f"{who}{said}") for said in _marks(part)]
    pairs, x = series_rows(runs, "novelty")
    for series, part in pairs.groupby("_series", sort=False) if len(pairs) else ():
        if (said := _sharpest(part)) is not None:
            found.append(("note", f"{series}: {said}" if pairs["_series"].nunique() > 1 else said))
    for index, run in enumerate(runs):
        if count := len(warnings_of(run)):
            of = f" of {run.name}" if len(runs) > 1 else ""
            word = "warning" if count == 1 else "warnings"
            found.append(("care", f"{count} {word}{of} while measuring: see the protocol ({index + 1})." if len(runs) > 1
                          else f"{count} {word} while measuring: see the protocol."))  # fmt: skip
    return found


def _extremes(part: pd.DataFrame, x: str) -> list[str]:
    said = []
    place = "layer" if x == "layer" else "depth"
    shown = [*[name for name in ("twonn_estimate", "gride_estimate") if name in part][:1], "d_pr"]
    for name in shown:
        values = _numbers(part, name)
        if np.isfinite(values).sum() < 2:
            continue
        low, high = np.nanargmin(values), np.nanargmax(values)
        depths = part["_x"].to_numpy(float)
        said.append(
            f"{_capital(column_of(name).label)} is largest at {place} {depths[high]:.3g} ({_number(values[high])}) and "
            f"smallest at {place} {depths[low]:.3g} ({_number(values[low])})."
        )
    return said


def _marks(part: pd.DataFrame) -> list[str]:
    said = []
    for name, words in (
        (
            "near_rank1",
            "one direction holds nearly all the variance (near rank 1): dimensions say little there",
        ),
        ("few_rows", "few rows for their dimension: measures of the spectrum are too low there"),
        (
            "sv_few_rows",
            "few rows in the sample for their dimension: measures of the sample are too low there",
        ),
    ):
        if name in part and (marked := [bool(mark) and mark == mark for mark in part[name]]) and any(marked):
            said.append(f"{_sites(part, marked)}: {words}.")
    if "unresolved" in part:
        marked = [isinstance(mark, str) and bool(mark) for mark in part["unresolved"]]
        if any(marked):
            names = sorted(
                {name.strip() for mark in part["unresolved"][marked] for name in str(mark).split(",")}
            )
            said.append(
                f"{_sites(part, marked)}: rounding decides {', '.join(names)}; do not read them there."
            )
    return said


def _sites(part: pd.DataFrame, marked: list[bool]) -> str:
    if all(marked):
        return f"All {len(marked)} sites"
    names = [str(site) for site in part["site"][marked]]
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"{len(names)} of {len(marked)} sites ({shown})"


def _sharpest(part: pd.DataFrame) -> str | None:
    for name, pick in (
        ("feature_subspace_novelty", "max"),
        ("linear_cka_debiased", "min"),
        ("linear_cka", "min"),
    ):
        values = _numbers(part, name)
        if np.isfinite(values).sum() < 2 or part["a"].duplicated().any():
            continue
        at = np.nanargmax(values) if pick == "max" else np.nanargmin(values)
        if abs(values[at] - (0 if pick == "max" else 1)) < 1e-3:
            continue  # nothing changes anywhere
        a, b = part["a"].iloc[at], part["b"].iloc[at]
        return f"The sharpest change is from {a} to {b} ({column_of(name).label} {_number(values[at])})."
    return None


def _numbers(part: pd.DataFrame, name: str) -> np.ndarray:
    if name not in part:
        return np.empty(0)
    return pd.to_numeric(part[name], errors="coerce").to_numpy(float)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
