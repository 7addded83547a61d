"""Small charts as SVG inside the page: nothing is fetched, and they take the page's colours, light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 54, 170, 14, 40
DASHES = ("", "7 4", "2 3", "9 3 2 3", "1 3", "12 4", "4 2 1 2")
Points = Sequence[tuple[float, float]]


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (step * factor) <= 5)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def shown(value: float) -> str:
    """A number for an axis."""
    return f"{value:.4g}".replace("-", "−")


def apart(places: list[float], gap: float, low: float, high: float) -> list[float]:
    """Labels' heights, moved so that no two overlap."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    beyond = max(0.0, moved[order[-1]] - high) if order else 0.0
    for after, before in zip(order[::-1], order[-2::-1]):
        moved[after] -= beyond if after == order[-1] else 0.0
        moved[before] = min(moved[before], moved[after] - gap)
    if len(order) == 1:
        moved[order[0]] -= beyond
    return [max(low, place) for place in moved]


def line_chart(
    lines: dict[str, Points],
    *,
    title: str,
    x_title: str,
    y_title: str,
    bands: dict[str, Sequence[tuple[float, float, float]]] | None = None,
    truths: dict[str, float] | None = None,
    x_labels: Sequence[str] | None = None,
    log_y: bool = False,
) -> str:
    """Lines with their names at their ends. Numbers of rows stand on a logarithmic axis, layers (``x_labels``) on a plain one."""
    truths = truths or {}
    every = [y for points in lines.values() for _, y in points] + list(truths.values())
    every += [edge for band in (bands or {}).values() for _, *edges in band for edge in edges]
    low, high = min(every), max(every)
    log_y = log_y and low > 0
    margin = 0.04 * (high - low or abs(high) or 1)
    low, high = (low / 1.1, high * 1.1) if log_y else (low - margin, high + margin)
    xs = sorted({x for points in lines.values() for x, _ in points})
    scale = (lambda v: v) if x_labels else math.log2
    first, last = scale(xs[0]), scale(xs[-1])
    across = lambda x: LEFT + (scale(x) - first) / ((last - first) or 1) * (WIDTH - LEFT - RIGHT)
    height = (lambda v: math.log(v)) if log_y else (lambda v: v)
    up = lambda y: (
        HEIGHT - BOTTOM - (height(y) - height(low)) / (height(high) - height(low)) * (HEIGHT - TOP - BOTTOM)
    )
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    marks = (
        [10**e * m for e in range(-4, 6) for m in (1, 2, 5) if low <= 10**e * m <= high]
        if log_y
        else ticks(low, high)
    )
    for value in marks:
        parts.append(f'<path class="grid" d="M{LEFT} {up(value):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{up(value) + 4:.1f}" text-anchor="end">{shown(value)}</text>')
    for x in xs:
        label = x_labels[int(x)] if x_labels else f"{int(x):,}"
        parts.append(
            f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(label)}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_title)}</text>'
    )
    parts.append(
        f'<text transform="rotate(-90)" x="{-(TOP + HEIGHT - BOTTOM) / 2}" y="12" text-anchor="middle">{escape(y_title)}</text>'
    )
    names = list(lines)
    ends = apart([up(lines[name][-1][1]) for name in names], 14, TOP + 4, HEIGHT - BOTTOM)
    for i, name in enumerate(names):
        points = lines[name]
        if bands and name in bands:
            upper = [f"{across(x):.1f} {up(top):.1f}" for x, _, top in bands[name]]
            lower = [f"{across(x):.1f} {up(bottom):.1f}" for x, bottom, _ in bands[name]]
            parts.append(f'<path class="band c{i % 7}" d="M{"L".join(upper + lower[::-1])}Z"/>')
        if name in truths:
            parts.append(f'<path class="truth c{i % 7}" d="M{LEFT} {up(truths[name]):.1f}H{WIDTH - RIGHT}"/>')
        path = "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in points)
        dash = f' stroke-dasharray="{DASHES[i % 7]}"' if DASHES[i % 7] else ""
        parts.append(f'<path class="line c{i % 7}" d="M{path}"{dash}/>')
        for x, y in points:
            where = x_labels[int(x)] if x_labels else f"{int(x):,} rows"
            parts.append(
                f'<circle class="dot c{i % 7}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.6">'
                f"<title>{escape(name)}, {escape(where)}: {shown(y)}</title></circle>"
            )
        end, y = across(points[-1][0]), up(points[-1][1])
        parts.append(
            f'<path class="lead c{i % 7}" d="M{end + 4:.1f} {y:.1f}L{WIDTH - RIGHT + 12} {ends[i]:.1f}"/>'
        )
        parts.append(
            f'<text class="name c{i % 7}" x="{WIDTH - RIGHT + 15}" y="{ends[i] + 4:.1f}">{escape(name)}</text>'
        )
    return "".join([*parts, "</svg>"])


def heat_map(table: Sequence[Sequence[float]], labels: Sequence[str], *, title: str) -> str:
    """A matrix with its numbers in the cells, its scale from the smallest to the largest of them."""
    size, cell = len(table), 40
    side = 62 + size * cell
    values = [value for row in table for value in row]
    low, high = min(values), max(values)
    parts = [
        f'<svg class="chart matrix" viewBox="0 0 {side} {side}" role="img" aria-label="{escape(title)}">'
    ]
    parts.append(
        f'<text class="name" x="{62 + size * cell / 2}" y="12" text-anchor="middle">{escape(title)}</text>'
    )
    for i, label in enumerate(labels):
        parts.append(f'<text x="56" y="{44 + i * cell}" text-anchor="end">{escape(label)}</text>')
        parts.append(
            f'<text x="{62 + (i + 0.5) * cell}" y="{side - 24}" text-anchor="middle">{escape(label)}</text>'
        )
        for j, value in enumerate(table[i]):
            share = (value - low) / ((high - low) or 1)
            x, y = 62 + j * cell, 20 + i * cell
            parts.append(
                f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" class="cell" fill-opacity="{share:.3f}"/>'
            )
            shade = "deep" if share > 0.55 else "pale"
            parts.append(
                f'<text class="{shade}" x="{x + cell / 2 - 0.5}" y="{y + 24}" text-anchor="middle">{value:.2f}</text>'
            )
    return "".join([*parts, "</svg>"])
