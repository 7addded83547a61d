"""Rows are called what they are: tokens only where each is one."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console

import models
import tdgeom as tg
from tdgeom.cli.print_results import print_results
from tdgeom.plot import picture_files


def tokens():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, models.VOCAB, (10, 6), generator=generator)} for _ in range(3)]


def images():
    return [{"pixel_values": torch.randn(6, 3, 8, 8)}]


@pytest.mark.parametrize(
    "select, unit, rows",
    [
        ({}, "tokens", 180),
        ({"skip_first": 1}, "tokens", 150),
        ({"positions": [0, 2]}, "tokens", 60),
        ({"pool": "mean"}, "sequences", 30),
        ({"positions": "last"}, "sequences", 30),
        ({"positions": "last-2"}, "sequences", 30),
        ({"positions": 3}, "sequences", 30),
    ],
)
def test_what_a_row_of_text_is(select, unit, rows, tmp_path, monkeypatch):
    results = tg.analyze_model(
        models.gpt2(), tokens(), select=select, diagnostics="normalization_ablation", progress=False
    )
    assert results.metadata["row_unit"] == unit and results.metadata["rows_observed"] == rows
    assert set(results.metrics["rows_observed"]) == {rows}
    assert set(results.metrics["tokens_observed"]) == {rows if unit == "tokens" else 180}
    assert ("tokens" in results.diagnostics["normalization_ablation"]) == (unit == "tokens")
    said = io.StringIO()
    print_results(results, Console(file=said, width=160))
    assert f"{rows} {unit}" in said.getvalue() and f"how alike any two {unit} point" in said.getvalue()
    if unit != "tokens":
        assert not re.search(r"\btokens?\b", said.getvalue())
    titles = []
    monkeypatch.setattr(picture_files, "write_pictures", lambda pictures, folder, title: titles.append(title))
    results.write_plots(tmp_path)
    assert titles[0].endswith(f", {rows} {unit}")


def test_what_else_a_row_is():
    results = tg.analyze_model(models.vit(), images(), metrics="spectrum", progress=False)
    assert results.metadata["row_unit"] == "rows"
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    results = tg.analyze_model(plain, [{"input": torch.randn(50, 4)}], metrics="spectrum", progress=False)
    assert results.metadata["row_unit"] == "rows"
