"""Measures against the number of rows: have they settled?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tdgeom.measures.columns import column_of
from tdgeom.report.contents import Chart, Section, Table
from tdgeom.report.layer_lines import in_order, layer_chart
from tdgeom.report.reported_run import ReportedRun, series_rows

__all__ = ["convergence_section"]

DRAWN = 8
SAYS = (
    "The same measure on ever more rows of the sample. A level end has settled; one that still climbs says as much of the number "
    "of rows as of the model."
)


def convergence_section(runs: Sequence[ReportedRun]) -> Section | None:
    """The table of ``convergence``: a line a layer over rows, those measures first that have not settled."""
    rows, _ = series_rows(runs, "diagnostics/convergence")
    if not len(rows) or "site" not in rows:
        return None
    layers = in_order(_layers(rows))
    settled = rows.groupby("metric", sort=False)["converged"].mean()
    names = list(settled.sort_values(kind="stable").index[:DRAWN])
    charts = [_curve(str(name), rows[rows["metric"] == name], layers) for name in names]
    shown = ["site", "metric", "rows", "value", "limit", "converged"]
    apart = ["_series"] if rows["_series"].nunique() > 1 else []
    table = rows[[*apart, *shown]].rename(columns={"_series": "series"})
    return Section(
        "convergence",
        "Have the numbers settled?",
        SAYS,
        charts,
        [Table("Convergence", table, "convergence")],
        layers,
        layers,
    )


def _curve(name: str, part: pd.DataFrame, layers: Sequence[str]) -> Chart:
    column = column_of(name)
    points = pd.DataFrame(
        {"x": part["rows"].to_numpy(float), "y": part["value"].to_numpy(float), "layer": _layers(part),
         "series": part["_series"].astype(str)}
    )  # fmt: skip
    points = points[np.isfinite(points["y"])]
    sites = part.drop_duplicates(["_series", "site"])
    words = f"Settled at {int(sites['converged'].sum())} of {len(sites)} sites."
    title = f"{column.label[0].upper()}{column.label[1:]}"
    spec = layer_chart(points, column, "rows", layers=layers, log=True, words=f"{title} over rows. {words}")
    return Chart(title, words, spec, words)


def _layers(part: pd.DataFrame) -> list[str]:
    if part["layer"].notna().all() and part["kind"].nunique(dropna=False) == 1:
        return [str(int(layer)) for layer in part["layer"]]
    return [str(site) for site in part["site"]]
