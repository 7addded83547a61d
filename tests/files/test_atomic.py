"""Files and folders: whole or absent, never through a link, failures in words."""

from __future__ import annotations

import errno
import os

import pytest

from tdgeom.files.atomic import explained, open_regular, whole_folder, write_whole
from tdgeom.files.errors import StoreError


def test_a_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"before")

    def half():
        yield b"half"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StoreError, match="writing .*No space left on device; no space is left"):
        write_whole(path, half())
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
    write_whole(path, [b"after"])
    assert path.read_bytes() == b"after" and list(tmp_path.iterdir()) == [path]


def test_an_interruption_leaves_no_draft(tmp_path):
    def interrupted():
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "x", interrupted())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "no space is left"), (errno.EDQUOT, "no space is left"), (errno.EROFS, "mount it writable"),
        (errno.EACCES, "mount it writable"), (errno.ENOENT, "the folder is gone"), (errno.ELOOP, "symbolic link"),
        (errno.EIO, "the disk refused"),
    ],
)  # fmt: skip
def test_errors_of_the_system_are_explained(code, remedy):
    with pytest.raises(StoreError, match=f"writing x: .*{remedy}"), explained("writing x"):
        raise OSError(code, os.strerror(code))


def test_only_regular_files_are_opened(tmp_path):
    (tmp_path / "file").write_bytes(b"text")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    with open_regular(tmp_path / "file") as handle:
        assert handle.read() == b"text"
    with pytest.raises(StoreError, match="symbolic link"):
        open_regular(tmp_path / "link")
    for name in ("pipe", "."):
        with pytest.raises(StoreError, match="no regular file"):
            open_regular(tmp_path / name)
    with pytest.raises(StoreError, match="the folder is gone"):
        open_regular(tmp_path / "missing")


def test_a_draft_is_never_written_through_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / f".x.{os.getpid()}.draft").symlink_to(victim)
    write_whole(tmp_path / "x", [b"new"])
    assert victim.read_bytes() == b"precious" and (tmp_path / "x").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["victim", "x"]


def test_a_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "made" / "x") as draft:
        (draft / "half").write_bytes(b"half")
        raise KeyboardInterrupt
    assert list((tmp_path / "made").iterdir()) == []
    (tmp_path / "x").mkdir()
    with whole_folder(tmp_path / "x") as draft:
        (draft / "file").write_bytes(b"whole")
        assert list((tmp_path / "x").iterdir()) == []
    with pytest.raises(OSError), whole_folder(tmp_path / "x") as draft:
        (draft / "file").write_bytes(b"another")
    assert (tmp_path / "x" / "file").read_bytes() == b"whole"
    with whole_folder(tmp_path / "x", replace=True) as draft:
        (draft / "other").write_bytes(b"new")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["other"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "x"]


@pytest.mark.parametrize("mask", [0o077, 0o002])
def test_a_folder_keeps_to_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        with whole_folder(tmp_path / "x") as draft:
            (draft / "file").write_bytes(b"")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o777 & ~mask
