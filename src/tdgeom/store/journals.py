"""How SQLite makes writing safe: by a log beside the file (WAL), or by a rollback journal, which network file systems need.

The log is shared between processes through memory, which two machines do not have in common.
"""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

from tdgeom.core.warnings import tell

__all__ = ["Journal", "begin_journal", "keep_journal", "network_file_system"]

Journal = Literal["wal", "rollback"]
_MODES = {"wal": "WAL", "rollback": "DELETE"}
_NETWORK = {
    "nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "ncpfs", "afs", "9p", "lustre", "beegfs", "gpfs", "ceph", "glusterfs",
    "pvfs2", "orangefs", "panfs", "davfs", "virtiofs",
}  # fmt: skip
_BEHIND_FUSE = (
    "sshfs", "glusterfs", "ceph", "s3", "gcsfuse", "juicefs", "rclone", "davfs", "smb", "nfs", "weka",
)  # fmt: skip
_MOUNTS = Path("/proc/self/mountinfo")


def begin_journal(connection: sqlite3.Connection, path: Path, journal: Journal | None) -> None:
    """Choose the journal of a new file; None: by the file system that it lies on."""
    _refuse_other(journal)
    _set(connection, journal or ("rollback" if network_file_system(path.parent) else "wal"))


def keep_journal(connection: sqlite3.Connection, path: Path, journal: Journal | None) -> None:
    """Bring a file to the journal asked for; where none is, leave it, and say so where it does not fit the file system."""
    _refuse_other(journal)
    has_log = connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    if journal is not None:
        if has_log != (journal == "wal"):
            _set(connection, journal)
    elif has_log and (kind := network_file_system(path.parent)):
        tell(
            f"{path} lies on a network file system ({kind}) and keeps a log that processes of one machine alone can share (WAL): "
            f"writers on two machines can damage it. Open it once with ActivationStore({str(path.parent)!r}, "
            f"journal='rollback'), while nobody else uses it; or keep to one machine.",
            UserWarning,
        )


def network_file_system(folder: Path | str) -> str | None:
    """The kind of file system that a folder lies on, where that is one of a network; None of others, and where nothing tells.

    Told by the kernel's table of mounts, which Linux has.
    """
    with suppress(OSError, ValueError):
        place = os.path.realpath(folder)
        found = ""
        longest = -1
        for line in _MOUNTS.read_text(errors="replace").splitlines():
            before, _, behind = line.partition(" - ")
            mounted = before.split()[4].encode().decode("unicode_escape")
            inside = place == mounted or place.startswith(mounted.rstrip("/") + "/")
            if inside and len(mounted) >= longest:
                longest, found = len(mounted), behind.split()[0]
        kind, _, program = found.partition(".")
        if found in _NETWORK or (kind == "fuse" and any(name in program for name in _BEHIND_FUSE)):
            return found
    return None


def _refuse_other(journal: Journal | None) -> None:
    if journal is not None and journal not in _MODES:
        raise ValueError(f"journal takes 'wal' or 'rollback', got {journal!r}.")


def _set(connection: sqlite3.Connection, journal: Journal) -> None:
    for attempt in range(50):  # changing the mode is the one step that SQLite's own patience does not cover
        try:
            connection.execute(f"PRAGMA journal_mode={_MODES[journal]}")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or attempt == 49:
                raise
            time.sleep(0.05)
