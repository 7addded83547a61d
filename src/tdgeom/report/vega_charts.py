"""Charts as Vega-Lite specifications: lines, matrices, spectra. Colours are variables of the page, so that it can turn dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tdgeom.measures.columns import Column
from tdgeom.plot.palette import COLOURS

__all__ = [
    "CONFIG",
    "DEPTH_STEPS",
    "depth_variables",
    "digits",
    "domain_of",
    "heat_map",
    "line_chart",
    "line_colours",
]

DEPTH_STEPS = 48
"""How many colours from the first layer to the last the page has."""
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
SHAPES = (
    "circle",
    "square",
    "diamond",
    "triangle-down",
    "cross",
    "triangle-up",
    "triangle-right",
    "triangle-left",
)
DASHES = ([1, 0], [7, 2], [2, 2], [7, 2, 2, 2])

_INK, _SOFT, _RULE = "var(--ink)", "var(--soft)", "var(--rule)"
CONFIG: dict[str, Any] = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": _SOFT, "titleColor": _INK, "titleFontWeight": "normal", "labelFontSize": 11, "titleFontSize": 12,
        "gridColor": _RULE, "gridOpacity": 0.8, "domainColor": _SOFT, "tickColor": _SOFT, "labelLimit": 160, "titleLimit": 400,
        "titlePadding": 6,
    },
    "legend": {
        "labelColor": _INK, "titleColor": _INK, "titleFontWeight": "normal", "labelLimit": 320, "labelFontSize": 12,
        "symbolStrokeWidth": 2,
    },
    "text": {"color": _INK},
    "rule": {"color": _SOFT},
}  # fmt: skip


def digits(values: Any, keep: int = 5) -> list[Any]:
    """Numbers with as many digits as a picture can show; None for what is none."""
    return [
        None if not np.isfinite(value) else float(f"{value:.{keep}g}") for value in np.asarray(values, float)
    ]


def domain_of(column: Column, values: Any) -> list[float] | None:
    """The axis of a measure that has a range: the range, and what lies outside of it; None where it is open."""
    if column.low is None or column.high is None:
        return None
    found = np.asarray(values, float)
    found = found[np.isfinite(found)]
    # a cosine that is never negative needs no lower half
    low = 0.0 if column.low == -1 and (not len(found) or found.min() >= 0) else column.low
    return [float(min([low, *found])), float(max([column.high, *found]))]


def depth_variables(count: int) -> list[str]:
    """The page's colours of ``count`` layers, from the first to the last."""
    steps = [round(i * (DEPTH_STEPS - 1) / max(count - 1, 1)) for i in range(count)]
    return [f"var(--depth-{step})" for step in steps]


def line_colours(count: int) -> list[str]:
    """The page's colours of ``count`` lines."""
    return [f"var(--line-{i % len(COLOURS)})" for i in range(count)]


def _chart(
    height: int, description: str, layers: Sequence[Mapping[str, Any]], **further: Any
) -> dict[str, Any]:
    return {
        "$schema": SCHEMA,
        "description": description,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "params": [{"name": "hidden_series", "value": []}, {"name": "hidden_layers", "value": []}],
        "layer": list(layers),
        **further,
    }


# Zoomed by the wheel only with Ctrl or Cmd, so that the page scrolls over it; the page's buttons zoom, too.
ZOOM = {
    "name": "zoom",
    "select": {
        "type": "interval",
        "zoom": "wheel![event.ctrlKey || event.metaKey]",
        "encodings": ["x", "y"],
    },
    "bind": "scales",
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
    errors = "low" in rows and rows["low"].notna().any()
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
    ticks = {"values": _whole_ticks(rows["x"]), "format": "d"} if whole else {"tickCount": 6}
    place["axis"] = {**ticks, "grid": False}
    value = {"field": "y", "type": "quantitative", "title": None, "scale": scale, "axis": {"tickCount": 5}}
    legend = (
        {"orient": "bottom", "title": named or None, "columns": 2, "symbolStrokeWidth": 0}
        if len(series) > 1
        else None
    )
    at = [(places or {}).get(name.split(" = ")[0], i) for i, name in enumerate(series)]
    shapes = [SHAPES[i % len(SHAPES)] for i in at]
    colours = line_colours(max(at, default=0) + 1)
    colour = _by_series(series, [colours[i] for i in at], legend)
    tooltip = [
        {"field": "site", "type": "nominal", "title": "site"},
        *([{"field": "series", "type": "nominal", "title": named or "of"}] if len(series) > 1 else []),
        {"field": "y", "type": "quantitative", "title": column.axis, "format": ".5~g"},
        *([{"field": "low", "title": "minus one standard error", "format": ".5~g"},
           {"field": "high", "title": "plus one standard error", "format": ".5~g"}] if errors else []),
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
    return _chart(height, words, layers, data={"values": records}, transform=filters)


def _whole_ticks(values: Any, most: int = 9) -> list[int]:
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


def heat_map(
    grid: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    column: Column,
    *,
    sides: tuple[str, str],
    domain: Sequence[float] | None = None,
    diverging: bool = False,
    words: str = "",
) -> dict[str, Any]:
    """A matrix, rows down; a cell that was not measured stays blank.

    Args:
        sides: what rows and columns are.
        domain: the ends of the colour scale; default the data's.
        diverging: differences, colours from either side of zero.
    """
    found = grid[np.isfinite(grid)]
    if diverging:
        top = float(np.abs(found).max(initial=0.0)) or 1.0
        scale: dict[str, Any] = {"scheme": "blueorange", "domain": [-top, top]}
    else:
        scale = {"scheme": "viridis", **({"domain": list(domain)} if domain else {"zero": False})}
    records = [
        {"r": rows[i], "c": columns[j], "v": digits([grid[i, j]])[0]}
        for i, j in zip(*np.nonzero(np.isfinite(grid)))
    ]
    every = max(1, -(-len(rows) // 24))
    across = max(1, -(-len(columns) // 24))
    long = max(map(len, columns), default=0) > 3
    place = {
        "y": {"field": "r", "type": "nominal", "sort": list(rows), "title": sides[0], "scale": {"domain": list(rows)},
              "axis": {"values": list(rows)[::every], "ticks": False, "domain": False}},
        "x": {"field": "c", "type": "nominal", "sort": list(columns), "title": sides[1],
              "scale": {"domain": list(columns)},
              "axis": {"values": list(columns)[::across], "ticks": False, "domain": False,
                       "labelAngle": -90 if long else 0}},
    }  # fmt: skip
    tooltip = [
        {"field": "r", "title": sides[0]}, {"field": "c", "title": sides[1]},
        {"field": "v", "type": "quantitative", "title": column.axis, "format": ".5~g"},
    ]  # fmt: skip
    layers: list[dict[str, Any]] = [
        {"mark": {"type": "rect", "stroke": "var(--paper)", "strokeWidth": 0.5 if max(grid.shape) <= 48 else 0},
         "encoding": {**place, "tooltip": tooltip,
                      "color": {"field": "v", "type": "quantitative", "scale": scale,
                                "legend": {"title": None, "gradientLength": 150, "format": ".3~g"}}}},
    ]  # fmt: skip
    if max(grid.shape) <= 12 and len(found):
        layers.append(_cell_texts(place, found, scale, diverging))
    height = int(min(max(34, 300 // max(len(rows), 1)), 480 / max(len(rows), 1)) * len(rows))
    return _chart(height, words, layers, data={"values": records})


def _cell_texts(
    place: Mapping[str, Any], found: np.ndarray, scale: Mapping[str, Any], diverging: bool
) -> dict[str, Any]:
    low, high = scale.get("domain") or (float(found.min()), float(found.max()))
    middle = low + 0.55 * (high - low)
    shown = ".2f" if np.abs(found).max() <= 1.0005 else ".3~g"
    colour = {"value": "#000"} if diverging else {
        "condition": {"test": f"datum.v < {middle}", "value": "#fff"}, "value": "#000"}  # fmt: skip
    return {
        "mark": {"type": "text", "fontSize": 11, "aria": False, "tooltip": None},
        "encoding": {
            **place,
            "text": {"field": "v", "type": "quantitative", "format": shown},
            "color": colour,
        },
    }
