"""Runs out of a store and into another: copied whole, checked against their hashes, and never trusted on the way in."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdgeom.store.about import describe, valid_id
from tdgeom.store.catalogue import KINDS, ShardRecord
from tdgeom.store.errors import StoreError
from tdgeom.store.files import explain, open_regular
from tdgeom.store.json_text import canonical, read_json
from tdgeom.store.layout import Layout
from tdgeom.store.shard_writing import file_sha256
from tdgeom.store.shards import Shard
from tdgeom.store.writer import RunLock

if TYPE_CHECKING:
    from tdgeom.store.store import ActivationStore

__all__ = ["export", "import_runs"]

FORMAT = 1
RECORD = "run.json"


def export(store: ActivationStore, runs: Sequence[str], folder: Path) -> Path:
    """Copy complete runs into a new folder, whole or not at all: a folder a run, its shards and ``run.json``.

    Raises:
        StoreError: the folder exists, a run is not complete or is an analysis, a shard is damaged, or the disk refused.
    """
    folder = folder.absolute()
    if folder.exists():
        raise StoreError(f"{folder} exists already: export into a new folder.")
    records = [store.catalogue.record(run) for run in runs]
    for record in records:
        if record.state != "complete" or record.kind == "analysis":
            why = (
                "its bundle is a folder that can be copied as it is"
                if record.kind == "analysis"
                else "resume it or leave it out"
            )
            raise StoreError(f"run {record.id} ({record.kind}, {record.state}) cannot be exported: {why}.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise explain(error, f"exporting into {folder}") from error
    try:
        for record in records:
            inside = draft / record.id
            inside.mkdir()
            shards = store.catalogue.shards(record.id)
            for shard in shards:
                _copy(store.path / record.id / shard.name, inside / shard.name, shard)
            about = record.about
            told = {
                "format": FORMAT,
                "id": record.id,
                "kind": record.kind,
                "created": record.created,
                "about": {
                    **{name: getattr(about, name) for name in ("model", "revision", "dataset", "experiment")},
                    "tag": list(about.tags),
                    **about.details,
                },
                "layout": store.catalogue.layout(record.id).to_json(),
                "shards": [
                    [one.rank, one.number, one.rows, one.bytes, one.sha256, dict(one.rounding)]
                    for one in shards
                ],
            }
            (inside / RECORD).write_text(canonical(told), encoding="utf-8")
        draft.chmod(0o755)
        os.rename(draft, folder)
    except OSError as error:
        raise explain(error, f"exporting into {folder}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def import_runs(store: ActivationStore, folder: str | Path) -> list[str]:
    """Take the runs of an exported folder into a store, under their own ids; those it already has are left as they are.

    Raises:
        StoreError: no exported folder, or one that was changed; nothing of such a run is taken.
    """
    folder = Path(folder)
    found = sorted(path for path in folder.iterdir() if valid_id(path.name)) if folder.is_dir() else []
    if not found:
        raise StoreError(f"{folder} holds no exported runs: give the folder that export made.")
    checked = [_read(path) for path in found]  # all of them, before anything is taken
    known = {record.id for record in store.catalogue.records()}
    for run, kind, created, about, layout, shards in checked:
        if run in known:
            continue
        lock = RunLock(store.catalogue, run)
        try:
            for shard in shards:
                _copy(folder / run / shard.name, lock.folder / shard.name, shard)
            store.catalogue.add_run(run, kind, describe(**about), layout, created)
            for shard in shards:
                store.catalogue.add_shard(run, shard)
            store.catalogue.set_state(run, "complete")
        finally:
            lock.release()
    return [run for run, *_ in checked]


def _read(path: Path) -> tuple[str, str, float, dict[str, Any], Layout, list[ShardRecord]]:
    """One exported run, its record and its shards checked in full."""
    if path.is_symlink():
        raise StoreError(f"{path} is a symbolic link, which an export never holds: it was tampered with.")
    try:
        with open_regular(path / RECORD) as handle:
            told = read_json(handle.read(17 * 2**20), f"{path / RECORD}")
    except OSError as error:
        raise explain(error, f"reading {path / RECORD}") from error
    fine = isinstance(told, dict) and told.get("format") == FORMAT and told.get("id") == path.name
    fine = (
        fine
        and told.get("kind") in KINDS[:2]
        and type(told.get("created")) in (int, float)
        and 0 <= told["created"] < 1e11
    )
    fine = fine and isinstance(told.get("about"), dict) and isinstance(told.get("layout"), str)
    if not fine or not isinstance(told.get("shards"), list):
        raise StoreError(
            f"{path / RECORD} is not the record of run {path.name}: it is damaged or was tampered with."
        )
    layout = Layout.from_json(told["layout"], f"the layout in {path / RECORD}")
    try:
        describe(**told["about"])
        shards = [_shard(path, one) for one in told["shards"]]
    except (TypeError, ValueError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path / RECORD} is damaged or was tampered with: {error}") from error
    return path.name, told["kind"], float(told["created"]), told["about"], layout, shards


def _shard(path: Path, told: Any) -> ShardRecord:
    numbers = told[:4] if isinstance(told, list) and len(told) == 6 else [None]
    if not all(type(one) is int and 0 <= one < 2**48 for one in numbers) or not isinstance(told[5], dict):
        raise StoreError(f"{path / RECORD} lists a shard that is none: {str(told)[:80]}.")
    shard = ShardRecord(*told)
    Shard(path / shard.name, size=shard.bytes)
    if file_sha256(path / shard.name) != shard.sha256:
        raise StoreError(f"{path / shard.name} has changed since it was exported: its SHA-256 differs.")
    return shard


def _copy(source: Path, target: Path, shard: ShardRecord) -> None:
    try:
        with open_regular(source) as held, open(target, "xb") as copy:
            shutil.copyfileobj(held, copy, 1 << 22)
            copy.flush()
            os.fsync(copy.fileno())
    except OSError as error:
        raise explain(error, f"copying {source}") from error
    if file_sha256(target) != shard.sha256:
        raise StoreError(f"{source} is damaged: its SHA-256 is not the one it was written with.")
