"""Files and folders: opened without following links, written whole or not at all, hashed, failures explained."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tdgeom.files.errors import StoreError

__all__ = [
    "NO_LINK",
    "explained",
    "explained_writing",
    "file_sha256",
    "is_taken",
    "open_regular",
    "read_whole",
    "sha256_of",
    "sync_folder",
    "whole_folder",
    "write_whole",
]

# Windows lacks these; O_NONBLOCK keeps a pipe that took a file's place from blocking open() for ever.
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_STEP = 1 << 18  # bytes a read() or write(): up to three times as fast as whole tensors at once, on Linux

_FULL = (
    "no space is left (or a quota or the file size limit is reached). Every shard written before is safe and the run is "
    "not complete: free space, then continue it with StoreActivations(..., resume=run_id) or remove it."
)
_REFUSED = "the folder cannot be written. Give a folder of your own, or mount it writable."
_CLOSED = "it is closed to this user. Ask for the right to it (ls -l), or give a copy of your own."
_GONE = "the folder is gone (removed, moved, or its disk unmounted). Bring it back, then resume the run."
_LINK = "it is a symbolic link, which a store never holds: the folder was tampered with."
_REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EFBIG: _FULL,
    getattr(errno, "EDQUOT", errno.ENOSPC): _FULL,
    errno.EROFS: _REFUSED,
    errno.EACCES: _REFUSED,
    errno.EPERM: _REFUSED,
    errno.ENOENT: _GONE,
    errno.ENOTDIR: _GONE,
    getattr(errno, "ESTALE", errno.ENOENT): _GONE,
    errno.ELOOP: _LINK,
    errno.EMFILE: "this process has too many files open. Close some, or raise the limit (ulimit -n).",
}


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """Errors of the operating system inside become the store's: what was being done, what came, what helps."""
    try:
        yield
    except OSError as error:
        is_read = doing.startswith(("reading", "opening"))
        closed = is_read and error.errno in (errno.EACCES, errno.EPERM)
        remedy = _CLOSED if closed else _REMEDIES.get(error.errno or 0, "the disk refused.")
        raise StoreError(f"{doing}: {error.strerror or error}; {remedy}") from error


@contextmanager
def explained_writing(what: str | Path) -> Iterator[None]:
    """Errors of the operating system inside say in words what could not be written and what helps; they stay ``OSError``."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # words already
            raise
        at = "" if error.filename is None or ".draft" in str(error.filename) else f" (at {error.filename})"
        full = "no space is left (or a quota or the file size limit is reached): free some, or take another disk."
        remedy = _REMEDIES.get(error.errno, "")
        help_ = (
            full if remedy is _FULL else "Give another folder." if remedy in ("", _LINK, _GONE) else remedy
        )
        kind: type[OSError] = next(one for one in type(error).__mro__ if one.__module__ == "builtins")
        raise kind(f"{what} could not be written: {error.strerror or error}{at}; {help_}") from error


def open_regular(path: Path) -> io.FileIO:
    """Open a file for reading: a regular file, not a link, a pipe or a device.

    Raises:
        StoreError: it is missing, unreadable or no regular file.
    """
    with explained(f"opening {path}"):
        handle = os.open(path, os.O_RDONLY | NO_LINK | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise StoreError(f"{path} is no regular file: the folder was tampered with, or is no store.")
    return os.fdopen(handle, "rb", buffering=0)


def read_whole(path: Path, largest: int) -> bytes:
    """A file's bytes, at most one more than ``largest``."""
    with explained(f"reading {path}"), open_regular(path) as handle:
        return handle.read(largest + 1)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with explained(f"reading {path}"), open_regular(path) as handle:
        return sha256_of(iter(lambda: handle.read(_STEP), b""))


def sha256_of(chunks: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of chunks of bytes one after the other, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` survive a power cut."""
    if os.name == "nt":  # folders cannot be opened there; NTFS journals renames
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write beside ``path``, bring the bytes to the disk, then rename: ``path`` is whole or absent, at any moment.

    Raises:
        StoreError: the disk refused; nothing is left behind.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with explained(f"writing {path}"):
            draft.unlink(missing_ok=True)  # of a killed process that had the same id
            with open(draft, "xb", buffering=0) as handle:  # never through a link that somebody put there
                for chunk in chunks:
                    rest = memoryview(chunk)
                    while rest.nbytes:
                        rest = rest[handle.write(rest[:_STEP]) :]
                os.fsync(handle.fileno())
            os.replace(draft, path)
            sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def is_taken(folder: Path) -> bool:
    """Whether something is there, and no empty folder."""
    return folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir())))


@contextmanager
def whole_folder(folder: Path, replace: bool = False) -> Iterator[Path]:
    """A draft beside ``folder`` to fill, which is renamed when the block ends: ``folder`` is whole or absent, at any moment.

    An empty folder may be there; with ``replace`` any is exchanged for the draft.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft, old = (
        folder.with_name(f".{folder.name}.{secrets.token_hex(6)}.{end}") for end in ("draft", "old")
    )
    try:
        draft.mkdir()
        yield draft
        for path in draft.rglob("*"):  # bytes reach the disk before the folder gets its name
            if path.is_file():
                with open(path, "r+b") as handle:
                    os.fsync(handle.fileno())
        if replace and folder.exists():
            os.rename(folder, old)
        elif folder.exists():
            folder.rmdir()  # an empty one gives way
        os.rename(draft, folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
