"""Intrinsic dimension against the distance at which it looks, and profiles that a run keeps as tables of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tdgeom.measures.columns import ESTIMATORS, column_of
from tdgeom.report.contents import Chart, Section, Table
from tdgeom.report.layer_lines import in_order, layer_chart
from tdgeom.report.profile_charts import measure_chart
from tdgeom.report.reported_run import ReportedRun, series_rows

__all__ = ["scale_section"]

PROFILE, OVERLAP = "diagnostics/intrinsic_dimension", "diagnostics/overlap"


def scale_section(runs: Sequence[ReportedRun]) -> Section | None:
    """The tables of ``intrinsic_dimension_profile`` and ``overlap_profile``: a line a layer over scales, else over depth."""
    rows, x = series_rows(runs, PROFILE)
    charts: list[Chart] = []
    tables: list[Table] = []
    layers: list[str] = []
    if len(rows):
        several = rows.groupby("estimator")["step"].transform("max") > 0
        metrics = {str(name) for run in runs for name in run.tables.get("metrics", pd.DataFrame())}
        for _, part in rows[several].groupby("estimator", sort=False):
            layers = in_order([*layers, *_layers(part)])
        for name, part in rows[several].groupby("estimator", sort=False):
            charts.append(_over_scales(str(name), part, layers))
        for name, part in rows[~several].groupby("estimator", sort=False):
            if (
                f"{name}_estimate" not in metrics
                and (chart := measure_chart(part, "estimate", x)) is not None
            ):
                charts.append(
                    Chart(f"Intrinsic dimension, {_named(name)}", chart.says, chart.spec, chart.words)
                )
        tables.append(Table("Intrinsic dimension", _shown(rows), "intrinsic_dimension"))
    rows, x = series_rows(runs, OVERLAP)
    if len(rows):
        for name, part in rows.groupby("measure", sort=False):
            single = part[~part.duplicated(["_series", "site"])]
            if (chart := measure_chart(single, "value", x)) is not None:
                label = column_of(str(name)).label
                title = f"{label[0].upper()}{label[1:]}"
                charts.append(Chart(title, column_of(str(name)).says or chart.says, chart.spec, chart.words))
        tables.append(Table("Neighbourhood overlap", _shown(rows), "overlap"))
    if not charts:
        return None
    says = (
        "An estimate looks at a distance: noise makes it large at the smallest, curvature at the largest. A plateau between them "
        "is the dimension of the data."
        if layers
        else "How many coordinates rows need near each row, and how much of a neighbourhood stays."
    )
    title = "Intrinsic dimension over scales" if layers else "Intrinsic dimension and neighbourhoods"
    return Section("scales", title, says, charts, tables, layers, layers)


def _over_scales(name: str, part: pd.DataFrame, layers: Sequence[str]) -> Chart:
    estimate, error = part["estimate"].to_numpy(float), part["standard_error"].to_numpy(float)
    points = pd.DataFrame(
        {"x": part["scale"].to_numpy(float), "y": estimate, "layer": _layers(part), "series": part["_series"].astype(str),
         "low": estimate - error, "high": estimate + error}
    )  # fmt: skip
    points = points[np.isfinite(points["x"]) & np.isfinite(points["y"]) & (points["x"] > 0)]
    fine, coarse = (
        part[part["step"] == step]["estimate"] for step in (part["step"].min(), part["step"].max())
    )
    words = (
        f"At the finest scale between {fine.min():.3g} and {fine.max():.3g} over layers, at the coarsest between "
        f"{coarse.min():.3g} and {coarse.max():.3g}."
    )
    title = f"{_named(name)} over scales"
    says = f"A level stretch is a dimension that holds over scales. {words} Bars are ± one standard error."
    column = column_of("estimate")
    spec = layer_chart(
        points,
        column,
        "distance to the neighbours used",
        layers=layers,
        log=True,
        words=f"{title}. {words}",
        height=320,
    )
    return Chart(title, says, spec, words, wide=True)


def _named(name: object) -> str:
    return ESTIMATORS.get(str(name), str(name).replace("_", " "))


def _layers(part: pd.DataFrame) -> list[str]:
    if part["layer"].notna().all() and part["kind"].nunique(dropna=False) == 1:
        return [str(int(layer)) for layer in part["layer"]]
    return [str(site) for site in part["site"]]


def _shown(rows: pd.DataFrame) -> pd.DataFrame:
    apart = ["_series"] if rows["_series"].nunique() > 1 else []
    drop = {
        "_run",
        "_x",
        "_series",
        "kind",
        "stack",
        "weights",
        "relative_depth",
        "layer",
        "other_layer",
        "other_relative_depth",
    }
    return rows[[*apart, *[name for name in rows if name not in drop]]].rename(columns={"_series": "series"})
