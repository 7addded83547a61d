"""``tdgeom rerun``: the same command again, and what is another now."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
import torch
from transformers import BertForMaskedLM

import tdgeom as tg
from tdgeom.cli.rerun_command import differences
from terminal import refused


@pytest.fixture
def made(command, folder, text, tmp_path):
    """A bundle of a model and a text of its own."""
    shutil.copytree(folder, tmp_path / "model")
    shutil.copy(text, tmp_path / "text.txt")
    out = tmp_path / "run"
    given = [
        "--max-rows",
        300,
        "--layers",
        "0,-1",
        "--skip-special",
        "--seed",
        3,
        "--metrics",
        "spectrum,twonn,linear_cka",
    ]
    code, *_ = command("analyze", tmp_path / "model", "--text", tmp_path / "text.txt", *given, "--out", out)
    assert code == 0
    return out


def test_nothing_differs(command, made, tmp_path):
    code, out, _ = command("rerun", made, "--out", tmp_path / "again")
    assert code == 0
    for line in ("Versions: the same", "Weights: the same", "Files: the same", "Numbers: the same ("):
        assert line in out
    old, new = (tg.AnalysisResults.load(path) for path in (made, tmp_path / "again"))
    pd.testing.assert_frame_equal(old.metrics, new.metrics)
    pd.testing.assert_frame_equal(old.novelty, new.novelty)
    assert old.metadata["command"] == new.metadata["command"]
    assert (
        new.metadata["settings"]["select"] == {"skip_special": True} and new.metadata["settings"]["seed"] == 3
    )


def test_what_differs_is_said(command, made, tmp_path):
    told = json.loads((made / "metadata.json").read_text())
    told["software"]["torch"] = "1.0"
    (made / "metadata.json").write_text(json.dumps(told))
    text = tmp_path / "text.txt"
    text.write_text(text.read_text() + "\n\nOne more document.")  # behind the rows that are measured
    code, out, _ = command("rerun", made)
    assert code == 0 and f"Versions: torch: 1.0 then, {torch.__version__} now" in out
    assert f"Files: {text}: " in out and "Weights: the same" in out and "Numbers: the same" in out
    model = BertForMaskedLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.mul_(20)
    model.save_pretrained(tmp_path / "model")
    code, out, _ = command("rerun", made, "--json")
    found = json.loads(out)
    assert code == 1 and set(found["weights"]) == {str(tmp_path / "model")} and found["missing"] == []
    assert found["numbers"]["metrics: d_pr"] > 1e-3 and found["numbers"]["metrics: layer"] == 0
    code, out, _ = command("rerun", made)
    assert code == 1 and "Weights: " in out and "Numbers: metrics: d_pr: by " in out
    assert command("rerun", made, "--tolerance", 10)[0] == 0


@pytest.mark.parametrize("name", ["compare", "dimension"])
def test_every_command_that_saves_a_bundle_can_be_repeated(command, folder, text, tmp_path, name):
    models = [folder, folder] if name == "compare" else [folder]
    given = ["--max-length", 32, "--max-rows", 200, "--pool", "none", "--out", tmp_path / "run"]
    assert command(name, *models, "--text", text, *given)[0] == 0
    code, out, _ = command("rerun", tmp_path / "run")
    assert code == 0 and "Numbers: the same (" in out


def test_what_was_made_otherwise_is_refused(command, folder, text, tmp_path):
    results = tg.AnalysisResults(pd.DataFrame({"site": ["x"]}), pd.DataFrame())
    results.save(tmp_path / "python")
    assert refused(command("rerun", tmp_path / "python"), "does not say which command made it")
    assert refused(command("rerun", tmp_path), "no metadata.json")


def results(numbers, **more):
    record = {"software": {}, "command": {"weights": {}, "files": {}}}
    return tg.AnalysisResults(
        pd.DataFrame({"site": list("abc"[: len(numbers)]), "x": numbers}),
        pd.DataFrame(),
        metadata=record,
        **more,
    )


def test_differences_are_relative_to_the_largest_of_a_column():
    nan, old = float("nan"), [4.0, -8.0, float("nan")]
    assert differences(results(old), results(old))["numbers"] == {"metrics: x": 0.0}
    assert differences(results(old), results([4.0, -6.0, nan]))["numbers"] == {"metrics: x": 0.25}
    assert differences(results(old), results([4.0, -8.0, 1.0]))["numbers"] == {"metrics: x": float("inf")}
    assert differences(results(old), results(old[:2]))["missing"] == ["metrics: 3 rows then, 2 now"]
    more = results(old, diagnostics={"own": pd.DataFrame({"y": [1.0]})})
    assert differences(results(old), more)["missing"] == ["own: 0 rows then, 1 now"]
