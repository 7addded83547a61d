"""Lines that are layers, coloured from the first to the last, against anything: a scale, a step of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from tdgeom.measures.columns import Column
from tdgeom.report.vega_charts import DASHES, ZOOM, chart, depth_variables, digits, series_legend

__all__ = ["HIDDEN", "in_order", "layer_chart", "layer_colours", "series_dashes"]

HIDDEN = {"filter": "indexof(hidden_layers, datum.layer) < 0 && indexof(hidden_series, datum.series) < 0"}


def in_order(layers: Sequence[str]) -> list[str]:
    """Names of layers once each: numbers by size, other names behind them.

    >>> in_order(["10", "2", "final_norm", "2"])
    ['2', '10', 'final_norm']
    """
    return sorted(
        dict.fromkeys(layers), key=lambda name: (int(name), "") if name.isdigit() else (10**9, name)
    )


def layer_colours(layers: Sequence[str]) -> dict[str, Any]:
    """The colours of layers; the legend names at most twelve."""
    few = list(layers)[:: max(1, -(-len(layers) // 12))]
    return {
        "field": "layer",
        "type": "nominal",
        "sort": list(layers),
        "scale": {"domain": list(layers), "range": depth_variables(len(layers))},
        "legend": {"orient": "right", "title": "layer", "values": few, "symbolType": "stroke"},
    }


def series_dashes(series: Sequence[str]) -> dict[str, Any]:
    """What tells runs apart where colours are layers."""
    return {
        "field": "series", "type": "nominal",
        "scale": {"domain": list(series), "range": [DASHES[i % len(DASHES)] for i in range(len(series))]},
        "legend": series_legend(series, symbolType="stroke", symbolSize=400),
    }  # fmt: skip


def layer_chart(
    rows: pd.DataFrame,
    column: Column,
    x: str,
    *,
    layers: Sequence[str],
    log: bool = False,
    words: str = "",
    height: int = 260,
) -> dict[str, Any]:
    """A line a layer with a point at each place; ``rows``: ``x``, ``y``, ``layer``, ``series``, perhaps ``low`` and ``high``."""
    series = list(dict.fromkeys(rows["series"]))
    data = rows.assign(x=digits(rows["x"]), y=digits(rows["y"]))
    errors = "low" in rows and rows["low"].notna().any()
    for name in ("low", "high") if errors else ():
        data[name] = digits(rows[name])
    encoding: dict[str, Any] = {
        "x": {"field": "x", "type": "quantitative", "title": x, "axis": {"tickCount": 6, "format": "~s"},
              "scale": {"nice": False, "padding": 8, **({"type": "log"} if log else {"zero": False})}},
        "y": {"field": "y", "type": "quantitative", "title": None, "axis": {"tickCount": 5},
              "scale": {"nice": False, "padding": 7, "zero": False}},
        "color": layer_colours(layers),
    }  # fmt: skip
    tooltip = [
        {"field": "layer", "title": "layer"}, {"field": "x", "title": x, "format": ".4~g"},
        {"field": "y", "title": column.axis, "format": ".4~g"},
    ]  # fmt: skip
    if len(series) > 1:
        tooltip.insert(0, {"field": "series", "title": "of"})
        encoding["strokeDash"] = series_dashes(series)
    marks: list[dict[str, Any]] = [
        {"params": [ZOOM], "mark": {"type": "line", "strokeWidth": 1.6}, "encoding": encoding},
        {
            "mark": {"type": "point", "filled": True, "size": 30, "opacity": 1},
            "encoding": {**{key: encoding[key] for key in ("x", "y", "color")}, "tooltip": tooltip},
        },
    ]
    if errors:
        marks.insert(0, {"mark": {"type": "rule"}, "encoding": {
            "x": encoding["x"], "y": {**encoding["y"], "field": "low"}, "y2": {"field": "high"},
            "color": encoding["color"]}})  # fmt: skip
    kept = ["x", "y", "layer", "series", *(("low", "high") if errors else ())]
    return chart(
        height, words, marks, data={"values": data[kept].to_dict(orient="records")}, transform=[HIDDEN]
    )
