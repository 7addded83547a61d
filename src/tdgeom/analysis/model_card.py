"""A section for a model's card: what was measured, the main figures layer by layer, and what stands out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tdgeom.core.visible_text import visible
from tdgeom.measures.columns import column_of, error_column
from tdgeom.report.findings import findings
from tdgeom.report.reported_run import ReportedRun

__all__ = ["MAIN_FIGURES", "model_card"]

MAIN_FIGURES = (
    "d_pr", "effective_rank", "top1_share", "alpha_req", "twonn_estimate", "gride_estimate", "cos_sim_mean", "norm_mean",
)  # fmt: skip
_MOST_LAYERS = 13


def model_card(run: ReportedRun, pictures: Sequence[Path] = ()) -> str:
    """The section in Markdown; ``pictures`` are shown by folder and file name."""
    told = run.metadata
    parts = ["## Geometry of the representations", _lead(told)]
    table = run.tables.get("metrics", pd.DataFrame())
    parts += _figures(table)
    said = [f"- {_safe(words)}" for _, words in findings([run])]
    parts += ["\n".join(said)] if said else []
    parts += [f"![{_safe(path.stem.replace('_', ' '))}]({path.parent.name}/{path.name})" for path in pictures]
    parts.append(_how(told))
    return "\n\n".join(part for part in parts if part) + "\n"


def _lead(told: Mapping[str, Any]) -> str:
    model = told.get("model_id") or told.get("model_class") or "the model"
    rows, of = told.get("rows_observed"), told.get("dataset")
    data = f" on {int(rows):,} rows" if rows else ""
    data += f" of {_code(of)}" if of else ""
    return f"Measured on activations of {_code(model)}{data}."


def _figures(table: pd.DataFrame) -> list[str]:
    """The table of main figures: of the last step, of trained weights, of layers at even distances."""
    if not len(table):
        return []
    said = ""
    if "step" in table:
        table, said = table[table["step"] == table["step"].max()], f"At step {int(table['step'].max()):,}."
    if "weights" in table and (table["weights"] != "untrained").any():
        table = table[table["weights"] != "untrained"]
    names = [
        name
        for name in MAIN_FIGURES
        if name in table and pd.to_numeric(table[name], errors="coerce").notna().any()
    ]
    if not names:
        return []
    lead = [name for name in ("model", "weights") if name in table and table[name].nunique() > 1]
    if not lead and len(table) > _MOST_LAYERS:
        table = table.iloc[np.unique(np.linspace(0, len(table) - 1, _MOST_LAYERS).round().astype(int))]
    columns = [*lead, "site"]
    head = [*[column_of(name).label for name in lead], "site", *[column_of(name).axis for name in names]]
    errors = {name: error_column(name, [str(one) for one in table.columns]) for name in names}
    lines = [head, ["---"] * len(columns) + ["---:"] * len(names)]
    for row in table.to_dict("records"):
        lines.append(
            [*[_code(row[name]) for name in columns], *[_number(row, name, errors[name]) for name in names]]
        )
    return [
        said,
        "\n".join(
            "| " + " | ".join(_safe(cell) if at == 0 else cell for cell in line) + " |"
            for at, line in enumerate(lines)
        ),
    ]


def _number(row: Mapping[Any, Any], name: str, error: str | None) -> str:
    value = row[name]
    if value is None or not np.isfinite(value):
        return ""
    bar = "" if error is None or not np.isfinite(row[error]) else f" ± {row[error]:.2g}"
    return f"{value:.4g}{bar}"


def _how(told: Mapping[str, Any]) -> str:
    software, settings = told.get("software") or {}, told.get("settings") or {}
    version = software.get("tdgeom") if isinstance(software, Mapping) else None
    facts = [f"tdgeom {version}" if version else "tdgeom"]
    if told.get("row_unit"):
        facts.append(f"a row is one of: {told['row_unit']}")
    if isinstance(settings, Mapping):
        facts += [
            f"{name} {settings[name]}" for name in ("sample_size", "seed") if settings.get(name) is not None
        ]
    if told.get("data_sha256"):
        facts.append(f"data SHA-256 {str(told['data_sha256'])[:16]}")
    return "<sub>" + _safe("; ".join(map(str, facts))) + ".</sub>"


def _code(text: Any) -> str:
    return "`" + visible(text).replace("`", "'").replace("|", "¦").replace("\n", " ") + "`"


def _safe(text: Any) -> str:
    """Words in which nothing is a tag, a link, a cell's end or emphasis."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", visible(text).replace("\n", " "))
