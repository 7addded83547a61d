"""A sweep: the same sites measured at several steps of training, or at several values of anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tdgeom.measures.columns import column_of, error_column
from tdgeom.report.contents import Chart, Section, Table
from tdgeom.report.layer_lines import in_order, layer_chart
from tdgeom.report.reported_run import ReportedRun, series_rows

__all__ = ["last_step", "sweep_section"]

DRAWN = (
    "loss", "d_pr", "effective_rank", "twonn_estimate", "rankme", "top1_share", "alpha_req", "cos_sim_mean", "norm_mean",
    "feature_subspace_novelty", "linear_cka_debiased", "linear_cka",
)  # fmt: skip


def last_step(run: ReportedRun) -> ReportedRun:
    """A run of many steps as its last, with all of them in the table ``sweep``; any other as it is."""
    metrics = run.tables.get("metrics")
    if metrics is None or "step" not in metrics or metrics["step"].nunique() < 2:
        return run
    last = metrics["step"].max()
    tables = {
        name: table[table["step"] == last].reset_index(drop=True)
        if "step" in table and name != "sweep"
        else table
        for name, table in run.tables.items()
    }
    return ReportedRun(run.name, {"sweep": metrics, **tables}, run.eigenvalues, run.metadata)


def sweep_section(runs: Sequence[ReportedRun]) -> Section | None:
    """A chart a measure: its value over steps, a line a layer."""
    rows, _ = series_rows(runs, "sweep")
    if not len(rows):
        return None
    names = [str(int(n)) if n == n else str(s) for n, s in zip(rows["layer"], rows["site"])]
    if rows["kind"].nunique() > 1:
        names = [str(site) for site in rows["site"]]
    layers = in_order(names)
    charts = []
    for name in DRAWN:
        if name not in rows or rows[name].isna().all():
            continue
        points = pd.DataFrame(
            {"x": rows["step"].to_numpy(float), "y": pd.to_numeric(rows[name], errors="coerce").to_numpy(float), "layer": names,
             "series": rows["_series"].astype(str)}
        )  # fmt: skip
        if (error := error_column(name, rows.columns)) is not None:
            bar = pd.to_numeric(rows[error], errors="coerce").to_numpy(float)
            points["low"], points["high"] = points["y"] - bar, points["y"] + bar
        points = points[np.isfinite(points["y"])].sort_values("x", kind="stable")
        column = column_of(name)
        ends = [points[points["x"] == step]["y"].mean() for step in (points["x"].min(), points["x"].max())]
        words = f"Mean over layers {ends[0]:.3g} at the first step and {ends[1]:.3g} at the last."
        spec = layer_chart(points, column, "step", layers=layers, words=f"{column.label} over steps. {words}")
        title = f"{column.label[0].upper()}{column.label[1:]} over steps"
        charts.append(Chart(title, f"{column.says} {words}", spec, words))
    if not charts:
        return None
    says = f"A line a layer over {rows['step'].nunique()} steps; the sections below show the last, {rows['step'].max():,}."
    shown = [name for name in ("step", "site", *DRAWN) if name in rows]
    table = Table("Over steps", rows[shown], "sweep")
    return Section("sweep", "Over training", says, charts, [table], layers, layers)
