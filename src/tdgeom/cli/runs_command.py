"""``tdgeom runs``: what a store holds, on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tdgeom as tg
from tdgeom.cli.options import Json, console, print_json
from tdgeom.core.visible_text import visible
from tdgeom.files.atomic import explained

if TYPE_CHECKING:
    from tdgeom.store.activation_store import ActivationStore
    from tdgeom.store.runs import Runs

__all__ = ["app"]

app = typer.Typer(
    name="runs",
    help="Find, check, move and remove the runs of a store.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
Store = Annotated[
    Path | None,
    typer.Option(
        "--store", envvar="TDGEOM_STORE", help="The store's folder.", metavar="DIR", show_default=False
    ),
]
Run = Annotated[str, typer.Argument(help="A run's id, or the beginning of one.", metavar="RUN")]


@app.command("list", epilog="Example: [bold]tdgeom runs list --store activations[/bold]")
def list_runs(store: Store = None, as_json: Json = False) -> None:
    """List every run."""
    _show(_open(store).query(), as_json)


@app.command(
    epilog='Example: [bold]tdgeom runs query --model gpt2 --tag final --where "metadata.loss < 3"[/bold]'
)
def query(
    model: Annotated[str | None, typer.Option(help="The model's name.")] = None,
    dataset: Annotated[str | None, typer.Option(help="The data set's name.")] = None,
    experiment: Annotated[str | None, typer.Option(help="The experiment's name.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A tag; several must all be there.")] = None,
    state: Annotated[str | None, typer.Option(help="writing, complete, failed or removing.")] = None,
    since: Annotated[str | None, typer.Option(help="Made at or after this ISO date or time.")] = None,
    until: Annotated[str | None, typer.Option(help="Made at or before this ISO date or time.")] = None,
    capture: Annotated[
        str | None, typer.Option(help="JSON that the capture specification holds.", metavar="JSON")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="A path in the details, or a comparison with one.", metavar="CONDITION"),
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Print ids alone, a line each.")] = False,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """List the runs that fit."""
    try:
        wanted = None if capture is None else json.loads(capture)
    except ValueError as error:
        raise typer.BadParameter(
            f"--capture takes JSON, such as '{{\"layers\": [0, 5]}}': {error}"
        ) from error
    found = _open(store).query(
        model=model,
        dataset=dataset,
        experiment=experiment,
        tag=tag,
        state=state,
        since=since,
        until=until,
        capture=wanted,
        where=where,
    )
    if ids:
        for run in found.ids:
            typer.echo(run)
    else:
        _show(found, as_json)


@app.command(epilog="Example: [bold]tdgeom runs show r1f[/bold]")
def show(run: Run, store: Store = None) -> None:
    """Print everything that is known of a run."""
    found = _open(store).query()
    told = {**found[run], "files": [str(path) for path in found.paths()[found[run]["id"]]]}
    typer.echo(json.dumps(told, indent=2, ensure_ascii=True))


@app.command(epilog="Example: [bold]tdgeom runs rm r1f --yes[/bold]")
def rm(
    runs: Annotated[list[str], typer.Argument(help="Ids, or beginnings of ids.", metavar="RUN...")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    store: Store = None,
) -> None:
    """Remove runs and their files."""
    opened = _open(store)
    chosen = _chosen(opened, runs)
    _show(chosen)
    if not yes and not typer.confirm(f"Remove {len(chosen)} run(s) and their files?"):
        raise typer.Abort
    typer.echo(f"{chosen.delete()} removed")


@app.command(epilog="Example: [bold]tdgeom runs verify[/bold]")
def verify(
    run: Annotated[
        str | None, typer.Argument(help="One run; default all, and the catalogue.", metavar="RUN")
    ] = None,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Check every file against the hash it was written with."""
    opened = _open(store)
    one = None if run is None else opened.query()[run]["id"]
    damage = opened.verify(one)
    if as_json:
        print_json({"damage": [str(found) for found in damage]})
    else:
        typer.echo(visible("\n".join(map(str, damage)) or "all is well"))
    if damage:
        raise typer.Exit(1)


@app.command(epilog="Example: [bold]tdgeom runs export moved r1f r2a[/bold]")
def export(
    folder: Annotated[Path, typer.Argument(help="A new folder.", metavar="DIR")],
    runs: Annotated[list[str], typer.Argument(help="Ids, or beginnings of ids.", metavar="RUN...")],
    store: Store = None,
) -> None:
    """Copy runs into a folder that import reads."""
    opened = _open(store)
    typer.echo(visible(_chosen(opened, runs).export(folder)))


@app.command("import", epilog="Example: [bold]tdgeom runs import moved --store other[/bold]")
def import_(
    folder: Annotated[Path, typer.Argument(help="A folder that export made.", metavar="DIR")],
    store: Store = None,
) -> None:
    """Take in the runs of an exported folder, after checking every file."""
    _show(_open(store, make=True).import_runs(folder))


def _open(path: Path | None, make: bool = False) -> ActivationStore:
    if path is None:
        raise typer.BadParameter("name the store: --store DIR, or the environment variable TDGEOM_STORE")
    with explained(f"opening the store {path}"):
        is_there = (path / "catalogue.sqlite").exists()
    if not make and not is_there:
        raise typer.BadParameter(f"{path} holds no store: there is no catalogue.sqlite")
    return tg.ActivationStore(path)


def _chosen(store: ActivationStore, names: list[str]) -> Runs:
    found = store.query()
    ids = list(dict.fromkeys(found[name]["id"] for name in names))
    return tg.Runs(store, [store.catalogue.record(run) for run in ids])


def _show(runs: Runs, as_json: bool = False) -> None:
    if as_json:
        print_json({"runs": list(runs)})
        return
    from tdgeom.cli.print_runs import print_runs

    print_runs(runs, console())
