"""The tables of an analysis in a terminal."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from difflib import get_close_matches

import numpy as np
import pandas as pd
from rich.console import Console
from rich.text import Text

from tdgeom.analysis.intervals import intervals as interval_table
from tdgeom.analysis.results import AnalysisResults
from tdgeom.cli.terminal_tables import (
    bar_of,
    broken,
    cells_of,
    columns_table,
    print_in_groups,
    titled,
    width_beside,
)

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


def print_results(
    results: AnalysisResults, console: Console, columns: str | None = None, intervals: bool = False
) -> None:
    """The tables of an analysis, as wide as the console, each with a line on how to read it.

    ``columns``: names, comma-separated, or "all", which are broken into tables of as many as fit. Default: those that fit,
    and the names of the others. ``intervals``: behind them tables of intervals, of the columns that have errors.
    """
    chosen = _chosen(results, columns or "all")
    unit, first = str(results.metadata.get("row_unit", "rows")), columns is None
    console.print(headline(results))
    metrics, novelty, router = chosen
    if metrics:
        _print(console, "Sites", results.metrics, metrics, unit, first)
    if novelty:
        _print(console, "From one layer to the next", results.novelty, novelty, unit, first)
    for name, table in results.diagnostics.items() if first or columns == "all" else ():
        if {"variant", "d_pr"} <= set(table):
            _print_ablation(console, name, table, unit)
    if router:
        _print(console, "Routers", results.router, router, unit, first)
    if intervals:
        _print_intervals(console, results, metrics, novelty)


def _print_intervals(
    console: Console, results: AnalysisResults, metrics: Sequence[str], pairs: Sequence[str]
) -> None:
    """Lower and upper ends, of each column its own table's rows; a note on what they are about."""
    known = set(interval_table(results)["metric"])  # refused where there are no errors
    whole, found = results.with_intervals(), False
    for title, table, columns in (
        ("95 % intervals: sites", whole.metrics, metrics),
        ("95 % intervals: from one layer to the next", whole.novelty, pairs),
    ):
        own = [name for name in columns if name in known and f"{name}_low" in table]
        if table.empty or not own:
            continue
        table, ends = _by_kind(table)
        drawn = []
        for name in own:
            both = cells_of([*table[f"{name}_low"], *table[f"{name}_high"]], name)
            low, high = both[: len(table)], both[len(table) :]
            cells = ["-" if "-" in pair else " to ".join(pair) for pair in zip(low, high)]
            drawn.append((broken(name), cells))
        print_in_groups(console, title, _label(table), drawn, ends)
        found = True
    if found:
        note = (
            "About each value less its bias, over groups of documents; - where the bias is too large to take off or no group "
            "tells an error."
        )
        console.print(Text(note, style="dim"))


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


def _print(
    console: Console,
    title: str,
    table: pd.DataFrame,
    columns: Sequence[str],
    unit: str,
    first: bool,
) -> None:
    """A table, the first column with a bar; the other columns as far as they fit and, with ``first``, those left out by name."""
    if table.empty:
        return
    table, ends = _by_kind(table)
    name, labels = _label(table)
    marked = _marked(table)
    labels = [f"{label} *" if mark else label for label, mark in zip(labels, marked)]
    room = console.width - width_beside(name, labels) - LEAST_BAR
    drawn: list[tuple[str, list[str]]] = []
    for column in columns:
        one = (broken(column), cells_of(table[column], column))
        needed = width_beside(*one)
        if drawn and needed > room and first:
            break
        room -= needed
        drawn.append(one)
    if not first:
        print_in_groups(console, title, (name, labels), drawn, ends)
    else:
        headings, parts = [name, *(heading for heading, _ in drawn)], [labels, *(cells for _, cells in drawn)]
        if drawn:
            values = [float(value) for value in table[columns[0]]]
            top = 1.0 if columns[0] in UNIT else max(filter(math.isfinite, map(abs, values)), default=1.0)
            width = min(30, LEAST_BAR + max(room, 0))
            headings.insert(2, "")
            parts.insert(2, [bar_of(value, top, width, console) for value in values])
        shown = columns_table(headings, parts, ends)
        if drawn:
            bar = shown.columns[2]
            bar.justify, bar.style, bar.min_width = "left", "cyan", width
        titled(console, title, shown)
    notes = _notes(table, columns[: len(drawn)], unit)
    if any(marked):
        notes.append(
            f"* so few {unit}, or so rounded, that they decide some of these numbers: see the warnings."
        )
    if rest := columns[len(drawn) :]:
        notes.append(f"Not shown: {', '.join(rest)}; --columns all shows them, --columns {rest[0]} one.")
    if notes:
        console.print(Text(" ".join(notes), style="dim"))


def _notes(table: pd.DataFrame, shown: Sequence[str], unit: str) -> list[str]:
    """How to read the columns that are shown."""
    known: list[float] = table["hidden_dim"].dropna().tolist() if "hidden_dim" in table else []
    features = int(max(known)) if known else "the width"
    return [
        f"{name}: {note.format(width=features, rows=unit)}." for name, note in NOTES.items() if name in shown
    ]


def _by_kind(table: pd.DataFrame) -> tuple[pd.DataFrame, list[int]]:
    """The rows with those of one kind (and stack) together, in the order in which kinds come; and where a kind ends."""
    keys = [column for column in ("stack", "kind") if column in table]
    if not keys:
        return table, []
    number = table.groupby(keys, sort=False, dropna=False).ngroup().to_numpy()
    order = np.argsort(number, kind="stable")
    return table.iloc[order].reset_index(drop=True), (np.diff(number[order]).nonzero()[0]).tolist()


def _columns(table: pd.DataFrame, wanted: Sequence[str], asked: Collection[str]) -> list[str]:
    """Every column that is a measured number: the first of those wanted, what was asked for by name, the rest in order."""
    own = [name for name in table.select_dtypes(["number", "bool"]) if name not in IDENTITY]
    own = [name for name in own if not name.endswith(("_numerical_rank", "_few_rows"))]
    usual = [name for name in wanted if name in own]
    beside = ("_standard_error", "_scale", "_rows", "_duplicates")
    named = [name for name in own if name in asked and not name.endswith(beside)]
    return list(dict.fromkeys([*usual[:1], *named, *usual, *own]))


def _asked(results: AnalysisResults) -> set[str]:
    """Columns of the measures that were asked for by name, or given as stages."""
    keys = [
        key
        for stage in results.metadata.get("settings", {}).get("extra_stages", ())
        for key in stage["out_keys"]
    ]
    paths = [[key] if isinstance(key, str) else list(key) for key in keys]
    return {path[-1] for path in paths} | {"_".join(path[1:]) for path in paths}


def _chosen(results: AnalysisResults, names: str) -> list[list[str]]:
    """The columns of the three tables that were named; an error where a name is none."""
    tables = (results.metrics, results.novelty, results.router)
    every = [
        _columns(table, wanted, _asked(results)) for table, wanted in zip(tables, (METRICS, NOVELTY, ROUTER))
    ]
    given = [name.strip() for name in names.split(",") if name.strip()]
    if given == ["all"]:
        return every
    known = list(dict.fromkeys(name for columns in every for name in columns))
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.5)
            raise ValueError(
                f"--columns: there is no column {name!r}.{f' Did you mean {near[0]}?' if near else ''} There are "
                f"{', '.join(known)}."
            )
    return [[name for name in given if name in columns] for columns in every]


def _marked(table: pd.DataFrame) -> list[bool]:
    """Which rows hold a number that few rows or rounding decide."""
    marks = [table[name] for name in ("few_rows", "sv_few_rows", "unresolved") if name in table]
    return [any(bool(mark) and mark == mark for mark in row) for row in zip(*marks)] or [False] * len(table)


def _print_ablation(console: Console, name: str, table: pd.DataFrame, unit: str) -> None:
    table, _ = _by_kind(table)
    heading, labels = _label(table)
    variants, rows = list(dict.fromkeys(table["variant"])), list(dict.fromkeys(labels))
    cells = dict(zip(zip(table["variant"], labels), cells_of(table["d_pr"], "d_pr")))
    by_variant = [[cells.get((variant, row), "-") for row in rows] for variant in variants]
    title = f"{name.replace('_', ' ').capitalize()}: d_pr"
    print_in_groups(console, title, (heading, rows), list(zip(map(broken, variants), by_variant)))
    note = f"A large change means that a few long {unit} or large features make the number."
    console.print(Text(note, style="dim"))
