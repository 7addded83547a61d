"""The spectra: eigenvalues against their rank, one line a layer, ending where the precision does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from tdgeom.numerics.numerical_rank import above_rounding
from tdgeom.report.contents import Chart, Section, Table
from tdgeom.report.layer_lines import HIDDEN, in_order, layer_colours, series_dashes
from tdgeom.report.reported_run import ReportedRun
from tdgeom.report.vega_charts import ZOOM, chart, digits

__all__ = ["spectrum_section"]

POINTS = 150
UNTRAINED = "untrained_"


class _Line(NamedTuple):
    series: str
    layer: str
    values: np.ndarray
    rank: int


def spectrum_section(runs: Sequence[ReportedRun]) -> Section | None:
    """All layers' spectra in one chart; of several runs, each run's dashes."""
    lines = [line for run in runs for line in _lines(run, len(runs) > 1)]
    lines = [line for line in lines if len(line.values) and line.values[0] > 0]
    if not lines:
        return None
    layers = in_order([line.layer for line in lines])
    series = list(dict.fromkeys(line.series for line in lines))
    says = (
        "Each line is a layer: the share of the variance in its first, second, third ... direction. A line that falls early "
        "means that few directions hold the variance. Lines end where rounding begins; ranks beyond are shaded."
    )
    words = _words(lines)
    drawn = Chart(
        "Eigenvalue spectrum of every layer", words, _spec(lines, layers, series, words), words, wide=True
    )
    ranks = pd.DataFrame(
        [
            {"series": line.series, "layer": line.layer, "width": len(line.values), "numerical_rank": line.rank,
             "first_share": line.values[0] / line.values.sum(), "total_variance": line.values.sum()}
            for line in lines
        ]
    )  # fmt: skip
    ranks = ranks.drop(columns="series") if len(series) == 1 else ranks
    at_start = (
        layers if len(series) == 1 or len(layers) < 4 else [layers[0], layers[len(layers) // 2], layers[-1]]
    )
    return Section(
        "spectra",
        "Spectra",
        says,
        [drawn],
        [Table("What each spectrum resolves", ranks, "spectra")],
        layers,
        at_start,
    )


def _lines(run: ReportedRun, several: bool) -> list[_Line]:
    found = []
    untrained = any(key.startswith(UNTRAINED) for key in run.eigenvalues)
    for key, values in run.eigenvalues.items():
        values = np.asarray(values, dtype=np.float64)
        values = values[np.isfinite(values)]
        name = key.removeprefix(UNTRAINED)
        weights = ("untrained" if key.startswith(UNTRAINED) else "trained") if untrained else None
        series = ", ".join(filter(None, [run.name if several or not untrained else None, weights]))
        layer = str(int(name[6:])) if name.startswith("layer_") and name[6:].isdigit() else name
        found.append(_Line(series, layer, values, _rank(run, name, weights, values)))
    return found


def _rank(run: ReportedRun, name: str, weights: str | None, values: np.ndarray) -> int:
    """The numerical rank that the table of metrics has, else what lies above rounding."""
    own = int(above_rounding(torch.as_tensor(values)).sum())
    table = run.tables.get("metrics")
    if table is None or not {"numerical_rank", "site"} <= set(table):
        return own
    if weights is not None and "weights" in table:
        table = table[table["weights"] == weights]
    by_layer = name.startswith("layer_") and name[6:].isdigit() and "layer" in table
    found = table[table["layer"] == int(name[6:])] if by_layer else table[table["site"] == name]
    told = found["numerical_rank"].dropna()
    return min(own, int(told.iloc[0])) if len(told) == 1 and told.iloc[0] >= 0 else own


def _words(lines: Sequence[_Line]) -> str:
    """The chart in one sentence."""
    first = [line.values[0] / line.values.sum() for line in lines]
    low, high = int(np.argmin(first)), int(np.argmax(first))
    if low == high:
        return f"The first direction holds {first[0]:.1%} of the variance of layer {lines[0].layer}."
    named = [
        f"{line.layer}{f' ({line.series})' if len({one.series for one in lines}) > 1 else ''}"
        for line in lines
    ]
    return (
        f"The first direction holds from {first[low]:.1%} of the variance (layer {named[low]}) to {first[high]:.1%} "
        f"(layer {named[high]})."
    )


def _spec(lines: Sequence[_Line], layers: Sequence[str], series: Sequence[str], words: str) -> dict[str, Any]:
    records, bottoms = [], []
    for line in lines:
        rank = max(line.rank, 1)
        shares = line.values / line.values.sum()
        at = np.unique(np.round(np.geomspace(1, rank, POINTS)).astype(int))
        records.append(
            {"layer": line.layer, "series": line.series, "rank": at.tolist(), "share": digits(shares[at - 1])}
        )
        bottoms.append(shares[:rank][int(0.98 * (rank - 1))])
    width = max(len(line.values) for line in lines)
    first_lost = min((line.rank for line in lines if line.rank < len(line.values)), default=width)
    top = max(line.values[0] / line.values.sum() for line in lines)
    x = {
        "field": "rank",
        "type": "quantitative",
        "title": "rank of the eigenvalue",
        "scale": {"type": "log", "domain": [1, max(width, 2)], "nice": False},
        "axis": {"tickCount": 10, "format": "~s"},
    }
    y = {"field": "share", "type": "quantitative", "title": "share of variance, λ/Σλ",
         "scale": {"type": "log", "domain": [float(f"{min(bottoms) / 3:.3g}"), float(f"{min(top * 1.3, 1.0):.3g}")],
                   "nice": False, "clamp": True},
         "axis": {"tickCount": 8, "format": "~g"}}  # fmt: skip
    encoding: dict[str, Any] = {"x": x, "y": y, "color": layer_colours(layers)}
    tooltip = [
        {"field": "layer", "title": "layer"},
        {"field": "rank", "title": "rank"},
        {"field": "share", "title": "share of variance", "format": ".4~g"},
    ]
    if len(series) > 1:
        tooltip.insert(0, {"field": "series", "title": "of"})
        encoding["strokeDash"] = series_dashes(series)
    shown = [HIDDEN, {"flatten": ["rank", "share"]}]
    marks: list[dict[str, Any]] = [
        {"params": [ZOOM],
         "mark": {"type": "line", "strokeWidth": 1.7, "clip": True}, "encoding": encoding},
        {"mark": {"type": "point", "size": 60, "opacity": 0, "clip": True, "aria": False},
         "encoding": {"x": x, "y": y, "tooltip": tooltip}},
    ]  # fmt: skip
    if first_lost < width:
        band = {"data": {"values": [{"from": max(first_lost, 1), "to": width}]},
                "mark": {"type": "rect", "color": "var(--shade)", "clip": True, "tooltip": "beyond the numerical rank"},
                "encoding": {"x": {**x, "field": "from"}, "x2": {"field": "to"}}}  # fmt: skip
        marks.insert(0, band)
    return chart(400, words, marks, data={"values": records}, transform=shown)
