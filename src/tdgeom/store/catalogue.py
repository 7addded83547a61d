"""The catalogue: what runs there are, and which finished shards belong to each; every entry checked as it is read."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tdgeom.files.errors import StoreError, StoreLookupError
from tdgeom.files.json_text import canonical_json, read_json
from tdgeom.store.run_description import DETAILS, RunDescription
from tdgeom.store.run_ids import valid_id
from tdgeom.store.run_records import (
    RUN_KINDS,
    RUN_STATES,
    RunRecord,
    ShardRecord,
    first_gap,
    relative_errors,
)
from tdgeom.store.seals import broken_seals, drop_seals, refuse_broken, seal_run, seal_shard
from tdgeom.store.shard_layout import ShardLayout
from tdgeom.store.sqlite_file import SqliteFile
from tdgeom.store.write_lock import is_locked

__all__ = ["BUNDLE", "Catalogue"]

FILE = "catalogue.sqlite"
BUNDLE = "bundle"  # the folder of an analysis inside its run's
_RECORD = """SELECT r.id, r.kind, r.state, r.reason, r.created, r.updated, r.model, r.revision, r.dataset, r.experiment,
    r.details, (SELECT json_group_array(tag) FROM (SELECT tag FROM tags t WHERE t.run = r.id ORDER BY t.rowid)),
    (SELECT count(*) FROM shards s WHERE s.run = r.id), (SELECT total(rows) FROM shards s WHERE s.run = r.id),
    (SELECT total(bytes) FROM shards s WHERE s.run = r.id) FROM runs r"""
_ENDED_EARLY = "its writer ended before the run did: resume it or remove it"


class Catalogue(SqliteFile):
    """The SQLite file of the store in ``folder``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / FILE)
        self.folder = folder

    def folder_of(self, run: str) -> Path:
        """The folder with a run's files.

        Raises:
            StoreError: a link took its place.
        """
        path = self.folder / run
        if path.is_symlink():
            raise StoreError(f"{path} is a symbolic link, which a store never holds: it was tampered with.")
        return path

    def add_run(
        self,
        run: str,
        kind: str,
        about: RunDescription,
        layout: ShardLayout,
        created: float | None = None,
        shards: Sequence[ShardRecord] | None = None,
    ) -> None:
        """Enter a run in state ``writing``, or with all its shards as ``complete``; one that is there already stays as it is."""
        now = time.time()
        names = (about.model, about.revision, about.dataset, about.experiment)
        times = (now if created is None else created, now)
        state = "writing" if shards is None else "complete"
        values = (run, kind, state, None, *times, *names, canonical_json(about.details), layout.to_json())
        marks = ",".join("?" * len(values))
        with self.changing([run]) as connection:
            if connection.execute(f"INSERT OR IGNORE INTO runs VALUES ({marks})", values).rowcount:
                connection.executemany("INSERT INTO tags VALUES (?, ?)", [(run, tag) for tag in about.tags])
                for shard in shards or ():
                    _enter_shard(connection, run, shard)

    def add_shard(self, run: str, shard: ShardRecord) -> None:
        """Enter a finished shard: from here on its rows belong to the run."""
        with self.changing([run]) as connection:
            _enter_shard(connection, run, shard)
            update = "UPDATE runs SET updated=? WHERE id=? AND state='writing'"
            if not connection.execute(update, (time.time(), run)).rowcount:
                raise StoreError(
                    f"run {run} is no longer being written (it was removed or finished elsewhere)."
                )

    def complete(self, run: str) -> None:
        """Mark a run as complete; nothing changes where it is already.

        Raises:
            StoreError: it failed or was removed elsewhere.
        """
        with self.changing([run]) as connection:
            update = (
                "UPDATE runs SET state='complete', updated=? WHERE id=? AND state IN ('writing', 'complete')"
            )
            if not connection.execute(update, (time.time(), run)).rowcount:
                raise StoreError(f"run {run} failed or was removed elsewhere, so it is not complete.")

    def set_state(self, run: str, state: str, reason: str | None = None) -> None:
        """Move a run to another state."""
        with self.changing([run], damaged=state == "removing") as connection:
            update = "UPDATE runs SET state=?, reason=?, updated=? WHERE id=?"
            if not connection.execute(update, (state, reason, time.time(), run)).rowcount:
                raise StoreLookupError(f"run {run} is no longer in the store.")

    def drop_run(self, run: str) -> None:
        """Forget a run; its files are the caller's to remove."""
        with self.writing() as connection:
            for table, column in (("shards", "run"), ("tags", "run"), ("runs", "id")):
                connection.execute(f"DELETE FROM {table} WHERE {column} = ?", (run,))
            drop_seals(connection, run)

    @contextmanager
    def changing(self, runs: Sequence[str], damaged: bool = False) -> Iterator[sqlite3.Connection]:
        """``writing`` what is said of these runs: sealed again behind it, refused where a seal is broken unless ``damaged``."""
        with self.writing() as connection:
            for run in () if damaged else runs:
                refuse_broken(connection, run)
            yield connection
            for run in runs:
                seal_run(connection, run)

    def refuse_changed(self, run: str) -> None:
        """Raise a ``StoreError`` where a bit of what is said of a run or of its shards has changed by itself."""
        with self.reading() as connection:
            refuse_broken(connection, run, shards=True)

    def broken_seals(self) -> list[tuple[str, str]]:
        """(run, what is wrong) of every entry that is not as it was written."""
        with self.reading() as connection:
            return list(broken_seals(connection))

    def ids(self) -> list[str]:
        """The ids of all runs, oldest first, whatever else their entries say."""
        with self.reading() as connection:
            connection.text_factory = lambda raw: raw.decode(errors="replace")
            return [
                run
                for (run,) in connection.execute("SELECT id FROM runs ORDER BY created, rowid")
                if valid_id(run)
            ]

    def records(self, condition: str = "1", values: Sequence[Any] = ()) -> list[RunRecord]:
        """The runs (``r``) that meet a condition in SQL, its values bound, oldest first."""
        found = self._read(condition, values)
        left = [one.id for one in found if one.state == "writing" and not self.is_being_written(one.id)]
        if not left:
            return found
        # one whose writer came to its end between the two looks says so by now
        marks = ",".join("?" * len(left))
        again = {
            one.id: replace(one, state="failed", reason=_ENDED_EARLY) if one.state == "writing" else one
            for one in self._read(f"r.id IN ({marks})", left)
        }
        now = [again.get(one.id) if one.id in left else one for one in found]
        return [one for one in now if one is not None]

    def _read(self, condition: str, values: Sequence[Any]) -> list[RunRecord]:
        with self.reading() as connection:
            rows = connection.execute(
                f"{_RECORD} WHERE {condition} ORDER BY r.created, r.rowid", tuple(values)
            ).fetchall()
        return [self._record(row) for row in rows]

    def record(self, run: str) -> RunRecord:
        """One run by its whole id."""
        if not isinstance(run, str):
            raise TypeError(
                f"a run is named by its id, got {type(run).__name__}. A query's runs load themselves: "
                f"store.query(...).load(0); their ids are store.query(...).ids."
            )
        found = self.records("r.id = ?", (run,)) if valid_id(run) else []
        if not found:
            raise StoreLookupError(f"there is no run {str(run)[:40]!r} in {self.folder}.")
        return found[0]

    def metadata(self, record: RunRecord) -> dict[str, Any]:
        """Everything that is known of a run, as JSON values."""
        created = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="seconds")
        return {
            **{name: getattr(record, name) for name in ("id", "kind", "state", "reason")},
            "created": created,
            **{name: getattr(record, name) for name in ("shards", "rows", "bytes")},
            "relative_error": relative_errors(self.shards(record.id)),
            **record.about.told(),
        }

    def layout(self, run: str) -> ShardLayout:
        """What the shards of a run hold."""
        with self.reading() as connection:
            row = connection.execute("SELECT layout FROM runs WHERE id = ?", (run,)).fetchone()
        if row is None:
            raise StoreLookupError(f"there is no run {str(run)[:40]!r} in {self.folder}.")
        return ShardLayout.from_json(self._text(row[0], run), f"{self.path}: the layout of run {run}")

    def shards(self, run: str) -> list[ShardRecord]:
        """The finished shards of a run, by rank and number."""
        with self.reading() as connection:
            rows = connection.execute(
                "SELECT rank, number, rows, bytes, sha256, rounding FROM shards WHERE run = ? ORDER BY rank, number",
                (run,),
            ).fetchall()
        found = [self._shard(run, row) for row in rows]
        gap = first_gap(found)
        if gap is not None:
            raise StoreError(
                f"{self.path}: run {run} lacks a shard before {gap.name}: the catalogue is damaged."
            )
        return found

    def _shard(self, run: str, row: Sequence[Any]) -> ShardRecord:
        *told, rounding = row
        rounded = read_json(self._text(rounding, run), f"{self.path}: the rounding of run {run}")
        try:
            return ShardRecord.checked([*told, rounded])
        except ValueError as error:
            raise self._tampered(run) from error

    def _record(self, row: Sequence[Any]) -> RunRecord:
        run, kind, state, reason, created, updated, *told, details, tagged, shards, rows, size = row
        model, revision, dataset, experiment = told
        tags = read_json(self._text(tagged, run), f"{self.path}: the tags of run {run}")
        optional = (reason, model, revision, dataset)
        numbers = (created, updated, shards, rows, size)
        if (
            not valid_id(run)
            or kind not in RUN_KINDS
            or state not in RUN_STATES
            or not all(one is None or isinstance(one, str) for one in optional)
            or not all(isinstance(one, str) for one in (experiment, details, *tags))
            or not all(isinstance(one, int | float) and 0 <= one < 2**60 for one in numbers)
            or max(created, updated) > 1e11
        ):
            raise self._tampered(run)
        parsed = read_json(details, f"{self.path}: the details of run {run}")
        if not isinstance(parsed, dict) or not set(parsed) <= set(DETAILS):
            raise self._tampered(run)
        about = RunDescription(model, revision, dataset, experiment, tuple(tags), parsed)
        return RunRecord(run, kind, state, reason, created, updated, about, shards, int(rows), int(size))

    def is_being_written(self, run: str) -> bool:
        """Whether a process holds the right to write the run."""
        return any(is_locked(path) for path in (self.folder / run).glob("rank-*.lock"))

    def _text(self, value: Any, run: str) -> str:
        if not isinstance(value, str):
            raise self._tampered(run)
        return value

    def _tampered(self, run: Any) -> StoreError:
        return StoreError(f"{self.path}: the entry of run {str(run)[:40]!r} is damaged or was tampered with.")


def _enter_shard(connection: sqlite3.Connection, run: str, shard: ShardRecord) -> None:
    told = (shard.rank, shard.number, shard.rows, shard.bytes, shard.sha256, canonical_json(shard.rounding))
    connection.execute("INSERT INTO shards VALUES (?, ?, ?, ?, ?, ?, ?)", (run, *told))
    seal_shard(connection, run, shard.rank, shard.number)
