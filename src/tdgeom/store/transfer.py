"""Runs out of a store and into another: copied whole, checked against their hashes, and never trusted on the way in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from tdgeom.files.atomic import explained, is_taken, open_regular, sync_folder, whole_folder, write_whole
from tdgeom.files.bundle import METADATA, read_bundle
from tdgeom.files.errors import StoreError
from tdgeom.files.json_text import canonical_json, read_json_file
from tdgeom.store.catalogue import BUNDLE, Catalogue
from tdgeom.store.run_description import RunDescription, describe_run
from tdgeom.store.run_ids import valid_id
from tdgeom.store.run_records import RUN_KINDS, RunRecord, ShardRecord, first_gap
from tdgeom.store.run_shards import check_hash, open_shards
from tdgeom.store.run_writer import RunLock
from tdgeom.store.shard_layout import ShardLayout

__all__ = ["export_runs", "import_runs"]

FORMAT = 1
RUN_FILE = "run.json"


def export_runs(catalogue: Catalogue, runs: Sequence[str], folder: Path) -> Path:
    """Copy complete runs into a new folder, whole or not at all: a folder a run, its files and ``run.json``.

    Raises:
        StoreError: no runs, the folder exists, a run is not complete, a file is damaged, or the disk refused.
    """
    folder = folder.absolute()
    if not runs:
        raise StoreError("there are no runs to export: the query found none.")
    if is_taken(folder):
        raise StoreError(f"{folder} exists already: export into a new folder.")
    records = [catalogue.record(run) for run in runs]
    for record in records:
        if record.state != "complete":
            raise StoreError(
                f"run {record.id} is not complete ({record.state}) and cannot be exported: resume it or leave it out."
            )
    with explained(f"exporting into {folder}"), whole_folder(folder) as draft:
        for record in records:
            (draft / record.id).mkdir()
            _export_run(catalogue, record, draft / record.id)
    return folder


def _export_run(catalogue: Catalogue, record: RunRecord, folder: Path) -> None:
    shards = catalogue.shards(record.id)
    about = record.about.told()
    told = {
        "format": FORMAT,
        **{name: getattr(record, name) for name in ("id", "kind", "created")},
        "about": {"tag": about.pop("tags"), **about},
        "layout": catalogue.layout(record.id).to_json(),
        "shards": [list(astuple(one)) for one in shards],
    }
    _copy_files(catalogue.folder_of(record.id), folder, record.kind, shards)
    write_whole(folder / RUN_FILE, [canonical_json(told).encode()])


@dataclass(frozen=True)
class _Exported:
    """An exported run whose record and files were checked in full."""

    run: str
    kind: str
    about: RunDescription
    layout: ShardLayout
    created: float
    shards: list[ShardRecord]


def import_runs(catalogue: Catalogue, folder: Path) -> list[str]:
    """Take the runs of an exported folder into a store, under their own ids; those it already has are left as they are.

    A run is in the store once all its files are: where this process is killed, the run is not, and importing again takes it.

    Raises:
        StoreError: no exported folder, or one that was changed; nothing of such a run is taken. Or the store has an unfinished
            run of that id.
    """
    with explained(f"reading {folder}"):
        found = sorted(path for path in folder.iterdir() if valid_id(path.name)) if folder.is_dir() else []
    if not found:
        raise StoreError(f"{folder} holds no exported runs: give the folder that export made.")
    checked = [_read(path) for path in found]  # all of them, before anything is taken
    states = {record.id: record.state for record in catalogue.records()}
    for one in checked:
        if states.get(one.run, "complete") != "complete":
            raise StoreError(
                f"{catalogue.folder} has the run {one.run} already, in the state {states[one.run]}: remove it there, then "
                f"import."
            )
    for one in checked:
        if one.run not in states:
            _import_run(catalogue, folder / one.run, one)
    return [one.run for one in checked]


def _import_run(catalogue: Catalogue, source: Path, told: _Exported) -> None:
    lock = RunLock(catalogue, told.run)
    try:
        with explained(f"importing {source}"):
            lock.clear()
            _copy_files(source, lock.folder, told.kind, told.shards)
            sync_folder(lock.folder)
            catalogue.add_run(told.run, told.kind, told.about, told.layout, told.created, told.shards)
    except BaseException:
        lock.clear()
        raise
    finally:
        lock.release()


def _read(path: Path) -> _Exported:
    """One exported run, its record and its files checked in full."""
    if path.is_symlink():
        raise StoreError(f"{path} is a symbolic link, which an export never holds: it was tampered with.")
    told = read_json_file(path / RUN_FILE)
    if not _is_record(told, path.name):
        raise StoreError(
            f"{path / RUN_FILE} is not the record of run {path.name}: it is damaged or was tampered with."
        )
    kind, layout = told["kind"], ShardLayout.from_json(told["layout"], f"the layout in {path / RUN_FILE}")
    try:
        about = describe_run(**told["about"])
        shards = sorted(map(ShardRecord.checked, told["shards"]), key=lambda one: (one.rank, one.number))
    except (TypeError, ValueError) as error:
        raise StoreError(f"{path / RUN_FILE} is damaged or was tampered with: {error}") from error
    gap = first_gap(shards)
    if gap is not None or bool(shards) == (kind == "analysis") or layout.rows == (kind == "capture"):
        raise StoreError(
            f"{path / RUN_FILE} lists shards that are not those of a whole run ({kind}): it was tampered with."
        )
    _check_files(path, kind, shards)
    if shards:
        open_shards(path, layout, shards)
    return _Exported(path.name, kind, about, layout, float(told["created"]), shards)


def _is_record(told: Any, run: str) -> bool:
    return (
        isinstance(told, dict)
        and told.get("format") == FORMAT
        and told.get("id") == run
        and told.get("kind") in RUN_KINDS
        and type(told.get("created")) in (int, float)
        and 0 <= told["created"] < 1e11
        and isinstance(told.get("about"), dict)
        and isinstance(told.get("layout"), str)
        and isinstance(told.get("shards"), list)
    )


def _copy_files(source: Path, target: Path, kind: str, shards: Sequence[ShardRecord]) -> None:
    """A run's files, each read once more as a copy and checked there."""
    for name in _checked_bundle(source) if kind == "analysis" else [shard.name for shard in shards]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with open_regular(source / name) as held:
            write_whole(target / name, iter(lambda: held.read(1 << 22), b""))
    _check_files(target, kind, shards)


def _check_files(folder: Path, kind: str, shards: Sequence[ShardRecord]) -> None:
    for shard in shards:
        check_hash(folder / shard.name, shard)
    if kind == "analysis":
        _checked_bundle(folder)


def _checked_bundle(folder: Path) -> list[str]:
    """The files of a run's bundle, by their names in the run's folder; all were checked against their hashes."""
    try:
        files = read_bundle(folder / BUNDLE).metadata["files"]
    except (ValueError, OSError) as error:
        raise StoreError(f"the analysis in {folder / BUNDLE} cannot be copied: {error}") from error
    return [f"{BUNDLE}/{name}" for name in (*files, METADATA)]
