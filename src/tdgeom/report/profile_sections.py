"""Measures of sites over depth, by the question they answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from tdgeom.measures.columns import accompanies, column_of, error_column, is_detail
from tdgeom.report.contents import Chart, Section, Table
from tdgeom.report.profile_charts import measure_chart, measures_chart
from tdgeom.report.reported_run import ReportedRun, series_rows

__all__ = ["IDENTITY", "profile_sections", "tables_of"]

IDENTITY = (
    "model", "weights", "model_key", "model_label", "site", "a", "b", "pair", "kind", "layer", "layer_a", "layer_b", "stack",
    "transition", "variant", "num_layers", "layer_norm_depth", "relative_depth", "tokens_observed", "rows_observed",
    "hidden_dim", "novelty_k", "k_used", "tokens", "rows",
)  # fmt: skip
WIDEST = 12
MARKS = ("near_rank1", "few_rows", "sv_few_rows", "unresolved")


class _Panel(NamedTuple):
    """Measures that share an axis: one chart of one series, else a chart each."""

    names: tuple[str, ...]
    title: str = ""
    says: str = ""
    unit: str = ""
    log: bool = False


SECTIONS: dict[str, tuple[str, str, tuple[_Panel, ...]]] = {
    "dimension": (
        "How many dimensions",
        "Different ways to count the directions in which rows vary. They need not agree: the first counts weigh large "
        "directions, the last the whole tail; intrinsic dimension counts the coordinates needed near each row.",
        (
            _Panel(("d_pr",)), _Panel(("effective_rank",)), _Panel(("d_entropy",)), _Panel(("stable_rank",)),
            _Panel(("k90", "k95", "k99"), "Components for 90, 95 and 99 % of the variance",
                   "How many leading directions hold so much."),
            _Panel(("rankme",)),
        ),
    ),
    "concentration": (
        "How evenly variance is spread",
        "Whether a few directions, or a few features, hold most of the variance, and how fast the spectrum falls.",
        (
            _Panel(("top1_share", "top10_share", "top32_share"), "Variance in the first 1, 10 and 32 components",
                   "Near 1, so few directions hold everything.", "share"),
            _Panel(("alpha_req",)), _Panel(("isoscore",)), _Panel(("top_feature_share",)),
        ),
    ),
    "direction": (
        "Direction and length of rows",
        "Anisotropy, whether rows point into one cone, and norms, whether a few rows are far longer than the others.",
        (
            _Panel(("cos_sim_mean",)),
            _Panel(("norm_q05", "norm_q50", "norm_q95", "norm_max"), "Norms of rows: quantiles and maximum",
                   "Lines far apart: a few rows are much longer than most.", "", True),
        ),
    ),
}  # fmt: skip


def profile_sections(runs: Sequence[ReportedRun]) -> list[Section]:
    """Every measure of the table of sites, in sections; measures that nobody described stand in the last."""
    rows, x = series_rows(runs, "metrics")
    if not len(rows):
        return []
    numbers = [
        str(name)
        for name in rows.select_dtypes(["number"])
        if not str(name).startswith("_") and name not in (*IDENTITY, *MARKS) and rows[name].notna().any()
    ]
    numbers = [name for name in numbers if not is_detail(name, numbers)]
    estimates = [name for name in numbers if name.endswith("_estimate")]
    stems = [str(name).removesuffix("estimate") for name in rows if str(name).endswith("_estimate")]
    accompany = (
        {name for name in numbers if name not in estimates and name.startswith(tuple(stems))}
        if stems
        else set()
    )
    left = [name for name in numbers if name not in accompany]
    sections = []
    for key, (title, says, panels) in SECTIONS.items():
        charts: list[Chart] = []
        for panel in panels:
            have = [name for name in panel.names if name in left]
            charts += _drawn(rows, have, panel, x)
        if key == "dimension":
            panel = _Panel(
                tuple(estimates), "Intrinsic dimension by estimator", "Coordinates needed near each row."
            )
            charts = _drawn(rows, estimates, panel, x) + charts
        own = [
            name
            for name in left
            if column_of(name).theme == key or name in {n for p in panels for n in p.names}
        ]
        own = [one for name in own for one in (name, error_column(name, numbers)) if one is not None]
        own += sorted(accompany, key=numbers.index) if key == "dimension" else []
        if charts:
            sections.append(Section(key, title, says, charts, tables_of(rows, own, title, f"metrics_{key}")))
    placed = {name for section in sections for table in section.tables for name in table.frame.columns}
    others = [name for name in left if name not in placed and not accompanies(name, numbers)]
    charts = [chart for name in others for chart in _drawn(rows, [name], _Panel((name,)), x)]
    marks = [name for name in MARKS if name in rows]
    rest = [*[name for name in numbers if name not in placed], *marks]
    if charts or rest:
        says = "Measures beside those above, and the marks of rows whose numbers need care."
        tables = tables_of(rows, rest, "Further columns", "metrics_others")
        sections.append(Section("others", "Further measures, and marks", says, charts, tables))
    return sections


def _drawn(rows: pd.DataFrame, names: Sequence[str], panel: _Panel, x: str) -> list[Chart]:
    """The charts of a panel, and for several series what they differ by."""
    if not names:
        return []
    if len(names) > 1 and rows["_series"].nunique() == 1:
        chart = measures_chart(
            rows, names, panel.title, panel.says, x, unit=panel.unit, log=panel.log and _positive(rows, names)
        )
        return [] if chart is None else [chart]
    charts: list[Chart | None] = []
    for name in names:
        charts.append(measure_chart(rows, name, x, log=panel.log and _positive(rows, [name])))
    return [chart for chart in charts if chart is not None]


def _positive(rows: pd.DataFrame, names: Sequence[str]) -> bool:
    values = rows[list(names)].to_numpy(float)
    return bool(np.nanmin(values) > 0)


def tables_of(rows: pd.DataFrame, columns: Sequence[str], title: str, name: str) -> list[Table]:
    """Some columns of the rows, behind what says where each row belongs; as many tables as paper is wide."""
    places = ["_series"] if rows["_series"].nunique() > 1 else []
    places += [place for place in ("site", "a", "b", "variant") if place in rows]
    columns = list(dict.fromkeys(columns))
    count = max(1, -(-len(columns) // WIDEST))
    size = -(-len(columns) // count)
    parts = [columns[i * size : (i + 1) * size] for i in range(count)]
    return [
        Table(
            title if count == 1 else f"{title}, part {i + 1} of {count}",
            rows[[*places, *part]].rename(columns={"_series": "series"}),
            name if count == 1 else f"{name}_{i + 1}",
        )
        for i, part in enumerate(parts)
    ]
