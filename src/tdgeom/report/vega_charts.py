"""What all charts share as Vega-Lite: frame, axes, colours (variables of the page, so that it can turn dark), zoom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tdgeom.plot.palette import COLOURS

__all__ = [
    "CONFIG",
    "DASHES",
    "DEPTH_STEPS",
    "SHAPES",
    "ZOOM",
    "chart",
    "depth_variables",
    "digits",
    "line_colours",
    "series_legend",
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


def depth_variables(count: int) -> list[str]:
    """The page's colours of ``count`` layers, from the first to the last."""
    steps = [round(i * (DEPTH_STEPS - 1) / max(count - 1, 1)) for i in range(count)]
    return [f"var(--depth-{step})" for step in steps]


def line_colours(count: int) -> list[str]:
    """The page's colours of ``count`` lines."""
    return [f"var(--line-{i % len(COLOURS)})" for i in range(count)]


def chart(
    height: int, description: str, layers: Sequence[Mapping[str, Any]], **further: Any
) -> dict[str, Any]:
    """A chart as wide as its box, with the names of lines and layers that the page hides."""
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


def series_legend(series: Sequence[str], title: str = "", **how: Any) -> dict[str, Any] | None:
    """The names of lines below a chart, one under the other where two would not stand side by side; None of one line."""
    if len(series) < 2:
        return None
    columns = 2 if max(map(len, series)) <= 18 else 1
    return {"orient": "bottom", "title": title or None, "columns": columns, "labelLimit": 250, **how}


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
