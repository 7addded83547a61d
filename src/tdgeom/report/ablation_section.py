"""The ablation of normalisations, as small multiples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tdgeom.report.contents import Chart, Section
from tdgeom.report.profile_charts import measure_chart
from tdgeom.report.profile_sections import IDENTITY, MARKS, tables_of
from tdgeom.report.reported_run import ReportedRun, series_rows

__all__ = ["ablation_section"]

DRAWN = ("d_pr", "effective_rank", "d_entropy", "stable_rank", "top1_share", "alpha_req")
VARIANTS = {
    "raw": "raw", "token_l2": "rows at unit length", "token_rms": "rows at unit RMS",
    "feature_standardized": "features at unit variance", "feature_standardised": "features at unit variance",
}  # fmt: skip


def ablation_section(runs: Sequence[ReportedRun]) -> Section | None:
    """A chart a measure with a line a normalisation; of several runs a chart a normalisation, with a line a run."""
    rows, x = series_rows(runs, "diagnostics/normalization_ablation")
    if not len(rows) or "variant" not in rows:
        return None
    measures = [name for name in DRAWN if name in rows and rows[name].notna().any()]
    charts: list[Chart] = []
    if rows["_series"].nunique() == 1:
        named = rows.assign(_series=[VARIANTS.get(str(v), str(v)) for v in rows["variant"]])
        charts = [chart for name in measures if (chart := measure_chart(named, name, x)) is not None]
    else:
        for name in measures[:2]:
            for variants, part in _apart(rows, name):
                chart = measure_chart(part, name, x)
                if chart is not None:
                    title = f"{chart.title}, {' = '.join(VARIANTS.get(one, one) for one in variants)}"
                    charts.append(Chart(title, chart.says, chart.spec, chart.words))
    numbers = [
        str(name)
        for name in rows.select_dtypes("number")
        if not str(name).startswith("_") and name not in (*IDENTITY, *MARKS)
    ]
    says = (
        "The same measures after rows are scaled to one length, or features to one variance. Where a line leaves the raw one, a "
        "few long rows or large features make the number."
    )
    columns = [*numbers, *[name for name in MARKS if name in rows]]
    tables = tables_of(rows, columns, "Every normalisation", "normalization_ablation")
    return Section("ablation", "What normalisation changes", says, charts, tables)


def _apart(rows: pd.DataFrame, name: str) -> list[tuple[list[str], pd.DataFrame]]:
    """The rows of each normalisation; those that give the same numbers once, under all their names."""
    found: list[tuple[list[str], pd.DataFrame]] = []
    for variant, part in rows.groupby("variant", sort=False):
        values = part[name].to_numpy(dtype=float)
        for variants, other in found:
            same = len(other) == len(part) and list(other["_x"]) == list(part["_x"])
            if same and np.allclose(
                other[name].to_numpy(dtype=float), values, rtol=1e-6, atol=0, equal_nan=True
            ):
                variants.append(str(variant))
                break
        else:
            found.append(([str(variant)], part))
    return found
