"""Is every byte still what was written? Shards against their hashes, folders against the catalogue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tdgeom.files.bundle import read as read_bundle
from tdgeom.files.errors import StoreError
from tdgeom.files.shard_writing import file_sha256
from tdgeom.files.shards import Shard
from tdgeom.store.about import valid_id
from tdgeom.store.catalogue import BUNDLE, Catalogue
from tdgeom.store.reader import open_shards
from tdgeom.store.records import ShardRecord

__all__ = ["Damage", "verify"]


@dataclass(frozen=True)
class Damage:
    """What is wrong: with a shard of a run, with a run, or (both None) with the catalogue."""

    problem: str
    run: str | None = None
    shard: str | None = None

    def __str__(self) -> str:
        where = "/".join(part for part in (self.run, self.shard) if part) or "the catalogue"
        return f"{where}: {self.problem}"


def verify(catalogue: Catalogue, run: str | None = None) -> list[Damage]:
    """Everything that is wrong with a run; with all runs, their folders and the catalogue, where none is named.

    Raises:
        StoreLookupError: no such run. StoreError: the catalogue cannot be read at all.
    """
    if run is not None:
        return _damage_of_run(catalogue, catalogue.record(run).id)
    found = [Damage(problem) for problem in catalogue.damage()]
    runs = [record.id for record in catalogue.records()]
    for known in runs:
        found += _damage_of_run(catalogue, known)
    for path in sorted(catalogue.folder.iterdir()):
        # a writer killed before it entered its run leaves a folder without shards, which is no damage
        if valid_id(path.name) and path.name not in runs and any(path.glob("*.safetensors")):
            found.append(
                Damage(
                    "shards of a run that the catalogue does not have: import it again, or delete the folder",
                    path.name,
                )
            )
    return found


def _damage_of_run(catalogue: Catalogue, run: str) -> list[Damage]:
    record = catalogue.record(run)
    try:
        folder, layout, shards = catalogue.folder_of(run), catalogue.layout(run), catalogue.shards(run)
        if record.kind == "analysis" and record.state == "complete":
            read_bundle(folder / BUNDLE)
    except (StoreError, ValueError, OSError) as error:
        return [Damage(str(error), run)]
    problems = [(shard, _damage_of_shard(folder / shard.name, shard)) for shard in shards]
    found = [Damage(problem, run, shard.name) for shard, problem in problems if problem is not None]
    if shards and not found:
        try:
            open_shards(folder, layout, shards)
        except StoreError as error:
            found.append(Damage(str(error), run))
    return found


def _damage_of_shard(path: Path, shard: ShardRecord) -> str | None:
    try:
        Shard(path, size=shard.bytes)
        digest = file_sha256(path)
    except StoreError as error:
        return str(error)
    if digest != shard.sha256:
        return (
            f"its SHA-256 is {digest[:16]}..., it was written with {shard.sha256[:16]}...: a bit has changed."
        )
    return None
