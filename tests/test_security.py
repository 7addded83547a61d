"""What docs/security.md promises, checked in the source and on hostile bundles."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tdgeom as tg
from tdgeom.files.bundle import write_bundle

SOURCE = Path(tg.__file__).parent
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# Between the ranks of one program, which torch.distributed pickles itself: what is sent is tried first, so that no rank waits for
# what cannot be sent. It comes from no file and no other program.
ALLOWED = {"core/process_groups.py": ["pickle"]}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "yaml.load",
    "pd.read_pickle",
}


def calls(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def offences(text: str) -> list[str]:
    tree = ast.parse(text)
    found = []
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
    for name, keywords in calls(tree):
        if name in FORBIDDEN_CALLS or name.endswith(".read_pickle"):
            found.append(name)
        if name in ("torch.load", "load") and keywords.get("weights_only") != "True":
            found.append(f"{name} without weights_only=True")
        if name in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False":
            found.append(f"{name} without allow_pickle=False")
        if keywords.get("trust_remote_code") == "True" or keywords.get("shell") == "True":
            found.append(name)
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_in_the_source_runs_what_it_reads(path) -> None:
    allowed = ALLOWED.get(path.relative_to(SOURCE).as_posix(), [])
    assert offences(path.read_text(encoding="utf-8")) == allowed


def test_the_check_itself_finds_offences() -> None:
    bad = "import pickle\ntorch.load(p)\nnp.load(p)\neval(x)\nf(trust_remote_code=True)\npd.read_pickle(p)"
    assert len(offences(bad)) == 6


@pytest.fixture
def folder(tmp_path) -> Path:
    results = tg.AnalysisResults(
        metrics=pd.DataFrame({"site": ["x.0", "x.1"], "d_pr": [1.5, 2.5]}),
        novelty=pd.DataFrame({"a": ["x.0"], "b": ["x.1"], "linear_cka": [0.5]}),
        eigenvalues={"layer_00": np.array([2.0, 1.0])},
        metadata={"model_id": "m"},
    )
    return results.save(tmp_path / "run")


def hashed(folder: Path) -> None:
    """Make the metadata fit the files again, as an attacker would."""
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata["files"] = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "metadata.json"
    }
    (folder / "metadata.json").write_text(json.dumps(metadata))


def test_a_pickled_array_is_not_unpickled(folder, tmp_path) -> None:
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    np.savez(folder / "eigenvalues.npz", layer_00=np.array([Bomb()], dtype=object))
    hashed(folder)
    with pytest.raises(ValueError, match=r"pickle|Object arrays"):
        tg.AnalysisResults.load(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "name",
    ["../outside.csv", "/etc/passwd", "a/b/c.csv", "..", "x/../../y.csv", "C:\\x.csv", "a\x00.csv", ""],
)
def test_a_name_that_leaves_the_folder_is_refused(folder, name) -> None:
    (folder.parent / "outside.csv").write_text("a\n1\n")
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata["files"][name] = "0" * 64
    (folder / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="not one inside the bundle"):
        tg.AnalysisResults.load(folder)


def test_a_link_in_place_of_a_file_is_refused(folder) -> None:
    (folder / "metrics.csv").unlink()
    os.symlink("/etc/hostname", folder / "metrics.csv")
    with pytest.raises(ValueError, match="not one inside the bundle"):
        tg.AnalysisResults.load(folder)


def test_a_link_in_place_of_the_metadata_is_refused(folder) -> None:
    (folder / "metadata.json").rename(folder.parent / "elsewhere.json")
    (folder / "metadata.json").symlink_to(folder.parent / "elsewhere.json")
    with pytest.raises(ValueError, match="metadata.json is a symbolic link, which a bundle never holds"):
        tg.AnalysisResults.load(folder)


def test_a_link_in_place_of_a_folder_is_refused(folder) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "note.csv").write_text("a\n1\n")
    os.symlink(outside, folder / "diagnostics")
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata["files"]["diagnostics/note.csv"] = hashlib.sha256(b"a\n1\n").hexdigest()
    (folder / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="not one inside the bundle"):
        tg.AnalysisResults.load(folder)


@pytest.mark.parametrize("cell", ["[" * 100_000, "[{}]"])
def test_a_cell_that_is_no_list_of_numbers_is_refused(folder, cell) -> None:
    (folder / "metrics.csv").write_text(f'site,v\nx,"{cell}"\n')
    hashed(folder)
    with pytest.raises(ValueError, match="is no table"):
        tg.AnalysisResults.load(folder)


@given(data=st.data())
def test_an_archive_with_changed_bytes_and_a_fitting_hash(data, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    tables = {"metrics": pd.DataFrame({"a": [1.0]}), "novelty": pd.DataFrame({"b": ["x"]})}
    values = np.random.default_rng(0).normal(size=300)
    write_bundle(folder, tables, {"eigenvalues": {"layer_00": values}}, {}, "bundle", False)
    path = folder / "eigenvalues.npz"
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    hashed(folder)
    try:
        tg.AnalysisResults.load(folder)
    except ValueError as error:
        assert str(error)


def test_an_archive_that_unpacks_to_a_huge_array_is_refused(folder) -> None:
    header = np.lib.format.magic(1, 0)
    text = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776,), }"
    text += b" " * (64 - (len(header) + 2 + len(text) + 1) % 64) + b"\n"
    with zipfile.ZipFile(folder / "eigenvalues.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("layer_00.npy", header + len(text).to_bytes(2, "little") + text + b"\0" * 64)
    hashed(folder)
    with pytest.raises(ValueError):
        tg.AnalysisResults.load(folder)


def test_an_archive_with_a_zip_bomb_is_refused(folder) -> None:
    rows = np.zeros(40_000_000)  # 320 MB of zeros in 300 kB
    np.savez_compressed(folder / "eigenvalues.npz", layer_00=rows)
    hashed(folder)
    with pytest.raises(ValueError, match="unpacks to"):
        tg.AnalysisResults.load(folder)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"files":' * 20_000, "nul", "{}", "[]", '{"files": []}', "\x00"]
)
def test_metadata_that_is_no_metadata_is_refused(folder, text) -> None:
    (folder / "metadata.json").write_text(text)
    with pytest.raises(ValueError):
        tg.AnalysisResults.load(folder)


@given(data=st.data())
def test_a_changed_byte_anywhere_is_refused_or_harmless(data, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    write_bundle(
        folder,
        {"metrics": pd.DataFrame({"a": [1.0]}), "novelty": pd.DataFrame({"b": ["x"]})},
        {"eigenvalues": {"layer_00": np.ones(3)}},
        {"model_id": "m"},
        "bundle",
        False,
    )
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(raw[: data.draw(st.sampled_from([len(raw), at]))]))
    try:
        tg.AnalysisResults.load(folder)
    except (ValueError, FileNotFoundError) as error:
        assert str(error)
    else:
        assert path.name == "metadata.json"  # its text is not hashed: only what it says of the files is


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[]",
        "5",
        "null",
        '{"positions": {"between": "nowhere"}}',
        '{"positions": {"random": 2.5}}',
        '{"positions": {"mask": "x"}}',
        '{"row_groups": 3}',
        '{"unknown": 1}',
    ],
)
def test_text_that_is_no_capture_spec_is_refused(text) -> None:
    with pytest.raises(ValueError):
        tg.CaptureSpec.from_json(text)
