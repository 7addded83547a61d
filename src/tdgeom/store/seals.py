"""Seals: a hash of every entry of the catalogue, kept beside it, by which a field that has changed by itself is seen.

SQLite notices pages that make no sense; a bit inside a text or a number makes sense as another one.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

from tdgeom.files.errors import StoreError

__all__ = [
    "TABLE",
    "broken_seals",
    "drop_seals",
    "refuse_broken",
    "seal_everything",
    "seal_run",
    "seal_shard",
]

TABLE = "CREATE TABLE seals (run TEXT NOT NULL, part TEXT NOT NULL, sha256 TEXT NOT NULL, PRIMARY KEY (run, part))"
_OF_RUN = (
    "run"  # the part that stands for a run's own entry and its tags; those of shards are rank and number
)
_RUN = "SELECT * FROM runs WHERE id = ?"
_TAGS = "SELECT tag FROM tags WHERE run = ? ORDER BY rowid"
_SHARD = "SELECT * FROM shards WHERE run = ? AND rank = ? AND number = ?"
_ENTER = "INSERT OR REPLACE INTO seals VALUES (?, ?, ?)"


def seal_run(connection: sqlite3.Connection, run: str) -> None:
    """Seal what the catalogue says of a run, its shards aside, as it stands; nothing where it has none of that id."""
    if (entry := _of_run(connection, run)) is not None:
        connection.execute(_ENTER, (run, _OF_RUN, entry))


def seal_shard(connection: sqlite3.Connection, run: str, rank: int, number: int) -> None:
    """Seal a shard's entry, which never changes."""
    entry = connection.execute(_SHARD, (run, rank, number)).fetchone()
    connection.execute(_ENTER, (run, _part(rank, number), _hash(entry)))


def seal_everything(connection: sqlite3.Connection) -> None:
    """Make the table and seal all entries of a catalogue that had no seals."""
    connection.execute(TABLE)
    for (run,) in connection.execute("SELECT id FROM runs").fetchall():
        seal_run(connection, run)
    for place in connection.execute("SELECT run, rank, number FROM shards").fetchall():
        seal_shard(connection, *place)


def drop_seals(connection: sqlite3.Connection, run: str) -> None:
    """Forget a run's seals."""
    connection.execute("DELETE FROM seals WHERE run = ?", (run,))


def refuse_broken(connection: sqlite3.Connection, run: str, shards: bool = False) -> None:
    """Raise unless a run's entry is as it was written, with ``shards`` theirs too.

    Raises:
        StoreError: a field has changed by itself.
    """
    if not has_seals(connection):
        return
    sealed = dict(connection.execute("SELECT part, sha256 FROM seals WHERE run = ?", (run,)))
    found = {_OF_RUN: _of_run(connection, run)}
    if shards:
        found |= dict(_of_shards(connection, "WHERE run = ?", (run,), whole=False))
    else:
        sealed = {part: seal for part, seal in sealed.items() if part == _OF_RUN}
    broken = sorted(part for part in {**sealed, **found} if sealed.get(part) != found.get(part))
    if broken:
        raise StoreError(
            f"the catalogue's entry of run {run} ({', '.join(broken[:3])}) is not what was written: a bit of it has changed. "
            f"Restore catalogue.sqlite from a copy; the run's shards, beside it, are safetensors files and can be read without."
        )


def broken_seals(connection: sqlite3.Connection) -> Iterator[tuple[str, str]]:
    """(run, what is wrong), of all entries that are not as they were written, entries that are gone, and seals without one."""
    if not has_seals(connection):
        return
    connection.text_factory = lambda raw: raw.decode(errors="replace")
    sealed = {
        (run, part): seal for run, part, seal in connection.execute("SELECT run, part, sha256 FROM seals")
    }
    found: dict[tuple[Any, Any], str | None] = {
        (run, _OF_RUN): _of_run(connection, run)
        for (run,) in connection.execute("SELECT id FROM runs UNION SELECT run FROM tags").fetchall()
    }
    found |= {(run, part): entry for (run, part), entry in _of_shards(connection, "", (), whole=True)}
    for run, part in sorted({**sealed, **found}, key=str):
        if sealed.get((run, part)) != found.get((run, part)):
            what = (
                "its entry in the catalogue"
                if part == _OF_RUN
                else f"the catalogue's entry of its shard {part}"
            )
            how = (
                "was never written there, or its hash is damaged"
                if (run, part) not in sealed
                else "is gone, or its hash is damaged"
                if found.get((run, part)) is None
                else "is not what was written: a bit has changed"
            )
            yield str(run), f"{what} {how}"


def has_seals(connection: sqlite3.Connection) -> bool:
    """Whether the file has the table: those of the first format have not, until something is written."""
    return connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'seals'").fetchone() is not None


def _of_run(connection: sqlite3.Connection, run: Any) -> str | None:
    entry = connection.execute(_RUN, (run,)).fetchone()
    tags = [tag for (tag,) in connection.execute(_TAGS, (run,))]
    return None if entry is None and not tags else _hash([entry, tags])


def _of_shards(
    connection: sqlite3.Connection, where: str, values: Sequence[Any], whole: bool
) -> Iterator[tuple[Any, str]]:
    for entry in connection.execute(f"SELECT * FROM shards {where}", values):
        part = _part(*entry[1:3])
        yield ((entry[0], part) if whole else part), _hash(entry)


def _part(rank: Any, number: Any) -> str:
    return f"{rank}/{number}"


def _hash(values: Any) -> str:
    text = json.dumps(values, default=lambda raw: ["bytes", bytes(raw).hex()], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
