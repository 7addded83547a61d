"""How it was done: what every run recorded about itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tdgeom.files.json_text import plain
from tdgeom.report.markup import Html, element, joined
from tdgeom.report.reported_run import ReportedRun

__all__ = ["protocol_section", "warnings_of"]

FACTS = (
    ("model_id", "Model"), ("model_class", "Class"), ("parameter_count", "Parameters"), ("dtype", "Weights in"),
    ("input_device", "Device"), ("tokenizer", "Tokenizer"), ("dataset", "Text"), ("row_unit", "A row is one of"),
    ("rows_observed", "Rows"), ("tokens_observed", "Tokens seen"), ("padding_rows", "Padding left out"),
    ("dropped_rows", "Rows dropped"), ("batches_observed", "Batches"), ("stopped", "Stopped at"), ("align", "Rows matched by"),
    ("run_name", "Name of the run"), ("artifact_schema_version", "Schema of the bundle"),
)  # fmt: skip
# what stands elsewhere on the page, or is long
APART = {name for name, _ in FACTS} | {"warnings", "files", "settings", "software", "runtime_seconds"}


def warnings_of(run: ReportedRun) -> list[str]:
    """What was said while the run was measured."""
    found = run.metadata.get("warnings")
    return [str(one) for one in found] if isinstance(found, list | tuple) else []


def protocol_section(runs: Sequence[ReportedRun]) -> Html:
    """Facts, settings, versions, warnings and hashes of each run."""
    parts = [_of(run, index, len(runs) > 1) for index, run in enumerate(runs) if run.metadata]
    parts += [
        element("p", f"{run.name} holds no record of how it was made.") for run in runs if not run.metadata
    ]
    lead = element(
        "p", "What was measured, with which settings and versions: enough to measure it again.", class_="lead"
    )
    heading = element("h2", "Protocol", id="protocol-title")
    return element("section", heading, lead, *parts, id="protocol", aria_labelledby="protocol-title")


def _of(run: ReportedRun, index: int, several: bool) -> Html:
    data, level = run.metadata, "h4" if several else "h3"
    told = [(label, data[key]) for key, label in FACTS if data.get(key) not in (None, "")]
    facts = element("dl", *[_fact(label, value) for label, value in told], class_="facts")
    said = warnings_of(run)
    parts = [facts]
    if said:
        parts += [
            element(level, "Warnings"),
            element("ul", *[element("li", one) for one in said], class_="warnings"),
        ]
    for key, title in (("software", "Versions"), ("runtime_seconds", "Seconds")):
        if isinstance(data.get(key), Mapping):
            parts += [
                element(level, title),
                element("dl", *[_fact(k, v) for k, v in data[key].items()], class_="facts"),
            ]
    rest = {key: value for key, value in data.items() if key not in APART}
    for key, title, value in (
        ("settings", "Every setting", data.get("settings")),
        ("record", "Sites, modules and configuration", rest),
        ("files", "Files and their SHA-256", data.get("files")),
    ):
        if value:
            text = json.dumps(plain(value), indent=1, ensure_ascii=False)
            label = f"{title} of {run.name}"
            box = element("pre", text, tabindex="0", role="region", aria_label=label)
            parts.append(element("details", element("summary", title), box, class_=key))
    head = element("h3", run.name) if several else None
    return element("div", head, joined(parts), class_="run", id=f"protocol-{index}")


def _fact(label: Any, value: Any) -> Html:
    if isinstance(value, bool | str):
        shown = str(value)
    elif isinstance(value, int):
        shown = f"{value:,}"
    elif isinstance(value, float):
        shown = f"{value:,.0f}" if value.is_integer() else f"{value:.3g}"
    else:
        shown = json.dumps(plain(value), ensure_ascii=False)
    return element("div", element("dt", label), element("dd", shown))
