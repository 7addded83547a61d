"""Files, locks, JSON text and descriptions: the parts that the store's promises rest on."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
import torch

import models
import tdgeom as tg
from tdgeom.files.atomic import explain, open_regular, write_whole
from tdgeom.files.errors import StoreBusyError, StoreError
from tdgeom.files.json_text import DEEPEST_JSON, LARGEST_JSON, canonical, read_json
from tdgeom.store.about import describe, id_of, new_id, number_of, valid_id
from tdgeom.store.locks import Lock, is_locked


def test_a_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"before")

    def half(handle):
        handle.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StoreError, match="writing .*No space left on device; no space is left"):
        write_whole(path, half)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
    write_whole(path, lambda handle: handle.write(b"after"))
    assert path.read_bytes() == b"after" and list(tmp_path.iterdir()) == [path]


def test_an_interruption_leaves_no_draft(tmp_path):
    def interrupted(handle):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "x", interrupted)
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
    assert remedy in str(explain(OSError(code, os.strerror(code)), "writing x"))


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


def test_a_lock_is_held_by_one_and_says_by_whom(tmp_path):
    path = tmp_path / "lock"
    assert not is_locked(path)
    lock = Lock(path, "run r1")
    assert is_locked(path)
    with pytest.raises(
        StoreBusyError, match=f"run r1 is being written by process {os.getpid()} on .* since '20"
    ):
        Lock(path, "run r1")
    lock.release()
    assert not is_locked(path)
    Lock(path, "run r1").release()


def test_a_lock_ends_with_its_process_and_not_with_a_forked_child(tmp_path):
    program = (
        "import os, sys, time; from pathlib import Path; from tdgeom.store.locks import Lock\n"
        "lock = Lock(Path(sys.argv[1]), 'a run')\n"
        "if os.fork() == 0: time.sleep(60)\n"  # a data-loading worker that outlives its parent
        "print(os.getpid(), flush=True); os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "lock"
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        holder = int(child.stdout.readline())
        child.wait()
        assert json.loads(path.read_text())["pid"] == holder
        Lock(path, "a run").release()
    finally:
        os.killpg(child.pid, 9)
        child.stdout.close()


def test_a_damaged_note_does_not_hide_that_it_is_locked(tmp_path):
    path = tmp_path / "lock"
    lock = Lock(path, "run r1")
    path.write_text('{"pid": ')
    with pytest.raises(StoreBusyError, match="run r1 is being written by another process"):
        Lock(path, "run r1")
    lock.release()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"), ('{"a":1,"a":1}', "names a key twice"), ("NaN", "no finite number"),
        ("[1e999]", "no finite number"), ("[" * 100_000, "not valid JSON"),
        ("[" * (DEEPEST_JSON + 2) + "]" * (DEEPEST_JSON + 2), "nested deeper than 64 levels"),
        (" " * (LARGEST_JSON + 1), "more than 16,777,216 are refused"), (b"\xff\xff", "not valid JSON"),
        ("9" * 5000, "not valid JSON"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_hostile_json_is_refused(text, message):
    with pytest.raises(StoreError, match=f"a text: .*{message}"):
        read_json(text, "a text")


def test_json_comes_back():
    value = {"b": [1, 2.5, None, True, "α🦆"], "a": {"x": {}}}
    assert read_json(canonical(value), "a text") == value
    assert canonical({"b": 1, "a": 2}) == canonical({"a": 2, "b": 1})


def test_ids():
    run = new_id()
    assert valid_id(run) and id_of(number_of(run)) == run and new_id() != run
    for text in (
        "",
        "r",
        "../r0000000000",
        "R00000000000A",
        "r00000000000a\n",
        "r00000000000aa",
        None,
        7,
        b"r00000000000a",
    ):
        assert not valid_id(text)


def test_a_model_and_a_capture_describe_themselves():
    model = models.gpt2()
    capture = tg.Capture(model, ["residual_input.0"])
    about = describe(model=model, capture=capture, positions=slice(1, None), interventions=[tg.Ablate()])
    assert about.model == "GPT2LMHeadModel" and about.details["config"]["n_layer"] == models.DEPTH
    assert about.details["capture"] == {
        "sites": ["residual_input.0"],
        "modules": {"residual_input.0": "transformer.h.0"},
    }
    assert about.details["positions"] == "slice(1, None, None)"
    assert "Ablate" in about.details["interventions"][0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": 3}, "model= takes a text"), ({"experiment": ""}, "experiment= takes a text"),
        ({"tag": [None]}, "tag= takes a text"), ({"dataset": "x" * 5000}, "dataset= takes a text"),
        ({"revision": "\ud800"}, "no valid Unicode"), ({"metadata": {"x": "\ud800"}}, "cannot be kept as JSON"),
    ],
)  # fmt: skip
def test_what_cannot_be_described_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        describe(**given)


def test_values_nested_too_deep_are_refused():
    deep = []
    deep.append(deep)
    with pytest.raises(ValueError, match="cannot be kept as JSON"):
        describe(metadata={"x": deep})
    deep = [0]
    for _ in range(80):
        deep = [deep]
    with pytest.raises(ValueError, match="nested deeper than 64 levels"):
        describe(metadata={"x": deep})


def test_numbers_in_a_description_become_plain():
    about = describe(metadata={"x": torch.tensor(3.0).item(), "y": (1, 2), "z": float("nan")})
    assert about.details["metadata"] == {"x": 3.0, "y": [1, 2], "z": None}


def test_a_draft_is_never_written_through_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / f".x.{os.getpid()}.draft").symlink_to(victim)
    write_whole(tmp_path / "x", lambda handle: handle.write(b"new"))
    assert victim.read_bytes() == b"precious" and (tmp_path / "x").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["victim", "x"]
