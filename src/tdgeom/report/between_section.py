"""Measures between two sites: lines where each site has one partner, matrices where it has several."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tdgeom.measures.columns import accompanies, column_of, fixed_ends, is_detail
from tdgeom.plot.pair_grids import pair_grid, short_names, side_name
from tdgeom.report.contents import Chart, Section
from tdgeom.report.heat_maps import heat_map
from tdgeom.report.profile_charts import measure_chart
from tdgeom.report.profile_sections import IDENTITY, MARKS, tables_of
from tdgeom.report.reported_run import ReportedRun, series_rows

__all__ = ["between_section"]


def between_section(runs: Sequence[ReportedRun]) -> Section | None:
    """The table of pairs of sites of all runs."""
    rows, x = series_rows(runs, "novelty")
    measures = [
        str(name)
        for name in rows.select_dtypes("number")
        if not str(name).startswith("_") and name not in (*IDENTITY, *MARKS) and rows[name].notna().any()
    ]
    if not measures:
        return None
    measures = [name for name in measures if not is_detail(name, measures)]
    shown = [name for name in measures if not accompanies(name, measures)]
    single = not rows.duplicated(["_series", "a"]).any() and len(rows) > 1
    charts: list[Chart] = []
    for name in shown:
        charts += _lines(rows, name, x) if single else _matrices(rows, name)
    says = (
        "What changes from one site to the next: high similarity, or low novelty, means that a layer changes little."
        if single
        else "Every measured pair of sites: bright blocks are layers with alike geometry. A pair that was not measured is blank."
    )
    tables = tables_of(
        rows, [*measures, *[name for name in MARKS if name in rows]], "Pairs of sites", "pairs"
    )
    title = "From one site to the next" if single else "Site by site"
    return Section("between", title, says, charts, tables)


def _lines(rows: pd.DataFrame, name: str, x: str) -> list[Chart]:
    chart = measure_chart(rows, name, "from_layer" if x == "layer" else x)
    return [] if chart is None else [chart]


def _matrices(rows: pd.DataFrame, name: str) -> list[Chart]:
    if name.endswith("_ba") and f"{name[:-3]}_ab" in rows and set(rows["a"]) & set(rows["b"]):
        return []  # both directions stand in one matrix
    column = column_of(name)
    charts, grids = [], {}
    for series, part in rows.groupby("_series", sort=False):
        if part[name].isna().all():
            continue
        grid, down, across = pair_grid(part, name, True, "auto")
        grids[str(series)] = (grid, down, across)
        several = f", {series}" if rows["_series"].nunique() > 1 else ""
        charts.append(_matrix(f"{column.label}{several}", grid, down, across, name))
    if len(grids) == 2:
        (one, (a, down, across)), (other, (b, down_b, across_b)) = grids.items()
        if down == down_b and across == across_b:
            charts.append(
                _matrix(f"{column.label}: {other} minus {one}", b - a, down, across, name, difference=True)
            )
    return charts


def _matrix(
    title: str, grid: np.ndarray, down: list[str], across: list[str], name: str, difference: bool = False
) -> Chart:
    column = column_of(name)
    rows, columns = short_names(down), short_names(across)
    words = _said(grid, rows, columns, down == across)
    sides = (side_name(down), side_name(across))
    domain = None if difference else fixed_ends(column, grid.ravel())
    spec = heat_map(
        grid,
        rows,
        columns,
        column,
        sides=sides,
        domain=domain,
        diverging=difference,
        words=f"{title}. {words}",
    )
    says = "Orange is more, blue is less." if difference else column.says
    return Chart(f"{title[0].upper()}{title[1:]}", f"{says} {words}".strip(), spec, words)


def _said(grid: np.ndarray, rows: list[str], columns: list[str], own: bool) -> str:
    """The extremes of a matrix, its diagonal aside."""
    values = np.array(grid, dtype=float)
    if own and values.shape[0] == values.shape[1]:
        np.fill_diagonal(values, np.nan)
    if not np.isfinite(values).any():
        return ""
    low, high = (np.unravel_index(pick(values), values.shape) for pick in (np.nanargmin, np.nanargmax))
    return (
        f"Highest {values[high]:.3g} (row {rows[high[0]]}, column {columns[high[1]]}), lowest {values[low]:.3g} (row "
        f"{rows[low[0]]}, column {columns[low[1]]})."
    )
