"""Names in other people's files reach a terminal and a notebook as text: no code of theirs moves, hides or turns anything."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import tdgeom as tg
from tdgeom.core.visible_text import visible

BAD = "m\x1b]0;title\x07\x1b[2J\u202egnp\u2066\x9b31m\x85\u2028x\u200b<b>"
ESCAPED = r"m\x1b]0;title\x07\x1b[2J\u202egnp\u2066\x9b31m\x85\u2028x\u200b"


def raw(text: str) -> list[str]:
    """What is no text in it."""
    return sorted({ascii(one) for one in text if not one.isprintable() and one not in "\n\t "})


def foreign() -> tg.AnalysisResults:
    own = {
        "model_key": BAD,
        "model_label": BAD,
        "kind": BAD,
        "stack": [BAD, None],
        "site": [BAD, "residual_input.1"],
    }
    metrics = pd.DataFrame({**own, "layer": [0, 1], "d_pr": [1.0, 2.0], BAD: [3.0, 4.0], "unresolved": BAD})
    pairs = pd.DataFrame(
        {"a": [BAD], "b": ["x"], "pair": [BAD], "transition": [BAD], "linear_cka": [0.5], BAD: [0.1]}
    )
    words = {
        "model_id": BAD,
        "model_class": BAD,
        "dataset": BAD,
        "row_unit": BAD,
        "warnings": [BAD],
        "rows_observed": 2,
    }
    ablation = pd.DataFrame({"site": [BAD], "layer": [0], "variant": [BAD], "d_pr": [1.0]})
    return tg.AnalysisResults(
        metrics,
        pairs,
        router=pd.DataFrame(
            {"site": [BAD], "layer": [0], "load": [np.array([0.5, 0.5])], "router_entropy_norm": [0.1]}
        ),
        diagnostics={"normalization_ablation": ablation},
        metadata=words,
    )


def test_a_bundle_shown(command, tmp_path) -> None:
    folder = foreign().save(tmp_path / "bundle")
    code, out, error = command("show", folder)
    assert code == 0 and raw(out + error) == []
    assert r"\x1b]0;title" in out and r"\u202e" in out


def test_a_comparison_and_the_runs_of_a_store(command, tmp_path) -> None:
    made = foreign()
    sides = {"a": {"id": BAD}, "b": {"id": BAD}}
    compared = tg.Comparison(
        made.metrics.assign(model=BAD), made.novelty, metadata={**made.metadata, "models": sides}
    )
    code, out, error = command("show", compared.save(tmp_path / "compared"))
    assert code == 0 and raw(out + error) == []
    store = tg.ActivationStore(tmp_path / "store")
    run = store.save(
        {"x": torch.ones(2)}, model=BAD, dataset=BAD, experiment=BAD, tag=BAD, metadata={BAD: BAD}
    )
    for words in (("list",), ("list", "--json"), ("show", run), ("verify",)):
        code, out, error = command("runs", *words, "--store", tmp_path / "store")
        assert code == 0 and raw(out + error) == [], words
    for one in (made, compared, store.query(), store):
        assert raw(repr(one)) == []
        html = one._repr_html_() if hasattr(one, "_repr_html_") else ""
        assert raw(html) == [] and "<b>" not in html


def test_errors_that_quote_a_file(command, tmp_path) -> None:
    folder = foreign().save(tmp_path / "bundle")
    text = (folder / "metadata.json").read_text().replace('"metrics.csv"', '"\\u001b[2J\\u202e.csv"')
    (folder / "metadata.json").write_text(text)
    code, out, error = command("show", folder)
    assert code != 0 and raw(out + error) == [] and r"\x1b[2J" in error


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (BAD, ESCAPED + "<b>"),
        ("a\nb\tc d\u00a0e é 中 😀 עברית", "a\nb\tc d\u00a0e é 中 😀 עברית"),
        ("a\r\x00", r"a\r\x00"),
    ],
)
def test_visible(text, shown) -> None:
    assert visible(text) == shown and visible(visible(text)) == shown
