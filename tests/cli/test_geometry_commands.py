"""``tdgeom dimension`` and ``tdgeom overlap`` on a tiny model in a local folder."""

from __future__ import annotations

from itertools import pairwise

import pandas as pd
import pytest
from tdgeom.text import TextBatches, read_text

import tdgeom as tg
from tdgeom import cli
from terminal import refused

SITES = ["attn_input.0", "attn_input.1", "attn_input.2", "residual_output.2"]


@pytest.fixture
def labels(text, tmp_path):
    path = tmp_path / "labels.txt"
    count = len(list(read_text(text)))
    path.write_text("\n".join("even" if i % 2 == 0 else "odd" for i in range(count)), encoding="utf-8")
    return path


def loaded(folder, text, **settings):
    from transformers import AutoTokenizer

    from tdgeom.model.loading import load_model

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return load_model(folder), TextBatches(read_text(text), tokenizer, max_length=32, **settings)


def test_dimension_gives_the_numbers_of_the_library(command, folder, text, tmp_path):
    code, out, err = command(
        "dimension",
        folder,
        "--text",
        text,
        "--max-length",
        32,
        "--untrained",
        "--neighbors",
        20,
        "--plots",
        "--out",
        tmp_path / "run",
    )
    assert code == 0 and err == ""
    assert "Intrinsic dimension" in out and "twonn" in out and "(untrained)" in out and "scale 1" in out
    table = pd.read_csv(tmp_path / "run" / "diagnostics" / "intrinsic_dimension.csv")
    model, batches = loaded(folder, text)
    direct = tg.analyze_model(
        model,
        batches,
        sites=SITES,
        metrics=[tg.TwoNN()],
        select={"pool": "mean"},
        sample_size=10_000,
        progress=False,
    )
    mine = table[(table["estimator"] == "twonn") & (table["weights"] == "trained")]
    assert mine["site"].tolist() == SITES
    assert mine["estimate"].tolist() == pytest.approx(direct.metrics["twonn_estimate"].tolist(), rel=1e-9)
    pictures = {path.name for path in (tmp_path / "run" / "plots").iterdir()}
    assert pictures == {"intrinsic_dimension.png", "intrinsic_dimension_over_scales.png"}
    code, shown, err = command("show", tmp_path / "run")
    assert code == 0 and shown.strip() in out  # the profile again, not another table
    kept = tg.AnalysisResults.load(tmp_path / "run").neighbors
    assert set(kept["neighbors"].keys()) == set(SITES)


def test_overlap_with_labels(command, folder, text, labels, tmp_path):
    code, out, err = command(
        "overlap",
        folder,
        "--text",
        text,
        "--labels",
        labels,
        "-k",
        3,
        "--max-length",
        32,
        "--out",
        tmp_path / "run",
    )
    assert code == 0 and err == "" and "label_" in out
    table = pd.read_csv(tmp_path / "run" / "diagnostics" / "overlap.csv")
    model, batches = loaded(folder, text, labels=[i % 2 for i in range(len(list(read_text(text))))])
    direct = tg.analyze_model(
        model,
        batches,
        sites=SITES,
        metrics=[tg.LabelOverlap(k=3), tg.NeighborhoodOverlap(k=3)],
        select={"pool": "mean", "also": ["label"]},
        sample_size=10_000,
        progress=False,
    )
    by_label = table[table["measure"] == "label_overlap"]
    assert by_label["value"].tolist() == direct.metrics["label_overlap"].tolist()
    pairs = table[table["measure"] == "neighborhood_overlap"]
    assert list(zip(pairs["site"], pairs["other"])) == list(pairwise(SITES))
    assert pairs["value"].tolist() == direct.novelty["neighborhood_overlap"].tolist()


def test_mistakes_are_one_line(command, folder, text, labels, tmp_path):
    refused(
        command("dimension", folder, "--text", text, "--estimator", "twonn,fractal"),
        "--estimator takes",
        "fractal",
    )
    refused(
        command("dimension", folder, "--text", text, "--pool", "max"), "--pool takes mean or none, got 'max'"
    )
    refused(command("dimension", folder, "--text", text, "--neighbors", 5), "--neighbors needs --out")
    labels.write_text("a\nb\n", encoding="utf-8")
    refused(
        command("overlap", folder, "--text", text, "--labels", labels),
        "holds 2 labels, but there are 12 documents",
        "blank lines separate documents",
    )
    refused(command("overlap", folder, "--text", text, "--labels", tmp_path / "none"), "does not exist")


def test_help_names_the_options(command):
    for name in ("dimension", "overlap"):
        code, out, _ = command(name, "--help")
        assert code == 0 and "--untrained" in out and "--max-rows" in out
    assert {"dimension", "overlap"} <= {
        one.name or one.callback.__name__ for one in cli.app.registered_commands
    }
