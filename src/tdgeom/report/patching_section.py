"""Grids of activation patching: what each site and position, or head, carries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tdgeom.measures.columns import Column
from tdgeom.report.contents import Chart, Section, Table
from tdgeom.report.heat_maps import heat_map
from tdgeom.report.reported_run import ReportedRun

__all__ = ["patching_section"]

RECOVERED = Column("share of the effect restored", "", 0, 1)


def patching_section(runs: Sequence[ReportedRun]) -> Section | None:
    """The tables ``patching`` of all runs: columns kind, metric (of several), layer, column, label, grid, recovered."""
    charts: list[Chart] = []
    tables: list[Table] = []
    for run in runs:
        table = run.tables.get("patching")
        if table is None or not len(table):
            continue
        of = f", {run.name}" if len(runs) > 1 else ""
        parts = ["kind", "metric"] if "metric" in table else ["kind"]
        for names, part in table.groupby(parts, sort=False):
            charts.append(_chart(f"{', '.join(map(str, names))}{of}", part))
        tables.append(Table(f"Patching{of}", table, f"patching_{len(tables) + 1}"))
    if not charts:
        return None
    says = (
        "One activation at a time is taken from the other run. Near 1, that place alone gives the other run's answer; near 0, it "
        "carries nothing of it; below 0, it works against it."
    )
    return Section("patching", "Activation patching", says, charts, tables)


def _chart(name: str, part: pd.DataFrame) -> Chart:
    by = str(part["by"].iloc[0]) if "by" in part else "column"
    value = "recovered" if part["recovered"].notna().any() else "grid"
    labels = part["label"] if "label" in part else part["column"].astype(str)
    columns = dict(zip(part["column"], labels))
    across = [
        f"{index} {label}" if str(label) != str(index) else str(index) for index, label in columns.items()
    ]
    grid = part.pivot(index="layer", columns="column", values=value).reindex(columns=list(columns))
    rows = [str(layer) for layer in grid.index]
    values = grid.to_numpy(dtype=float)
    column = RECOVERED if value == "recovered" else Column("the metric")
    best = part.iloc[int(np.nanargmax(np.abs(part[value].to_numpy(float))))]
    words = f"Largest {best[value]:.3g}, layer {best['layer']}, {by} {columns[best['column']]}."
    low, high = float(pd.Series(values.ravel()).min()), float(pd.Series(values.ravel()).max())
    domain = [min(0.0, low), max(1.0, high)] if value == "recovered" else None
    spec = heat_map(
        values, rows, across, column, sides=("layer", by), domain=domain, words=f"Patching of {name}. {words}"
    )
    return Chart(f"Patching {name}", f"Layers down, {by} across. {words}", spec, words, wide=len(across) > 16)
