"""Is every byte still what was written? Shards against their hashes, folders against the catalogue."""

from __future__ import annotations

from dataclasses import dataclass

from tdgeom.core.visible_text import visible
from tdgeom.files.bundle import read_bundle
from tdgeom.files.errors import StoreError
from tdgeom.store.catalogue import BUNDLE, Catalogue
from tdgeom.store.run_ids import valid_id
from tdgeom.store.run_shards import check_hash, open_shard, open_shards

__all__ = ["Damage", "find_damage"]


@dataclass(frozen=True)
class Damage:
    """What is wrong: with a shard of a run, with a run, or (both None) with the catalogue."""

    problem: str
    run: str | None = None
    shard: str | None = None

    def __str__(self) -> str:
        where = "/".join(part for part in (self.run, self.shard) if part) or "the catalogue"
        return visible(f"{where}: {self.problem}")


def find_damage(catalogue: Catalogue, run: str | None = None) -> list[Damage]:
    """Everything that is wrong with a run; with all runs, their folders and the catalogue, where none is named.

    Raises:
        StoreLookupError: no such run. StoreError: the catalogue cannot be read at all.
    """
    broken = [Damage(problem, of) for of, problem in catalogue.broken_seals()]
    if run is not None:
        known = catalogue.record(run).id
        return [*(one for one in broken if one.run == known), *_damage_of_run(catalogue, known)]
    found = [*(Damage(problem) for problem in catalogue.damage()), *broken]
    runs = catalogue.ids()
    for known in runs:
        found += _damage_of_run(catalogue, known)
    for path in sorted(catalogue.folder.iterdir()):
        # a writer killed before it entered its run leaves a folder without shards, which is no damage
        if valid_id(path.name) and path.name not in runs and any(path.glob("*.safetensors")):
            problem = (
                "shards of a run that the catalogue does not have: import it again, or delete the folder"
            )
            found.append(Damage(problem, path.name))
    return found


def _damage_of_run(catalogue: Catalogue, run: str) -> list[Damage]:
    found = []
    try:
        record, folder, layout = catalogue.record(run), catalogue.folder_of(run), catalogue.layout(run)
        shards = catalogue.shards(run)
        if record.kind == "analysis" and record.state == "complete":
            read_bundle(folder / BUNDLE)
        for shard in shards:
            try:
                check_hash(open_shard(folder, shard, []).path, shard)
            except StoreError as error:
                found.append(Damage(str(error), run, shard.name))
        if shards and not found:
            open_shards(folder, layout, shards)
    except (StoreError, ValueError, OSError) as error:
        found.append(Damage(str(error), run))
    return found
