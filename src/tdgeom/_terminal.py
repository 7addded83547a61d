"""Results and sites as tables in a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["print_results", "print_sites"]

LEAST_BAR = 12
EIGHTHS = " ▏▎▍▌▋▊▉█"
# shown in this order as far as the width goes; the first one present gets the bar
METRICS = (
    "d_pr",
    "effective_rank",
    "top1_share",
    "k90",
    "cos_sim_mean",
    "stable_rank",
    "alpha_req",
    "norm_mean",
    "d_entropy",
    "k99",
    "top10_share",
    "ve_32",
    "near_rank1",
)
NOVELTY = ("feature_subspace_novelty", "linear_cka", "layer_cosine_sim")
ROUTER = (
    "router_entropy_norm",
    "load_imbalance",
    "most_used_expert",
    "top_expert_load",
    "routed_assignments",
)
IDENTITY = {
    "model_key", "model_label", "site", "kind", "stack", "layer", "num_layers", "layer_norm_depth", "relative_depth",
    "tokens_observed", "hidden_dim", "a", "b", "transition", "novelty_k", "variant", "tokens",
}  # fmt: skip
UNIT = {"feature_subspace_novelty", "linear_cka", "layer_cosine_sim", "router_entropy_norm"}  # bars end at 1


def print_results(results: Any, console: Console) -> None:
    """The tables of an analysis, as wide as the console, each with a line on how to read it."""
    if "align" in results.metadata:
        from tdgeom._comparison_terminal import print_comparison

        return print_comparison(results, console)
    console.print(headline(results))
    if not results.metrics.empty:
        width = (
            int(results.metrics["hidden_dim"].max()) if results.metrics["hidden_dim"].notna().any() else None
        )
        _print(console, "Sites", results.metrics, METRICS)
        _explain(
            console,
            results.metrics,
            {
                "d_pr": f"over how many directions the variance spreads (1 to {width or 'the width'}); bar from 0 to the largest",
                "top1_share": "variance along the first direction alone",
                "cos_sim_mean": "how alike any two tokens point",
            },
        )
    if not results.novelty.empty:
        _print(console, "From one layer to the next", results.novelty, NOVELTY)
        _explain(
            console,
            results.novelty,
            {
                "feature_subspace_novelty": "0 if the leading subspace stays, 1 if it turns orthogonal",
                "linear_cka": "1 if the geometry of the tokens stays",
            },
        )
    for name, table in results.diagnostics.items():
        if {"variant", "d_pr"} <= set(table):
            _print_ablation(console, name, table)
            console.print(
                Text(
                    "A large change means that a few long tokens or large features make the number.",
                    style="dim",
                )
            )
    if not results.router.empty:
        _print(console, "Routers", results.router, ROUTER)
        _explain(
            console, results.router, {"router_entropy_norm": "1 if all experts are used alike, 0 if one is"}
        )


def headline(results: Any, unit: str = "tokens") -> Text:
    """The model, and how much of what was measured."""
    data = results.metadata
    label = next(iter(results.metrics.get("model_label", [])), None) or data.get("model_id") or "model"
    facts = [str(data["model_class"])] if data.get("model_class") else []
    if data.get("rows_observed") is not None:
        facts.append(f"{int(data['rows_observed']):,} {unit}")
    if data.get("dataset"):
        facts.append(f"of {data['dataset']}")
    if data.get("stopped") == "max_rows":
        facts.append("budget reached")
    return Text.assemble((str(label), "bold"), ": " if facts else "", ", ".join(facts))


def _explain(console: Console, table: pd.DataFrame, notes: Mapping[str, str]) -> None:
    said = [f"{name}: {note}." for name, note in notes.items() if name in table]
    if said:
        console.print(Text(" ".join(said), style="dim"))


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
    if several or "layer" not in table or table["layer"].isna().any():
        return "site", [str(value) for value in table["site"]]
    return "layer", [str(int(value)) for value in table["layer"]]


def _print(console: Console, title: str, table: pd.DataFrame, wanted: Sequence[str]) -> None:
    own = [name for name in table.select_dtypes(["number", "bool"]) if name not in IDENTITY]
    columns = [name for name in wanted if name in table] or own
    name, labels = _label(table)
    room = console.width - max(map(len, [name, *labels])) - 2 - LEAST_BAR
    shown: list[str] = []
    cells: list[list[str]] = []
    for column in columns:
        made = cells_of(table[column], column)
        needed = 2 + max(map(len, [*made, *_broken(column).split("\n")]))
        if shown and needed > room:
            break
        room -= needed
        shown.append(column)
        cells.append(made)
    bar_width = min(30, LEAST_BAR + max(room, 0))
    drawn = plain_table()
    drawn.add_column(name, justify="right", no_wrap=True, overflow="fold")
    if shown:
        values = [float(value) for value in table[shown[0]]]
        finite = [abs(value) for value in values if math.isfinite(value)]
        top = 1.0 if shown[0] in UNIT else max(finite, default=1.0)
        drawn.add_column(_broken(shown[0]), justify="right", overflow="fold")
        drawn.add_column("", style="cyan", min_width=bar_width, overflow="fold")
        for column in shown[1:]:
            drawn.add_column(_broken(column), justify="right", overflow="fold")
        for row, label in enumerate(labels):
            bar = _bar(values[row], top, bar_width, console)
            drawn.add_row(label, cells[0][row], bar, *(made[row] for made in cells[1:]))
    titled(console, title, drawn)


def _print_ablation(console: Console, name: str, table: pd.DataFrame) -> None:
    variants = list(dict.fromkeys(table["variant"]))
    drawn = plain_table()
    first = table[table["variant"] == variants[0]]
    heading, labels = _label(first)
    drawn.add_column(heading, justify="right", overflow="fold")
    for variant in variants:
        drawn.add_column(_broken(variant), justify="right", overflow="fold")
    decimals = _decimals(table["d_pr"])
    by_site = {key: rows.set_index("variant")["d_pr"] for key, rows in table.groupby("site", sort=False)}
    for label, site in zip(labels, first["site"]):
        drawn.add_row(label, *(_cell(by_site[site].get(variant), "d_pr", decimals) for variant in variants))
    titled(console, f"{name.replace('_', ' ').capitalize()}: d_pr", drawn)


def plain_table() -> Table:
    """An empty table in the look of all."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))


def titled(console: Console, title: str, table: Table) -> None:
    """A table under its title."""
    console.print()
    console.print(Text(title, style="bold"))
    console.print(table)


def _broken(column: str) -> str:
    """A name on two lines where it has two words: columns stay narrow and names whole."""
    words = column.split("_")
    if len(column) < 8 or len(words) < 2:
        return column
    cut = min(range(1, len(words)), key=lambda at: abs(len("_".join(words[:at])) - len(column) / 2))
    return "_".join(words[:cut]) + "_\n" + "_".join(words[cut:])


def cells_of(values: Iterable[Any], column: str) -> list[str]:
    """A column's values as text, in one precision."""
    values = list(values)
    return [_cell(value, column, _decimals(values)) for value in values]


def _decimals(values: Iterable[Any]) -> int:
    """One precision for a column: three or four digits of its largest number."""
    sizes = [abs(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]
    largest = max(sizes, default=0.0)
    return 0 if largest >= 1000 else 1 if largest >= 10 else 3


def _cell(value: Any, column: str, decimals: int) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool) or str(value) in ("True", "False"):
        return "yes" if value else "no"
    if isinstance(value, str) or not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and (column.startswith("k") or column in ROUTER):
        return f"{int(value):,}"
    return f"{value:,.{decimals}f}"


def _bar(value: float, top: float, width: int, console: Console) -> str:
    if not math.isfinite(value) or not top > 0:
        return ""
    filled = max(0.0, min(1.0, value / top)) * width
    if console.options.ascii_only:
        return "#" * round(filled)
    whole = int(filled)
    part = EIGHTHS[int((filled - whole) * 8)]
    return "█" * whole + part.strip()


def print_sites(model: Any, entries: Iterable[Any], console: Console, *, every: bool = False) -> None:
    """The sites of a model: a line a kind, or every site with ``every``."""
    entries = list(entries)
    config = getattr(model, "config", None)
    stacks = list(dict.fromkeys(entry.site.stack for entry in entries))
    depth = {
        stack: 1
        + max(
            (e.site.layer for e in entries if e.site.stack == stack and e.site.layer is not None), default=-1
        )
        for stack in stacks
    }
    layers = ", ".join(f"{stack + ' ' if stack else ''}{count} layers" for stack, count in depth.items())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = f"{parameters / 1e6:,.1f} M" if parameters >= 1e5 else f"{parameters:,}"
    width = getattr(config, "hidden_size", None)
    facts = [layers or "no repeated blocks", f"{width} features" if width else "", f"{size} parameters"]
    console.print(Text.assemble((type(model).__name__, "bold"), ": ", ", ".join(filter(None, facts))))
    table = plain_table()
    for heading in ("site", "layers", "module", "read at"):
        table.add_column(heading, no_wrap=heading != "module", overflow="fold")
    rows = [[e] for e in entries] if every else _by(entries, lambda e: (e.site.stack, e.site.kind))
    for group in rows:
        first = group[0]
        named = ".".join(part for part in (first.site.stack, first.site.kind) if part)
        numbers = [entry.site.layer for entry in group if entry.site.layer is not None]
        table.add_row(str(first.site) if every else named, _ranges(numbers), _pattern(group), first.side)
    console.print(table)
    console.print(
        Text(
            "Name kinds or single sites with --sites, as in residual_output or residual_output.-1; any other module as "
            "module_output:<path>, with * for one part of the path.",
            style="dim",
        )
    )


def _by(entries: Sequence[Any], key: Callable[[Any], Any]) -> list[list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return list(groups.values())


def _ranges(numbers: Sequence[int]) -> str:
    """``0-3, 5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _pattern(group: Sequence[Any]) -> str:
    """One path for all layers, ``*`` where they differ."""
    paths = [entry.module_path.split(".") for entry in group]
    if len({len(path) for path in paths}) > 1:
        return f"{group[0].module_path}, ..."
    return ".".join(part[0] if len(set(part)) == 1 else "*" for part in zip(*paths)) or "(the model itself)"
