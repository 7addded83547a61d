"""What this user may not read or write is an error in words, whatever reads or writes it: never the system's own."""

from __future__ import annotations

import os
from contextlib import contextmanager

import pandas as pd
import pytest
import torch

import tdgeom as tg
from cli.test_foreign_text import foreign
from tdgeom.files.errors import StoreError
from tdgeom.plot.picture_files import write_plots
from tdgeom.rows.text import read_fasta, read_jsonl, read_text
from terminal import refused

NOBODY = 65534


@contextmanager
def closed(folder):
    """Inside, this process may not enter the folder."""
    folder.chmod(0)
    root = os.geteuid() == 0
    try:
        if root:  # to whom nothing is closed
            os.seteuid(NOBODY)
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir()
    foreign().save(folder / "bundle")
    store = tg.ActivationStore(folder / "store")
    store.save(torch.ones(2))
    store.query().export(folder / "moved")
    (folder / "text").write_text("one\n")
    (folder / "options.yaml").write_text("k: 5\n")
    return folder


READERS = {
    "a bundle": (lambda at, _: tg.AnalysisResults.load(at / "bundle"), ValueError),
    "results": (lambda at, _: tg.load_results(at / "bundle"), ValueError),
    "a store": (lambda at, _: tg.ActivationStore(at / "store"), StoreError),
    "an export": (lambda at, other: other.import_runs(at / "moved"), StoreError),
    "text": (lambda at, _: list(read_text(at / "text")), ValueError),
    "jsonl": (lambda at, _: list(read_jsonl(f"{at / 'text'}:text")), ValueError),
    "fasta": (lambda at, _: list(read_fasta(at / "text")), ValueError),
}


@pytest.mark.parametrize("name", READERS)
def test_readers(name, folder, tmp_path) -> None:
    read, kind = READERS[name]
    other = tg.ActivationStore(tmp_path / "other")
    with closed(folder), pytest.raises(kind, match=f"{folder}.*Permission denied.*this user"):
        read(folder, other)


def test_commands(command, folder) -> None:
    for words in (
        ("show", folder / "bundle"),
        ("runs", "list", "--store", folder / "store"),
        ("overlap", "model", "--text", folder / "text"),
        ("analyze", "model", "--text", "t", "--config", folder / "options.yaml"),
    ):
        with closed(folder):
            result = command(*words)
        assert refused(result, "Permission denied", str(folder)) and "[Errno" not in result[2], words


WRITERS = {
    "a bundle": lambda at: foreign().save(at / "b"),
    "results": lambda at: tg.save_results(pd.DataFrame({"site": ["a"]}), at / "b"),
    "a report": lambda at: foreign().report(at / "sub" / "r.html"),
    "pictures": lambda at: write_plots(
        tg.AnalysisResults(
            pd.DataFrame({"site": ["a"], "layer": [0]}), pd.DataFrame(), eigenvalues={"a": [2.0, 1.0]}
        ),
        at / "b",
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_writers(name, folder, tmp_path) -> None:
    write = WRITERS[name]
    write(tmp_path)  # what is imported once
    with (
        closed(folder),
        pytest.raises(OSError, match=f"{folder}.*could not be written: Permission denied") as error,
    ):
        write(folder)
    assert error.value.errno is None
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="could not be written: (File exists|Not a directory)") as error:
        write(tmp_path / "file")
    assert error.value.errno is None
