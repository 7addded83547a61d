"""Lines over depth, a point at each site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tdgeom.measures.columns import Column
from tdgeom.report.vega_charts import DASHES, SHAPES, ZOOM, chart, digits, line_colours, series_legend

__all__ = ["bars_of", "line_chart", "whole_ticks"]

ENDS = {
    "interval": ("95 % interval, from", "95 % interval, to"),
    "error": ("minus one standard error", "plus one standard error"),
}


def line_chart(
    rows: pd.DataFrame,
    column: Column,
    x: Column,
    *,
    series: Sequence[str],
    named: str = "",
    height: int = 210,
    log: bool = False,
    domain: Sequence[float] | None = None,
    whole: bool = True,
    words: str = "",
    zero: bool = False,
    places: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Lines with a point at each site.

    Args:
        rows: columns ``x``, ``y``, ``series``, ``site``; ``low`` and ``high`` where there are error bars.
        column, x: what the axes are.
        series: the lines' names, in order.
        named: the legend's title.
        log: a logarithmic axis of the measure.
        domain: the ends of the measure's axis.
        whole: places on the axis of depth are whole numbers.
        words: the chart in words.
        zero: a line at zero.
        places: which colour each line has, by its number; default in order.
    """
    data = rows.assign(x=digits(rows["x"]), y=digits(rows["y"]))
    errors = bars_of(rows)
    for name in ("low", "high") if errors else ():
        data[name] = digits(rows[name])
    kept = ["x", "y", "series", "site", *(("low", "high") if errors else ())]
    scale: dict[str, Any] = {"type": "log"} if log else {"zero": False}
    scale |= {"nice": False, "padding": 7, **({} if domain is None else {"domain": list(domain)})}
    place: dict[str, Any] = {
        "field": "x",
        "type": "quantitative",
        "title": x.axis,
        "scale": {"nice": False, "padding": 8, "zero": False},
    }
    ticks = {"values": whole_ticks(rows["x"]), "format": "d"} if whole else {"tickCount": 6}
    place["axis"] = {**ticks, "grid": False}
    value = {"field": "y", "type": "quantitative", "title": None, "scale": scale, "axis": {"tickCount": 5}}
    legend = series_legend(series, named, symbolStrokeWidth=0)
    at = [(places or {}).get(name.split(" = ")[0], i) for i, name in enumerate(series)]
    shapes = [SHAPES[i % len(SHAPES)] for i in at]
    colours = line_colours(max(at, default=0) + 1)
    colour = _by_series(series, [colours[i] for i in at], legend)
    tooltip = [
        {"field": "site", "type": "nominal", "title": "site"},
        *([{"field": "series", "type": "nominal", "title": named or "of"}] if len(series) > 1 else []),
        {"field": "y", "type": "quantitative", "title": column.axis, "format": ".5~g"},
        *({"field": end, "title": ENDS[errors][place], "format": ".5~g"}
          for place, end in enumerate(("low", "high") if errors else ())),
    ]  # fmt: skip
    dashes = _by_series(series, [DASHES[i % len(DASHES)] for i in at], legend)
    layers: list[dict[str, Any]] = [
        {"mark": {"type": "line", "strokeWidth": 1.8}, "params": [ZOOM],
         "encoding": {"x": place, "y": value, "color": colour, "strokeDash": dashes}},
        {"mark": {"type": "point", "filled": True, "size": 46, "opacity": 1},
         "encoding": {"x": place, "y": value, "color": colour, "tooltip": tooltip,
                      "shape": _by_series(series, shapes, legend)}},
    ]  # fmt: skip
    if errors:
        layers.insert(0, {"mark": {"type": "rule", "strokeWidth": 1.2}, "encoding": {
            "x": place, "y": {**value, "field": "low"}, "y2": {"field": "high"}, "color": colour}})  # fmt: skip
    if zero:
        layers.insert(0, {"data": {"values": [{"y": 0}]}, "mark": {"type": "rule", "strokeDash": [3, 3]},
                          "encoding": {"y": {"field": "y", "type": "quantitative"}}})  # fmt: skip
    filters = [{"filter": "indexof(hidden_series, datum.series) < 0"}]
    records = data[kept].to_dict(orient="records")
    return chart(height, words, layers, data={"values": records}, transform=filters)


def bars_of(rows: pd.DataFrame) -> str:
    """What bars ``low`` and ``high`` are: "interval", "error", or "" for none."""
    if "low" not in rows or not rows["low"].notna().any():
        return ""
    return "interval" if "bars" in rows and (rows["bars"] == "interval").any() else "error"


def whole_ticks(values: Any, most: int = 9) -> list[int]:
    """Whole numbers along the axis, at most so many."""
    found = np.asarray(values, float)
    found = found[np.isfinite(found)]
    if not len(found):
        return [0]
    low, high = int(found.min()), int(found.max())
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000, 10**6) if (high - low) / step < most)
    return list(range(low, high + 1, step))


def _by_series(
    series: Sequence[str], values: Sequence[Any], legend: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {
        "field": "series",
        "type": "nominal",
        "scale": {"domain": list(series), "range": list(values)},
        "legend": None if legend is None else dict(legend),
    }
