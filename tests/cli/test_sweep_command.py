"""``tdgeom sweep``: a trainer's output directory on the command line, gone on with and shown."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForMaskedLM

import tdgeom as tg

pytestmark = pytest.mark.filterwarnings("ignore:.*(few|too few) ")


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """Two checkpoints of a tiny BERT, the second with other weights."""
    place = tmp_path_factory.mktemp("trained")
    for step in (5, 10):
        shutil.copytree(folder, place / f"checkpoint-{step}")
    model = AutoModelForMaskedLM.from_pretrained(place / "checkpoint-10")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.normal_(0, 1)
    model.save_pretrained(place / "checkpoint-10")
    return place


def test_a_directory_is_swept_saved_and_gone_on_with(command, trained, text, tmp_path):
    asked = (
        "--text",
        text,
        "--metrics",
        "spectrum",
        "--max-rows",
        120,
        "--max-length",
        32,
        "--out",
        tmp_path / "out",
    )
    code, out, err = command("sweep", trained, *asked)
    assert code == 0, err
    assert "over 2 steps" in out and "report.html" in out
    found = tg.load_results(tmp_path / "out" / "results")
    assert isinstance(found, tg.Sweep) and found.steps == [5, 10]
    table = found.metrics.set_index(["step", "site"])["linear_cka_debiased_to_last"]
    assert table[5, "residual_output.0"] == pytest.approx(1) and table[5, "residual_output.2"] < 0.9999
    assert (tmp_path / "out" / "results" / "report.html").is_file()
    code, out, err = command("sweep", trained, *asked, "--json")
    assert code == 0 and json.loads(out)["metrics"] == json.loads(json.dumps(found.to_dict()["metrics"]))
    code, _, err = command("sweep", trained, *asked, "--seed", 1)
    assert code == 2 and "begun with other settings: seed is 0 there and 1 here" in err


def test_one_checkpoint_is_no_sweep(command, trained, text):
    code, _, err = command("sweep", trained / "checkpoint-5", "--text", text)
    assert code == 2 and "is one checkpoint" in err
    code, _, err = command("sweep", trained, "--text", text, "--steps", "five")
    assert code == 2 and "--steps takes whole numbers" in err
