"""``tdgeom rerun``: the command that made a bundle, once more, and what is another now."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import tdgeom as tg
from tdgeom.cli.config_file import defaults_of
from tdgeom.cli.options import Json, console, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from tdgeom.analysis.results import AnalysisResults

__all__: list[str] = []


def rerun(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A bundle that --out named.", metavar="DIR")],
    out: Annotated[
        Path | None, typer.Option(help="Save the new bundle in this new folder.", metavar="DIR")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Another device than then.")] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="The largest relative difference of two numbers that are the same.")
    ] = 1e-6,
    as_json: Json = False,
) -> None:
    """Run the command that made a bundle again, and say what differs: versions, weights, files, numbers.

    The exit code is 1 where a number differs by more than --tolerance, or where there is one that was not there.
    """
    before = tg.AnalysisResults.load(folder)
    made = before.metadata.get("command")
    commands = getattr(context.parent and context.parent.command, "commands", {})
    if not isinstance(made, Mapping) or made.get("name") not in commands:
        raise typer.BadParameter(
            f"{folder} does not say which command made it: it was made in Python, or by an earlier version"
        )
    command = commands[made["name"]]
    options = {**made["options"], "out": out, **({} if device is None else {"device": device})}
    given = defaults_of(command, options, str(folder))
    silent = redirect_stdout(io.StringIO()) if as_json else nullcontext()
    with silent, command.make_context(command.name, [], parent=context.parent, default_map=given) as inner:
        after = command.invoke(inner)
    if after is None:  # another rank of a process group has it
        return
    found = differences(before, after)
    if as_json:
        print_json({**found, "folder": after.artifact_dir})
    else:
        print_differences(found, console(), tolerance)
    if found["missing"] or any(not far <= tolerance for far in found["numbers"].values()):
        raise typer.Exit(1)


def differences(before: AnalysisResults, after: AnalysisResults) -> dict[str, Any]:
    """What is another: by version, weights and file (then, now), and the largest relative difference of every column of numbers.

    ``missing``: columns, tables and rows that only one of the two has.
    """
    old, new = before.metadata, after.metadata
    numbers: dict[str, float] = {}
    missing: list[str] = []
    tables = [
        {"metrics": one.metrics, "novelty": one.novelty, "router": one.router, **one.diagnostics}
        for one in (before, after)
    ]
    for name in dict.fromkeys([*tables[0], *tables[1]]):
        _compare(name, tables[0].get(name), tables[1].get(name), numbers, missing)
    return {
        "versions": _changed(old["software"], new["software"]),
        "weights": _changed(old["command"]["weights"], new["command"]["weights"]),
        "files": _changed(old["command"]["files"], new["command"]["files"]),
        "numbers": numbers,
        "missing": missing,
    }


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = dict.fromkeys([*old, *new])
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def _compare(name: str, old: Any, new: Any, numbers: dict[str, float], missing: list[str]) -> None:
    """The largest difference of every column, against the column's largest number."""
    import numpy as np

    old, new = (table if table is not None and len(table) else None for table in (old, new))
    if old is None and new is None:
        return
    if old is None or new is None or len(old) != len(new):
        missing.append(
            f"{name}: {0 if old is None else len(old)} rows then, {0 if new is None else len(new)} now"
        )
        return
    columns = [table.select_dtypes(["number", "bool"]).columns for table in (old, new)]
    missing += [f"{name}: column {column}" for column in sorted(set(columns[0]) ^ set(columns[1]))]
    for column in columns[0].intersection(columns[1], sort=False):
        a, b = (table[column].to_numpy(dtype=float, na_value=np.nan) for table in (old, new))
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        size = max(np.abs(a[np.isfinite(a)]).max(initial=0.0), np.finfo(float).tiny)
        numbers[f"{name}: {column}"] = float(
            np.where(same, 0.0, np.nan_to_num(np.abs(a - b) / size, nan=np.inf)).max()
        )


def print_differences(found: Mapping[str, Any], console: Console, tolerance: float) -> None:
    """What differs, a line each, and what does not."""
    console.print()
    for what in ("versions", "weights", "files"):
        changes = found[what]
        if not changes:
            console.print(f"{what.capitalize()}: the same")
        for name, (old, new) in changes.items():
            short = [str(one)[:12] if what != "versions" else str(one) for one in (old, new)]
            console.print(
                f"{what.capitalize()}: {name}: {short[0]} then, {short[1]} now", soft_wrap=True, markup=False
            )
    far = {name: value for name, value in found["numbers"].items() if not value <= tolerance}
    for line in (
        *found["missing"],
        *(f"{name}: by {value:.1e} of its largest" for name, value in far.items()),
    ):
        console.print(f"Numbers: {line}", soft_wrap=True, markup=False)
    if not far and not found["missing"]:
        largest = max(found["numbers"].values(), default=0.0)
        told = "the same" if largest == 0 else f"the same to {largest:.1e} of each column's largest"
        console.print(f"Numbers: {told} ({len(found['numbers'])} columns)")
