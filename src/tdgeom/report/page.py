"""The page: sections, styles, script and data in one file that asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import pandas as pd

from tdgeom.plot.palette import COLOURS, COLOURS_ON_DARK, depth_colours
from tdgeom.report.contents import Chart, Section, Table
from tdgeom.report.markup import Html, element, json_block
from tdgeom.report.vega_charts import CONFIG, DEPTH_STEPS

__all__ = ["page", "require_vega"]


def require_vega() -> Any:
    """``vl_convert``, which carries the library that draws; or an error that says how to get it."""
    try:
        import vl_convert
    except ImportError:
        raise ModuleNotFoundError(
            "the report needs vl-convert-python, which carries the library that draws it: pip install vl-convert-python."
        ) from None
    return vl_convert


@cache
def _library() -> str:
    return str(require_vega().javascript_bundle()).replace("</script", "<\\/script")


@cache
def _asset(name: str) -> str:
    return files("tdgeom.report").joinpath(name).read_text(encoding="utf-8")


def page(
    title: str,
    lead: Html,
    sections: Sequence[Section | Html],
    series: Sequence[str],
    downloads: Sequence[Table],
) -> str:
    """The whole file."""
    charts: dict[str, Any] = {}
    tables: dict[str, Any] = {}
    body, contents = [], []
    for section in sections:
        if isinstance(section, Section):
            body.append(_section(section, charts, tables))
            contents.append((section.key, section.title))
        else:
            body.append(section)
    contents.append(("data", "Tables to download"))
    body.append(_downloads(downloads, tables))
    contents.append(("protocol", "Protocol"))
    body[-2], body[-1] = body[-1], body[-2]
    lines = any("indexof(hidden_series" in str(spec) for spec in charts.values())
    scripts = [_library(), _asset("page.js")]
    policy = (
        "default-src 'none'; script-src " + " ".join(_fingerprint(script) for script in scripts)
        + "; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )  # fmt: skip
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name_="generator", content="tdgeom"),
        element("meta", name_="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(_variables() + _asset("page.css"))),
    )
    data = {"charts": charts, "tables": tables, "config": CONFIG, "series": list(series)}
    return "<!doctype html>\n" + element(
        "html",
        head,
        element(
            "body",
            element("a", "Skip to the charts", href="#main", class_="skip"),
            _header(title, lead, contents),
            element(
                "main",
                _series_choice(series, lines),
                *body,
                id="main",
                tabindex="-1",
            ),
            element(
                "footer", element("p", "Made by tdgeom. Charts by Vega-Lite. This file needs no network.")
            ),
            json_block("report-data", data),
            *[element("script", Html(script)) for script in scripts],
        ),
        lang="en",
        data_theme="auto",
    )


def _fingerprint(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _variables() -> str:
    """The colours of lines and layers, light and dark, as variables that charts name."""

    def block(colours: Sequence[str], on_dark: bool) -> str:
        lines = [f"--line-{i}:{colour}" for i, colour in enumerate(colours)]
        layers = [
            f"--depth-{i}:{colour}" for i, colour in enumerate(depth_colours(DEPTH_STEPS, on_dark=on_dark))
        ]
        return ";".join([*lines, *layers])

    light, dark = block(COLOURS, False), block(COLOURS_ON_DARK, True)
    return (
        f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root[data-theme=auto]{{{dark}}}}}\n"
        f"@media screen{{:root[data-theme=dark]{{{dark}}}}}\n"
    )


def _header(title: str, lead: Html, contents: Sequence[tuple[str, str]]) -> Html:
    links = [element("li", element("a", name, href=f"#{key}")) for key, name in contents]
    choices = [
        element(
            "label", element("input", type="radio", name_="theme", value=value, checked=value == "auto"), text
        )
        for value, text in (("auto", "System"), ("light", "Light"), ("dark", "Dark"))
    ]
    theme = element("fieldset", element("legend", "Colours"), *choices, class_="theme")
    without = element(
        "noscript", element("p", "Charts and tables are drawn by a script in this file: allow it to run.")
    )
    return element(
        "header",
        element("div", element("h1", title), theme, class_="masthead"),
        lead,
        without,
        element("nav", element("ul", *links), aria_label="Sections"),
    )


def _series_choice(series: Sequence[str], drawn: bool) -> Html | None:
    if len(series) < 2 or not drawn:
        return None
    boxes = [
        element(
            "label",
            element("input", type="checkbox", checked=True, data_hides="hidden_series", value=name),
            element("span", class_="swatch", style=f"background:var(--line-{i % len(COLOURS)})"),
            name,
        )
        for i, name in enumerate(series)
    ]
    return element("fieldset", element("legend", "Show"), *boxes, class_="choice sticky")


def _section(section: Section, charts: dict[str, Any], tables: dict[str, Any]) -> Html:
    figures = []
    for index, chart in enumerate(section.charts):
        key = f"{section.key}-{index}"
        charts[key] = chart.spec
        if chart.difference is not None:
            charts[f"{key}-difference"] = chart.difference.spec
        figures.append(_figure(key, chart))
    shown = [_table(table, tables) for table in section.tables]
    return element(
        "section",
        element("h2", section.title, id=f"{section.key}-title"),
        element("p", section.says, class_="lead"),
        _layer_choice(section),
        element("div", *figures, class_="charts"),
        *shown,
        id=section.key,
        aria_labelledby=f"{section.key}-title",
    )


def _layer_choice(section: Section) -> Html | None:
    if len(section.layers) < 2:
        return None
    steps = [round(i * (DEPTH_STEPS - 1) / (len(section.layers) - 1)) for i in range(len(section.layers))]
    boxes = [
        element(
            "label",
            element(
                "input",
                type="checkbox",
                checked=name in section.shown,
                data_hides="hidden_layers",
                value=name,
            ),
            element("span", class_="swatch", style=f"background:var(--depth-{step})"),
            name,
        )
        for name, step in zip(section.layers, steps)
    ]
    buttons = [
        element("button", text, type="button", data_check=value)
        for text, value in (("All", "all"), ("None", "none"))
    ]
    return element("fieldset", element("legend", "Layers"), *buttons, *boxes, class_="choice layers")


def _figure(key: str, chart: Chart) -> Html:
    tools = [
        element(
            "button", sign, type="button", data_tool=tool, aria_label=f"{said}: {chart.title}", title=said
        )
        for sign, tool, said in (("+", "in", "Zoom in"), ("−", "out", "Zoom out"), ("↺", "reset", "Show all"))
        if "zoom" in str(chart.spec)
    ]
    tools.append(
        element(
            "button",
            "SVG",
            type="button",
            data_tool="svg",
            aria_label=f"Save as SVG: {chart.title}",
            title="Save as SVG",
        )
    )
    below = []
    if chart.difference is not None:
        below = [
            element("p", chart.difference.says, class_="below"),
            element("div", class_="chart", data_chart=f"{key}-difference"),
        ]
    return element(
        "figure",
        element("figcaption", element("h3", chart.title), element("p", chart.says)),
        element("div", class_="chart", data_chart=key),
        *below,
        element("div", *tools, class_="tools"),
        class_="wide" if chart.wide else None,
        id=f"chart-{key}",
    )


def _table(table: Table, tables: dict[str, Any]) -> Html:
    tables[table.name] = _plain_table(table.frame)
    return element(
        "details",
        element("summary", f"Table: {table.title} ({len(table.frame)} rows)"),
        element("div", class_="table", data_table=table.name, data_title=table.title),
    )


def _plain_table(frame: pd.DataFrame) -> dict[str, Any]:
    return {"columns": [str(name) for name in frame], "rows": frame.to_numpy(dtype=object).tolist()}


def _downloads(downloads: Sequence[Table], tables: dict[str, Any]) -> Html:
    items = []
    for table in downloads:
        tables[f"whole/{table.name}"] = _plain_table(table.frame)
        button = element("button", f"{table.name}.csv", type="button", data_download=f"whole/{table.name}")
        items.append(
            element(
                "li", button, f" {table.title}: {len(table.frame)} rows, {len(table.frame.columns)} columns"
            )
        )
    return element(
        "section",
        element("h2", "Tables to download", id="data-title"),
        element("p", "Whole tables, to the last digit, as CSV.", class_="lead"),
        element("ul", *items, class_="downloads"),
        id="data",
        aria_labelledby="data-title",
    )
