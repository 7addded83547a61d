"""One writer at a time: a lock that the system releases when the process ends, however it ends."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
import weakref
from datetime import datetime, timezone
from pathlib import Path

from tdgeom.files.atomic import NO_LINK, explained
from tdgeom.files.errors import StoreBusyError, StoreError
from tdgeom.files.json_text import read_json

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["Lock", "is_locked"]

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_LOCKED_BYTE = 1 << 30  # on Windows a lock covers bytes: one far beyond the note, which stays readable
_PATIENCE = 1.0  # seconds: somebody who only asks whether it is locked holds it for an instant


class Lock:
    """The right to write, for one process; the file says who holds it.

    Raises:
        StoreBusyError: another process holds it (pid, host and start are in the message).
    """

    _handle = -1

    def __init__(self, path: Path, what: str) -> None:
        try:
            with explained(f"locking {path}"):
                self._handle = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
                if not _try_lock(self._handle, patience=_PATIENCE):
                    raise StoreBusyError(
                        f"{what} is being written by {_holder(self._handle)}. Wait for it, stop it (stage.reset() for a "
                        f"stage of this process), or write a run of your own."
                    )
                _write_note(self._handle)
        except BaseException:
            self.release()
            raise
        _HELD.add(self)

    @property
    def is_held(self) -> bool:
        """Whether this process holds it still."""
        return self._handle >= 0

    def release(self) -> None:
        """Let the next writer in."""
        if self._handle >= 0:
            _HELD.discard(self)
            os.close(self._handle)
            self._handle = -1

    __del__ = release


_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()


def _release_in_child() -> None:
    # A forked data-loading worker would otherwise keep the lock alive after its parent was killed.
    for lock in list(_HELD):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


def is_locked(path: Path) -> bool:
    """Whether a writer holds the lock at this moment."""
    try:
        handle = os.open(path, (os.O_RDWR if sys.platform == "win32" else os.O_RDONLY) | NO_LINK)
    except OSError:
        return False
    try:
        return not _try_lock(handle, shared=True)
    except OSError:  # a file system without locks: then nobody holds one
        return False
    finally:
        os.close(handle)


def _try_lock(handle: int, patience: float = 0.0, shared: bool = False) -> bool:
    until = time.monotonic() + patience
    while True:
        try:
            if sys.platform == "win32":
                os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
        if time.monotonic() >= until:
            return False
        time.sleep(0.02)


def _write_note(handle: int) -> None:
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    note = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, json.dumps(note).encode())


def _holder(handle: int) -> str:
    os.lseek(handle, 0, os.SEEK_SET)
    try:
        note = read_json(os.read(handle, 4096), "the lock's note")
        return f"process {int(note['pid'])} on {str(note['host'])[:80]!r} since {str(note['started'])[:40]!r}"
    except (StoreError, ValueError, KeyError, TypeError):  # a note half written, or not ours
        return "another process"
