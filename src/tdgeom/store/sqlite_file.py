"""The SQLite file: opened with care, its tables checked before they are believed, its errors in plain words."""

from __future__ import annotations

import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from tdgeom.files.errors import StoreError
from tdgeom.store.journals import Journal, begin_journal, keep_journal
from tdgeom.store.seals import TABLE as SEALS
from tdgeom.store.seals import seal_everything

__all__ = ["SqliteFile"]

FORMAT = 2
_UNSEALED = 1  # the format without the table of seals, which the first writing adds
_APPLICATION = 0x7464676D  # "tdgm"
_TABLES = {
    "runs": """CREATE TABLE runs (
        id TEXT PRIMARY KEY, kind TEXT NOT NULL, state TEXT NOT NULL, reason TEXT, created REAL NOT NULL,
        updated REAL NOT NULL, model TEXT, revision TEXT, dataset TEXT, experiment TEXT NOT NULL,
        details TEXT NOT NULL, layout TEXT NOT NULL)""",
    "tags": "CREATE TABLE tags (run TEXT NOT NULL, tag TEXT NOT NULL, PRIMARY KEY (run, tag))",
    "shards": """CREATE TABLE shards (
        run TEXT NOT NULL, rank INTEGER NOT NULL, number INTEGER NOT NULL, rows INTEGER NOT NULL,
        bytes INTEGER NOT NULL, sha256 TEXT NOT NULL, rounding TEXT NOT NULL, PRIMARY KEY (run, rank, number))""",
    "seals": SEALS,
    "runs_created": "CREATE INDEX runs_created ON runs (created)",
    "runs_experiment": "CREATE INDEX runs_experiment ON runs (experiment)",
}
_PATIENCE = 30.0  # seconds to wait for another process's transaction
_LONGEST_QUERY = 60.0  # seconds: a damaged tree of pages must not hang a reader
_LONGEST_VALUE = 32 * 2**20  # bytes of one value


class SqliteFile:
    """The file at ``path``: a connection an operation, so that forks, threads and copies are no matter."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create_unless_whole(self, journal: Journal | None = None) -> None:
        """Make the file and its tables, also where a process was killed while it made them.

        Args:
            journal: how writing is made safe, also for a file that is there; None: as it is, of a new one as its disk needs it.

        Raises:
            StoreError: it is something else than a catalogue.
        """
        if self.path.exists():
            with self._explained("opening"), self._connected_to_read() as connection:
                if not _is_blank(connection):
                    keep_journal(connection, self.path, journal)
                    return
        with self._explained("creating"), closing(self._connect("mode=rwc")) as connection:
            begin_journal(connection, self.path, journal)
            connection.execute("BEGIN IMMEDIATE")
            if _is_blank(connection):
                for statement in _TABLES.values():
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id={_APPLICATION}")
                connection.execute(f"PRAGMA user_version={FORMAT}")
            connection.execute("COMMIT")
            self._check(connection)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that sees one state of the file."""
        self._refuse_missing()
        with self._explained("reading"), self._connected_to_read() as connection:
            self._check(connection)
            connection.execute("BEGIN")
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it or nothing."""
        self._refuse_missing()
        with self._explained("writing"), closing(self._connect("mode=rw")) as connection:
            self._check(connection)
            connection.execute("BEGIN IMMEDIATE")
            try:
                if connection.execute("PRAGMA user_version").fetchone()[0] == _UNSEALED:
                    seal_everything(connection)
                    connection.execute(f"PRAGMA user_version={FORMAT}")
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # the first error is the one to report
                    connection.execute("ROLLBACK")
                raise

    def damage(self) -> list[str]:
        """What SQLite's own check of the file finds."""
        with self.reading() as connection:
            found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(20)")]
        return [] if found == ["ok"] else found

    def _connect(self, mode: str) -> sqlite3.Connection:
        if self.path.is_symlink():
            raise StoreError(
                f"{self.path} is a symbolic link, which a store never holds: it was tampered with."
            )
        if mode == "mode=rwc":
            with suppress(OSError):  # SQLite itself makes a file narrower than the umask allows
                self.path.touch()
        uri = f"{self.path.absolute().as_uri()}?{mode}"
        connection = sqlite3.connect(uri, uri=True, timeout=_PATIENCE, isolation_level=None)
        try:
            until = time.monotonic() + _LONGEST_QUERY
            connection.set_progress_handler(lambda: time.monotonic() > until, 1_000_000)
            if sys.version_info >= (3, 11):
                connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_VALUE)
            connection.execute("PRAGMA trusted_schema=OFF")
            connection.execute("PRAGMA cell_size_check=ON")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute(
                "SELECT 1 FROM sqlite_master LIMIT 1"
            ).fetchone()  # until here nothing was opened
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def _connected_to_read(self) -> Iterator[sqlite3.Connection]:
        try:
            connection = self._connect("mode=rw")
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise
        else:
            with closing(connection):
                yield connection
            return
        # SQLite's readers write too (shared memory beside the file), which a read-only folder or a full disk forbids.
        before = self._changed()
        has_log = any(
            log.exists() and log.stat().st_size > 0
            for log in (self.path.with_name(self.path.name + end) for end in ("-wal", "-journal"))
        )
        with closing(self._connect("mode=ro" if has_log else "mode=ro&immutable=1")) as connection:
            yield connection
        if (
            not has_log and self._changed() != before
        ):  # without a lock, only this tells a whole answer from a torn one
            raise StoreError(
                f"{self.path} was written while it was read, in a folder closed to this reader: read again."
            )

    def _changed(self) -> tuple[int, int]:
        found = self.path.stat()
        return found.st_mtime_ns, found.st_size

    def _refuse_missing(self) -> None:
        if not self.path.exists():
            raise StoreError(
                f"{self.path} is gone: the store's folder was removed, moved or unmounted. Bring it back."
            )

    def _check(self, connection: sqlite3.Connection) -> None:
        """Exactly our tables and nothing else: no trigger, no view, nothing that acts when it is read."""
        if connection.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
            raise StoreError(f"{self.path} is a SQLite file, but no catalogue of tdgeom.")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version not in (_UNSEALED, FORMAT):
            raise StoreError(
                f"{self.path} has format {version}; this version reads {FORMAT}. Use a matching tdgeom."
            )
        found = dict(connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
        own = {name: sql for name, sql in _TABLES.items() if name != "seals" or version != _UNSEALED}
        odd = [str(name)[:80] for name in {**found, **own} if found.get(name) != own.get(name)]
        if odd:
            raise StoreError(
                f"{self.path} has other tables than a catalogue of tdgeom: {odd[:12]}. It is refused."
            )

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise StoreError(f"{doing} the catalogue {self.path}: {_remedy(str(error))}.") from error
        except sqlite3.Error as error:
            raise StoreError(
                f"{doing} the catalogue {self.path}: {error}. The file is damaged or was not written by tdgeom; the shards "
                f"beside it are safetensors files and can be read without it."
            ) from error
        except OSError as error:
            raise StoreError(f"{doing} the catalogue {self.path}: {error.strerror or error}.") from error
        except (UnicodeDecodeError, OverflowError) as error:
            raise StoreError(f"{doing} the catalogue {self.path}: {error}; the file is damaged.") from error


def _is_blank(connection: sqlite3.Connection) -> bool:
    counts = ("PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
    return not any(connection.execute(count).fetchone()[0] for count in counts)


def _remedy(said: str) -> str:
    if "full" in said or "disk I/O" in said:
        return f"{said}: no space is left (or the disk refused); what was recorded before is safe. Free space and go on"
    if "readonly" in said or "unable to open" in said:
        return f"{said}: the folder is gone or cannot be written"
    if "locked" in said:
        return f"{said}: another process has been writing it for {_PATIENCE:.0f} s. Try again"
    if "interrupted" in said:
        return f"{said}: no answer within {_LONGEST_QUERY:.0f} s, so the file is probably damaged"
    return said
