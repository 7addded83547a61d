"""``write_report``: the report of one run, or of several side by side, as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tdgeom.files.atomic import write_whole
from tdgeom.report.ablation_section import ablation_section
from tdgeom.report.between_section import between_section
from tdgeom.report.contents import Section, Table
from tdgeom.report.convergence_section import convergence_section
from tdgeom.report.findings import findings
from tdgeom.report.markup import Html, element, joined
from tdgeom.report.page import page, require_vega
from tdgeom.report.patching_section import patching_section
from tdgeom.report.profile_sections import profile_sections
from tdgeom.report.protocol_section import protocol_section
from tdgeom.report.reported_run import ReportedRun, label_of, named_apart, series_rows
from tdgeom.report.router_section import router_section
from tdgeom.report.scale_section import scale_section
from tdgeom.report.spectrum_section import spectrum_section
from tdgeom.report.sweep_section import last_step, steps_together, sweep_section

__all__ = ["write_report"]

# what the sections draw
DRAWN = {
    "metrics", "novelty", "router", "patching", "sweep", "diagnostics/normalization_ablation",
    "diagnostics/intrinsic_dimension", "diagnostics/overlap", "diagnostics/convergence",
}  # fmt: skip


def write_report(runs: Sequence[ReportedRun], path: str | Path, title: str | None = None) -> Path:
    """Write the report and return its path; a file of that name is replaced, whole or not at all.

    Args:
        runs: one or more; several are overlaid, with their differences from the first.
        path: the file, usually ``report.html``.
        title: default what was measured.

    Raises:
        ValueError: no runs. ModuleNotFoundError: vl-convert-python is missing.
    """
    if not runs:
        raise ValueError("a report needs at least one run, got none.")
    require_vega()
    runs = [last_step(run) for run in steps_together(named_apart(runs))]
    sections: list[Section | Html] = [
        section
        for section in (
            sweep_section(runs),
            spectrum_section(runs),
            *profile_sections(runs),
            scale_section(runs),
            between_section(runs),
            ablation_section(runs),
            convergence_section(runs),
            router_section(runs),
            patching_section(runs),
            _other_tables(runs),
        )
        if section is not None
    ]
    sections.append(protocol_section(runs))
    head = title or _title(runs)
    text = page(head, _lead(runs), sections, _series(runs), _whole_tables(runs))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, [text.encode("utf-8")])
    return path


def _title(runs: Sequence[ReportedRun]) -> str:
    if not any(label_of(run.metadata) for run in runs):
        return f"Measured: {', '.join(run.name for run in runs)}"
    names = list(dict.fromkeys(label_of(run.metadata) or run.name for run in runs))
    if len(runs) == 1 or len(names) == 1:
        return f"Geometry of {names[0]}"
    return f"Geometry of {', '.join(names[:-1])} and {names[-1]}"


def _series(runs: Sequence[ReportedRun]) -> list[str]:
    rows, _ = series_rows(runs, "metrics")
    return list(dict.fromkeys(rows["_series"])) if len(rows) else []


def _lead(runs: Sequence[ReportedRun]) -> Html:
    """What was measured, and what stands out."""
    facts = [
        element("p", joined([f"{run.name}: " if len(runs) > 1 else "", _facts(run)]), class_="measured")
        for run in runs
        if run.metadata
    ]
    found = findings(runs)
    if not found:
        return joined(facts)
    items = [element("li", said, class_=kind) for kind, said in found]
    heading = element("h2", "What stands out", id="findings-title")
    box = element(
        "section", heading, element("ul", *items), class_="findings", aria_labelledby="findings-title"
    )
    return joined([*facts, box])


def _facts(run: ReportedRun) -> Html:
    data = run.metadata
    unit = str(data.get("row_unit", "rows"))
    parts: list[str] = [element("strong", label_of(data) or run.name)]
    if data.get("model_class"):
        parts.append(f"{data['model_class']}")
    if isinstance(data.get("parameter_count"), int):
        parts.append(f"{_short(data['parameter_count'])} parameters")
    if isinstance(data.get("rows_observed"), int | float):
        parts.append(f"{int(data['rows_observed']):,} {unit}")
    if data.get("dataset"):
        parts.append(f"of {data['dataset']}")
    if data.get("stopped") == "max_rows":
        parts.append("as many as were asked for")
    return joined(parts, ", ")


def _short(count: int) -> str:
    for size, sign in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{sign}"
    return str(count)


def _whole_tables(runs: Sequence[ReportedRun]) -> list[Table]:
    tables: list[Table] = []
    for index, run in enumerate(runs):
        for name, frame in run.tables.items():
            if len(frame):
                own = name.rpartition("/")[2]
                key = own if len(runs) == 1 else f"{own}_{index + 1}"
                tables.append(Table(_titled(name, run, len(runs) > 1), frame, key))
        eigenvalues = _eigenvalue_frame(run.eigenvalues)
        if len(eigenvalues):
            key = "eigenvalues" if len(runs) == 1 else f"eigenvalues_{index + 1}"
            tables.append(
                Table(
                    _titled("every 100th eigenvalue and the first 100", run, len(runs) > 1), eigenvalues, key
                )
            )
    return tables


def _other_tables(runs: Sequence[ReportedRun]) -> Section | None:
    """Tables that no section above draws, as they are."""
    tables: list[Table] = []
    for run in runs:
        for name, frame in run.tables.items():
            if name not in DRAWN and len(frame):
                title = _titled(name, run, len(runs) > 1)
                tables.append(Table(title, frame, f"{name.rpartition('/')[2]}_shown_{len(tables)}"))
    if not tables:
        return None
    return Section("tables", "Further tables", "What else the run kept, as it stands.", (), tables)


def _titled(name: str, run: ReportedRun, several: bool) -> str:
    words = name.rpartition("/")[2].replace("_", " ")
    return f"{words[0].upper()}{words[1:]}{f' of {run.name}' if several else ''}"


def _eigenvalue_frame(eigenvalues: Any) -> pd.DataFrame:
    columns = {str(name): pd.Series(values) for name, values in eigenvalues.items()}
    frame = pd.DataFrame(columns)
    if not len(frame):
        return frame
    kept = [rank for rank in range(len(frame)) if rank < 100 or rank % 100 == 0 or rank == len(frame) - 1]
    frame.insert(0, "rank", range(1, len(frame) + 1))
    return frame.iloc[kept]
