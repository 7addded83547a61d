"""The tables of an analysis in a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from rich.console import Console
from rich.text import Text

from tdgeom.analysis.results import AnalysisResults
from tdgeom.cli.terminal_tables import bar_of, broken, cells_of, columns_table, titled

__all__ = ["headline", "print_results"]

LEAST_BAR = 12
# shown in this order as far as the width goes; the first one present gets the bar
METRICS = (
    "d_pr", "effective_rank", "top1_share", "k90", "cos_sim_mean", "stable_rank", "alpha_req", "norm_mean", "d_entropy",
    "k99", "top10_share", "ve_32", "near_rank1",
)  # fmt: skip
NOVELTY = ("feature_subspace_novelty", "linear_cka", "layer_cosine_sim")
ROUTER = (
    "router_entropy_norm", "load_imbalance", "most_used_expert", "top_expert_load", "routed_assignments",
)  # fmt: skip
IDENTITY = {
    "model_key", "model_label", "site", "kind", "stack", "layer", "num_layers", "layer_norm_depth", "relative_depth",
    "tokens_observed", "rows_observed", "hidden_dim", "a", "b", "transition", "novelty_k", "variant", "tokens", "rows",
    "numerical_rank", "sv_numerical_rank", "k_used", "few_rows", "sv_few_rows", "unresolved",
}  # fmt: skip
UNIT = {"feature_subspace_novelty", "linear_cka", "layer_cosine_sim", "router_entropy_norm"}  # bars end at 1


NOTES = {
    "d_pr": "over how many directions the variance spreads (1 to {width}); bar from 0 to the largest",
    "top1_share": "variance along the first direction alone",
    "cos_sim_mean": "how alike any two {rows} point",
    "feature_subspace_novelty": "0 if the leading subspace stays, 1 if it turns orthogonal",
    "linear_cka": "1 if the geometry of the {rows} stays",
    "router_entropy_norm": "1 if all experts are used alike, 0 if one is",
}


def print_results(results: AnalysisResults, console: Console) -> None:
    """The tables of an analysis, as wide as the console, each with a line on how to read it."""
    console.print(headline(results))
    unit = str(results.metadata.get("row_unit", "rows"))
    _print(console, "Sites", results.metrics, METRICS, unit)
    _print(console, "From one layer to the next", results.novelty, NOVELTY, unit)
    for name, table in results.diagnostics.items():
        if {"variant", "d_pr"} <= set(table):
            _print_ablation(console, name, table, unit)
    _print(console, "Routers", results.router, ROUTER, unit)


def headline(results: AnalysisResults) -> Text:
    """The model, and how much of what was measured."""
    data = results.metadata
    unit = data.get("row_unit", "rows")
    label = next(iter(results.metrics.get("model_label", [])), None) or data.get("model_id") or "model"
    facts = [str(data["model_class"])] if data.get("model_class") else []
    if data.get("rows_observed") is not None:
        facts.append(f"{int(data['rows_observed']):,} {unit}")
    if data.get("dataset"):
        facts.append(f"of {data['dataset']}")
    if data.get("stopped") == "max_rows":
        facts.append("budget reached")
    return Text.assemble((str(label), "bold"), ": " if facts else "", ", ".join(facts))


def _label(table: pd.DataFrame) -> tuple[str, list[str]]:
    """The shortest column that tells the rows apart."""
    several = any(column in table and table[column].nunique(dropna=False) > 1 for column in ("kind", "stack"))
    if "weights" in table:
        own, labels = _label(table.drop(columns="weights"))
        return own, [f"{label} {weights}" for label, weights in zip(labels, table["weights"])]
    if "transition" in table:
        if several:
            return "sites", [f"{a}->{b}" for a, b in zip(table["a"], table["b"])]
        return "layers", [str(value) for value in table["transition"]]
    numbered = "layer" in table and all(
        str(site).endswith(f".{layer}") for site, layer in zip(table["site"], table["layer"])
    )
    if several or not numbered:
        return "site", [str(value) for value in table["site"]]
    return "layer", [str(int(value)) for value in table["layer"]]


def _print(console: Console, title: str, table: pd.DataFrame, wanted: Sequence[str], unit: str) -> None:
    if table.empty:
        return
    own = [name for name in table.select_dtypes(["number", "bool"]) if name not in IDENTITY]
    columns = [name for name in wanted if name in table] or own
    name, labels = _label(table)
    marked = _marked(table)
    labels = [f"{label} *" if mark else label for label, mark in zip(labels, marked)]
    room = console.width - max(map(len, [name, *labels])) - 2 - LEAST_BAR
    shown: list[str] = []
    cells: list[list[str]] = []
    for column in columns:
        made = cells_of(table[column], column)
        needed = 2 + max(map(len, [*made, *broken(column).split("\n")]))
        if shown and needed > room:
            break
        room -= needed
        shown.append(column)
        cells.append(made)
    headings, parts = [name], [labels]
    if shown:
        values = [float(value) for value in table[shown[0]]]
        top = 1.0 if shown[0] in UNIT else max(filter(math.isfinite, map(abs, values)), default=1.0)
        width = min(30, LEAST_BAR + max(room, 0))
        bars = [bar_of(value, top, width, console) for value in values]
        headings += [broken(shown[0]), "", *map(broken, shown[1:])]
        parts += [cells[0], bars, *cells[1:]]
    drawn = columns_table(headings, parts)
    if shown:
        bar = drawn.columns[2]
        bar.justify, bar.style, bar.min_width = "left", "cyan", width
    titled(console, title, drawn)
    known: list[float] = table["hidden_dim"].dropna().tolist() if "hidden_dim" in table else []
    features = int(max(known)) if known else "the width"
    notes = [
        f"{name}: {note.format(width=features, rows=unit)}." for name, note in NOTES.items() if name in table
    ]
    if any(marked):
        notes.append(
            f"* so few {unit}, or so rounded, that they decide some of these numbers: see the warnings."
        )
    if notes:
        console.print(Text(" ".join(notes), style="dim"))


def _marked(table: pd.DataFrame) -> list[bool]:
    """Which rows hold a number that few rows or rounding decide."""
    marks = [table[name] for name in ("few_rows", "sv_few_rows", "unresolved") if name in table]
    return [any(bool(mark) and mark == mark for mark in row) for row in zip(*marks)] or [False] * len(table)


def _print_ablation(console: Console, name: str, table: pd.DataFrame, unit: str) -> None:
    heading, labels = _label(table)
    variants, rows = list(dict.fromkeys(table["variant"])), list(dict.fromkeys(labels))
    cells = dict(zip(zip(table["variant"], labels), cells_of(table["d_pr"], "d_pr")))
    by_variant = [[cells.get((variant, row), "-") for row in rows] for variant in variants]
    drawn = columns_table([heading, *map(broken, variants)], [rows, *by_variant])
    titled(console, f"{name.replace('_', ' ').capitalize()}: d_pr", drawn)
    note = f"A large change means that a few long {unit} or large features make the number."
    console.print(Text(note, style="dim"))
