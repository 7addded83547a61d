"""How routers of a mixture of experts spread rows over experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tdgeom.measures.columns import column_of
from tdgeom.report.contents import Chart, Section
from tdgeom.report.heat_maps import heat_map
from tdgeom.report.profile_charts import measure_chart
from tdgeom.report.profile_sections import IDENTITY, tables_of
from tdgeom.report.reported_run import ReportedRun, series_rows

__all__ = ["router_section"]


def router_section(runs: Sequence[ReportedRun]) -> Section | None:
    """Loads as a matrix of routers and experts, and how even they are over depth."""
    rows, x = series_rows(runs, "router")
    if not len(rows):
        return None
    charts: list[Chart] = []
    for series, part in rows.groupby("_series", sort=False) if "load" in rows else ():
        loads = [np.asarray(load, dtype=float) for load in part["load"] if load is not None]
        if not loads or len({len(load) for load in loads}) > 1 or len(loads) != len(part):
            continue
        grid = np.stack(loads)
        names = [str(site) for site in part["site"]]
        if "layer" in part and part["layer"].notna().all() and part["layer"].is_unique:
            names = [str(int(layer)) for layer in part["layer"]]
        experts = [str(index) for index in range(grid.shape[1])]
        worst = np.unravel_index(grid.argmax(), grid.shape)
        words = (
            f"Even use would be {1 / grid.shape[1]:.3g}; the largest share is {grid.max():.3g}, expert {worst[1]} at "
            f"{names[worst[0]]}."
        )
        several = f", {series}" if rows["_series"].nunique() > 1 else ""
        spec = heat_map(
            grid, names, experts, column_of("load"), sides=("layer", "expert"), domain=[0.0, float(grid.max())],
            words=f"Load of every expert{several}. {words}",
        )  # fmt: skip
        says = f"The share of rows sent to each expert, a row a router; bright columns are overused. {words}"
        charts.append(Chart(f"Load of every expert{several}", says, spec, words))
    for name in ("router_entropy_norm", "load_imbalance", "top_expert_load"):
        if name in rows and (chart := measure_chart(rows, name, x)) is not None:
            charts.append(chart)
    numbers = [
        str(name)
        for name in rows.select_dtypes("number")
        if not str(name).startswith("_") and name not in IDENTITY
    ]
    vectors = [name for name in ("load", "mean_probability") if name in rows]
    tables = tables_of(rows, [*numbers, *vectors], "Routers", "router")
    says = "Whether a mixture of experts uses its experts alike."
    return Section("router", "Routers", says, charts, tables)
