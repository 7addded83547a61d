"""Bundles: whole or not at all, hashed, and nothing in them leaves the folder."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time

import numpy as np
import pandas as pd
import pytest

from tdgeom import AnalysisResults
from tdgeom.files.atomic import file_sha256
from tdgeom.files.json_text import plain
from tdgeom.files.table_files import column_kinds, read_table, write_table


def results() -> AnalysisResults:
    return AnalysisResults(
        metrics=pd.DataFrame(
            {
                "site": ["residual_input.0", "residual_input.1"],
                "stack": [None, None],
                "layer": [0, 1],
                "d_pr": [1 / 3, np.nan],
                "near_rank1": [True, False],
            }
        ),
        novelty=pd.DataFrame({"transition": ["0->1"], "linear_cka": [0.1 + 0.2]}),
        router=pd.DataFrame({"site": ["router_logits.0"], "load": [np.array([0.25, 0.75])]}),
        diagnostics={"normalization_ablation": pd.DataFrame({"variant": ["raw"], "d_pr": [2.5]})},
        eigenvalues={"layer_00": np.array([2.0, 1e-300])},
        metadata={"run_name": "../../escape me", "note": float("nan")},
    )


@pytest.mark.parametrize("mode", ["bundle", "csv", "json"])
def test_what_is_loaded_is_what_was_saved(tmp_path, mode) -> None:
    saved = results()
    folder = saved.save(tmp_path / "run", mode)
    loaded = AnalysisResults.load(folder)
    assert plain(loaded.metrics.to_dict("records")) == plain(saved.metrics.to_dict("records"))
    assert loaded.metrics["d_pr"][0] == 1 / 3 and loaded.novelty["linear_cka"][0] == 0.1 + 0.2
    assert loaded.metrics["near_rank1"].tolist() == [True, False]
    np.testing.assert_array_equal(loaded.router["load"][0], [0.25, 0.75])
    np.testing.assert_array_equal(loaded.eigenvalues["layer_00"], [2.0, 1e-300])
    assert loaded.diagnostics["normalization_ablation"]["variant"].tolist() == ["raw"]
    assert loaded.metadata["note"] is None and loaded.artifact_dir == folder.resolve()
    assert set(loaded.metadata["files"]) == {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "metadata.json"
    }


def test_tables_that_are_empty_come_back_empty(tmp_path) -> None:
    one = AnalysisResults(pd.DataFrame({"d_pr": [1.0]}), pd.DataFrame())
    loaded = AnalysisResults.load(one.save(tmp_path / "run"))
    assert loaded.novelty.empty and loaded.router.empty and not (tmp_path / "run" / "router.csv").exists()


def test_an_existing_folder_is_refused(tmp_path) -> None:
    results().save(tmp_path / "run")
    with pytest.raises(FileExistsError, match="exists already: give another folder, or overwrite=True"):
        results().save(tmp_path / "run")
    other = AnalysisResults(pd.DataFrame({"d_pr": [9.0]}), pd.DataFrame())
    other.save(tmp_path / "run", overwrite=True)
    assert AnalysisResults.load(tmp_path / "run").metrics["d_pr"].tolist() == [9.0]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_empty_folder_is_filled(tmp_path) -> None:
    for overwrite in (False, True):
        folder = tmp_path / str(overwrite)
        folder.mkdir()
        assert (
            AnalysisResults.load(results().save(folder, overwrite=overwrite)).artifact_dir == folder.resolve()
        )
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        results().save(tmp_path / "file")
    with pytest.raises(FileExistsError, match="is no bundle"):
        results().save(tmp_path / "file", overwrite=True)


def test_a_folder_that_is_no_bundle_is_never_overwritten(tmp_path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="is no bundle"):
        results().save(tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_a_failed_write_leaves_nothing(tmp_path) -> None:
    broken = results()
    broken.eigenvalues = {"layer_00": np.array([object()], dtype=object)}
    broken.metadata["unwritable"] = {"a": {1: 2}}

    class Unwritable:
        def __str__(self) -> str:
            raise OSError("no space left on device")

    broken.metadata["note"] = Unwritable()
    with pytest.raises(OSError, match="no space left"):
        broken.save(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_bundle(tmp_path) -> None:
    program = f"""
        import os, signal
        import pandas as pd
        from pathlib import Path
        from tdgeom.files.bundle import write_bundle
        os.rename = lambda draft, folder: os.kill(os.getpid(), signal.SIGKILL)
        write_bundle(Path({str(tmp_path / "run")!r}), {{"metrics": pd.DataFrame({{"a": [1]}})}}, {{}}, {{}}, "csv", False)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], timeout=120)
    assert done.returncode == -9
    assert not (tmp_path / "run").exists()
    with pytest.raises(FileNotFoundError, match="holds no bundle"):
        AnalysisResults.load(tmp_path / "run")


def test_a_changed_file_is_named(tmp_path) -> None:
    folder = results().save(tmp_path / "run")
    data = bytearray((folder / "eigenvalues.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "eigenvalues.npz").write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"eigenvalues\.npz has changed since the bundle was written"):
        AnalysisResults.load(folder)


def edit(folder, **changes) -> None:
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata.update(changes)
    (folder / "metadata.json").write_text(json.dumps(metadata))


@pytest.mark.parametrize("name", ["../outside.csv", "/etc/passwd", "a/../../b.csv", "a/b/c.csv", ""])
def test_a_file_name_that_leaves_the_folder_is_refused(tmp_path, name) -> None:
    folder = results().save(tmp_path / "run")
    (tmp_path / "outside.csv").write_text("a\n1\n")
    edit(folder, files={name: "0" * 64})
    with pytest.raises(ValueError, match="is not one inside the bundle"):
        AnalysisResults.load(folder)


def test_a_link_is_refused(tmp_path) -> None:
    folder = results().save(tmp_path / "run")
    (folder / "metrics.csv").rename(tmp_path / "elsewhere.csv")
    (folder / "metrics.csv").symlink_to(tmp_path / "elsewhere.csv")
    with pytest.raises(ValueError, match="is not one inside the bundle"):
        AnalysisResults.load(folder)


def test_what_is_not_a_bundle_is_refused(tmp_path) -> None:
    folder = results().save(tmp_path / "run")
    (folder / "novelty.csv").unlink()
    with pytest.raises(ValueError, match=r"novelty\.csv is missing"):
        AnalysisResults.load(folder)
    folder = results().save(tmp_path / "run2")
    edit(folder, artifact_schema_version="9.0")
    with pytest.raises(ValueError, match=r"has schema 9\.0; this version reads"):
        AnalysisResults.load(folder)
    (folder / "metadata.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not valid JSON"):
        AnalysisResults.load(folder)
    (folder / "metadata.json").write_text("{}")
    with pytest.raises(ValueError, match="lists no files"):
        AnalysisResults.load(folder)


def test_pickled_arrays_are_never_loaded(tmp_path) -> None:
    folder = results().save(tmp_path / "run")
    np.savez(folder / "eigenvalues.npz", layer_00=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    files = json.loads((folder / "metadata.json").read_text())["files"]
    edit(folder, files={**files, "eigenvalues.npz": file_sha256(folder / "eigenvalues.npz")})
    with pytest.raises(ValueError, match="allow_pickle=False"):
        AnalysisResults.load(folder)


def test_the_run_name_is_a_folder_name_and_no_path(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = results().save()
    assert folder.parent == tmp_path and folder.name == "escape_me"


def test_an_unknown_mode() -> None:
    with pytest.raises(ValueError, match="save_mode takes 'bundle', 'csv' or 'json', got 'pickle'"):
        results().save("anywhere", "pickle")


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_a_table_of_very_many_columns_is_refused_at_once(tmp_path, ending) -> None:
    names = [f"c{i}" for i in range(200_000)]
    text = (
        f"{','.join(names)}\n{','.join('1' * len(names))}\n"
        if ending == "csv"
        else json.dumps([dict.fromkeys(names, 1)])
    )
    path = tmp_path / f"metrics.{ending}"
    path.write_text(text)
    begin = time.perf_counter()
    with pytest.raises(
        ValueError, match=r"is no table \(it has 200,000 columns, more than 20,000 are refused\)"
    ):
        read_table(path)
    assert time.perf_counter() - begin < 2


def test_lines_wider_than_the_head_are_refused(tmp_path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(f"a,b\n{','.join('1' * 200_000)}\n")
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="its lines have more cells than it has columns"):
        read_table(path)
    assert time.perf_counter() - begin < 2
    path.write_text("a,b\n1,2\n1,2,3\n")
    with pytest.raises(ValueError, match="is no table"):
        read_table(path)
    path.write_text(f"a,b\n{'x' * 200_000},2\n")
    assert read_table(path).shape == (1, 2)


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_columns_keep_their_kind(tmp_path, ending) -> None:
    table = pd.DataFrame(
        {
            "label": ["007", "1e3"],
            "text": ["True", None],
            "nothing": [None, None],
            "empty": ["", "[1]"],
            "share": [np.nan, np.nan],
            "whole": [1.0, 2.0],
            "count": [1, 2],
            "flag": [True, False],
        }
    )
    write_table(tmp_path / f"t.{ending}", table)
    pd.testing.assert_frame_equal(read_table(tmp_path / f"t.{ending}", column_kinds(table)), table)
