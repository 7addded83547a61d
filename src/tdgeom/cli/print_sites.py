"""The sites of a model as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text
from torch import nn

from tdgeom.cli.terminal_tables import plain_table
from tdgeom.model.structure.resolved_site import ResolvedSite

__all__ = ["print_sites", "ranges", "site_records"]


def print_sites(
    model: nn.Module, entries: Iterable[ResolvedSite], console: Console, *, every: bool = False
) -> None:
    """The sites of a model: a line a kind, or every site with ``every``."""
    entries = list(entries)
    config = getattr(model, "config", None)
    depth: dict[str | None, int] = {}
    for entry in entries:
        count = 0 if entry.site.layer is None else entry.site.layer + 1
        depth[entry.site.stack] = max(depth.get(entry.site.stack, 0), count)
    layers = ", ".join(f"{stack + ' ' if stack else ''}{count} layers" for stack, count in depth.items())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = f"{parameters / 1e6:,.1f} M" if parameters >= 1e5 else f"{parameters:,}"
    width = getattr(config, "hidden_size", None)
    facts = [layers or "no repeated blocks", f"{width} features" if width else "", f"{size} parameters"]
    console.print(Text.assemble((type(model).__name__, "bold"), ": ", ", ".join(filter(None, facts))))
    table = plain_table()
    for heading in ("site", "layers", "module", "read at"):
        table.add_column(heading, no_wrap=heading != "module", overflow="fold")
    rows = [[e] for e in entries] if every else _by_kind(entries)
    for group in rows:
        first = group[0]
        named = ".".join(part for part in (first.site.stack, first.site.kind) if part)
        numbers = [entry.site.layer for entry in group if entry.site.layer is not None]
        table.add_row(str(first.site) if every else named, ranges(numbers), _pattern(group), first.side)
    console.print(table)
    console.print(
        Text(
            "Name kinds or single sites with --sites, as in residual_output or residual_output.-1; any other module as "
            "module_output:<path>, with * for one part of the path.",
            style="dim",
        )
    )


def site_records(entries: Iterable[ResolvedSite]) -> list[dict[str, Any]]:
    """Sites as plain values, for machines."""
    return [
        {
            "site": str(entry.site),
            "kind": entry.site.kind,
            "stack": entry.site.stack,
            "layer": entry.site.layer,
            "module": entry.module_path,
            "side": entry.side,
        }
        for entry in entries
    ]


def _by_kind(entries: Sequence[ResolvedSite]) -> Iterable[list[ResolvedSite]]:
    groups: dict[tuple[str | None, str], list[ResolvedSite]] = {}
    for entry in entries:
        groups.setdefault((entry.site.stack, entry.site.kind), []).append(entry)
    return groups.values()


def ranges(numbers: Sequence[int]) -> str:
    """``0-3, 5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _pattern(group: Sequence[ResolvedSite]) -> str:
    """One path for all layers, ``*`` where they differ."""
    paths = [entry.module_path.split(".") for entry in group]
    if len({len(path) for path in paths}) > 1:
        return f"{group[0].module_path}, ..."
    return ".".join(part[0] if len(set(part)) == 1 else "*" for part in zip(*paths)) or "(the model itself)"
