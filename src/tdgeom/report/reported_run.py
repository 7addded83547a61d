"""``ReportedRun``: what a report shows of one run, and the runs' rows side by side as series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tdgeom.run.profiles import relative_depths

__all__ = ["ReportedRun", "label_of", "named_apart", "series_rows"]

SERIES, X = "_series", "_x"
# what tells series of one table apart, beside the run
APART = ("weights", "model", "model_label", "kind", "stack")


@dataclass(frozen=True)
class ReportedRun:
    """One run: its name, its tables under their names in a bundle, eigenvalues by layer or site, metadata."""

    name: str
    tables: Mapping[str, pd.DataFrame]
    eigenvalues: Mapping[str, np.ndarray] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)


def label_of(metadata: Mapping[str, Any]) -> str:
    """What a model is called: an id as it is, of a folder its last part."""
    models = metadata.get("models")
    if isinstance(models, Mapping) and models:
        return " and ".join(f"{_short(one.get('id', side))} ({side})" for side, one in models.items())
    return _short(metadata.get("model_id") or metadata.get("model_class") or "")


def _short(label: Any) -> str:
    label = str(label)
    return Path(label).name if label.count("/") > 1 or label.startswith((".", "/")) else label


def named_apart(runs: Sequence[ReportedRun]) -> list[ReportedRun]:
    """The runs under names of which no two are the same.

    >>> [run.name for run in named_apart([ReportedRun("a", {}), ReportedRun("a", {}), ReportedRun("b", {})])]
    ['a', 'a (2)', 'b']
    """
    taken: dict[str, int] = {}
    found = []
    for run in runs:
        taken[run.name] = taken.get(run.name, 0) + 1
        name = run.name if taken[run.name] == 1 else f"{run.name} ({taken[run.name]})"
        found.append(ReportedRun(name, run.tables, run.eigenvalues, run.metadata))
    return found


def series_rows(runs: Sequence[ReportedRun], table: str) -> tuple[pd.DataFrame, str]:
    """The rows of one table of all runs, with the series each belongs to and its place on the axis of depth.

    Columns added: ``_run``, ``_series`` (a name for each line), ``_x``. Returns also what ``_x`` is: "layer" where every site
    has a number and all series count alike, else "relative_depth".
    """
    parts = [
        one.assign(_run=run.name) for run in runs if (one := run.tables.get(table)) is not None and len(one)
    ]
    if not parts:
        return pd.DataFrame(), "layer"
    rows = pd.concat(parts, ignore_index=True)
    rows[SERIES] = _series(rows, len(runs) > 1)
    site = "site" if "site" in rows else "a" if "a" in rows else None
    if site is None:
        return rows.assign(**{X: np.arange(len(rows))}), "row"
    layers: Any = rows["layer"] if "layer" in rows else rows.get("layer_a")
    if (
        layers is not None
        and layers.notna().all()
        and rows.assign(_l=layers).groupby(SERIES)["_l"].max().nunique() == 1
    ):
        return rows.assign(**{X: layers.astype(float)}), "layer"
    return rows.assign(**{X: _depths(rows, site)}), "relative_depth"


def _series(rows: pd.DataFrame, several: bool) -> list[str]:
    apart = [column for column in APART if column in rows and _makes_lines(rows, column)]
    if "model" in apart and "model_label" in apart:
        apart.remove("model_label")
    if several and "model_label" in apart:
        apart.remove("model_label")  # the run's name says it
    columns = ["_run", *apart] if several or not apart else apart
    named = rows[columns].itertuples(index=False)
    return [", ".join(str(value) for value in row if not pd.isna(value)) or "all" for row in named]


def _makes_lines(rows: pd.DataFrame, column: str) -> bool:
    """Whether a column's values are lines of their own: a kind with a single site closes the line of the others."""
    if rows[column].nunique(dropna=False) < 2:
        return False
    if column != "kind" or "site" not in rows:
        return True
    return bool((rows.groupby("kind", dropna=False)["site"].nunique() > 1).sum() > 1)


def _depths(rows: pd.DataFrame, site: str) -> pd.Series:
    if "relative_depth" in rows and rows["relative_depth"].notna().all():
        return rows["relative_depth"].astype(float)
    depths = pd.Series(np.nan, index=rows.index)
    for _, part in rows.groupby("_run", sort=False):
        sites = [*part[site], *(part["b"] if site == "a" else [])]
        found = relative_depths(list(dict.fromkeys(map(str, sites))))
        depths.loc[part.index] = [found[str(name)] for name in part[site]]
    return depths
