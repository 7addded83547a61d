"""Matrices as heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tdgeom.measures.columns import Column
from tdgeom.report.vega_charts import chart, digits

__all__ = ["heat_map"]


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
    return chart(height, words, layers, data={"values": records})


def _cell_texts(
    place: Mapping[str, Any], found: np.ndarray, scale: Mapping[str, Any], diverging: bool
) -> dict[str, Any]:
    low, high = scale.get("domain") or (float(found.min()), float(found.max()))
    middle = low + 0.55 * (high - low)
    shown = ".2f" if np.abs(found).max() < 10 else ".3~g"
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
