"""A sweep: the same sites measured at several steps of training, or at several values of anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tdgeom.measures.columns import BETWEEN_STEPS, accompanies, column_of, error_column, is_detail
from tdgeom.plot.pair_grids import short_names
from tdgeom.report.contents import Chart, Section, Table
from tdgeom.report.layer_lines import in_order, layer_chart
from tdgeom.report.profile_sections import IDENTITY, MARKS
from tdgeom.report.reported_run import ReportedRun, series_rows

__all__ = ["last_step", "steps_together", "sweep_section"]

DRAWN = (
    "loss", "d_pr", "effective_rank", "twonn_estimate", "rankme", "top1_share", "alpha_req", "cos_sim_mean", "norm_mean",
    "label_overlap", "feature_subspace_novelty", "linear_cka_debiased", "linear_cka",
)  # fmt: skip
MOST = 16  # charts


def steps_together(runs: Sequence[ReportedRun]) -> list[ReportedRun]:
    """Runs of one step each, over the same sites, as a sweep: the first and the last stay, to be compared."""
    steps = [_own_step(run) for run in runs]
    if len(runs) < 2 or None in steps or len(set(steps)) < len(runs):
        return list(runs)
    tables = [run.tables["metrics"].assign(step=step) for run, step in zip(runs, steps)]
    if any(set(table["site"]) != set(tables[0]["site"]) for table in tables):
        return list(runs)
    order = sorted(range(len(runs)), key=lambda i: float(steps[i] or 0))
    sweep = pd.concat([tables[i] for i in order], ignore_index=True)
    first, last = (
        ReportedRun(f"step {steps[i]:,}", runs[i].tables, runs[i].eigenvalues, runs[i].metadata)
        for i in (order[0], order[-1])
    )
    return [
        ReportedRun(first.name, {**first.tables, "sweep": sweep}, first.eigenvalues, first.metadata),
        last,
    ]


def _own_step(run: ReportedRun) -> int | float | None:
    """The step of training that a run's tables, or its metadata, tell."""
    metrics = run.tables.get("metrics")
    if metrics is None or "site" not in metrics or not len(metrics):
        return None
    told = metrics["step"].unique().tolist() if "step" in metrics else [run.metadata.get("step")]
    return told[0] if len(told) == 1 and isinstance(told[0], int | float) and np.isfinite(told[0]) else None


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


def _names(rows: pd.DataFrame) -> list[str]:
    """What a line is called: the number of its layer where that tells sites apart."""
    sites = [str(site) for site in rows["site"]]
    layers = rows["layer"] if "layer" in rows else pd.Series(np.nan, rows.index)
    if layers.notna().all() and layers.nunique() == len(set(sites)):
        return [f"{layer:g}" for layer in layers]
    once = list(dict.fromkeys(sites))
    short = dict(zip(once, short_names(once)))
    return [short[site] for site in sites]


def sweep_section(runs: Sequence[ReportedRun]) -> Section | None:
    """A chart a measure: its value over steps, a line a layer."""
    rows, _ = series_rows(runs, "sweep")
    if not len(rows):
        return None
    names = _names(rows)
    layers = in_order(names)
    charts = []
    numbers = [str(name) for name in rows.select_dtypes("number") if rows[name].notna().any()]
    others = [
        name
        for name in numbers
        if not (name.startswith("_") or name in (*IDENTITY, *MARKS, *DRAWN, "step"))
        and not (is_detail(name, numbers) or accompanies(name, numbers))
    ]
    others.sort(key=lambda name: not name.endswith(BETWEEN_STEPS))  # how far steps lie apart comes first
    drawn = [*[name for name in DRAWN if name in numbers], *others][:MOST]
    for name in drawn:
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
    below = "the first and the last" if len(runs) > 1 else f"the last, {rows['step'].max():,}"
    says = f"A line a layer over {rows['step'].nunique()} steps; the sections below show {below}."
    shown = [name for name in ("step", "site", *drawn) if name in rows]
    table = Table("Over steps", rows[shown], "sweep")
    return Section("sweep", "Over training", says, charts, [table], layers, layers)
