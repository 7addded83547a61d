"""Names in other people's files reach a terminal and a notebook as text: no code of theirs moves, hides or turns anything."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pandas as pd
import pytest
import torch

import tdgeom as tg
from tdgeom.core.visible_text import visible
from tdgeom.core.warnings import tell

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


def test_frames_from_a_file_print_safely_and_keep_their_values(tmp_path) -> None:
    made = foreign()
    loaded = tg.AnalysisResults.load(made.save(tmp_path / "bundle"))
    table = loaded.metrics
    pd.testing.assert_frame_equal(pd.DataFrame(table.to_dict()), made.metrics)
    assert table["site"][0] == BAD and BAD in table
    parts = (
        table,
        table["site"],
        table.iloc[0],
        table.head(1),
        table.T,
        table.set_index("site"),
        table.sort_values("layer"),
    )
    for one in (*parts, loaded.novelty, table.merge(loaded.novelty, how="cross")):
        assert raw(repr(one) + str(one) + one.to_string()) == []
        assert ESCAPED[:20] in repr(one) or "..." in repr(one)
        html = one._repr_html_() if isinstance(one, pd.DataFrame) else ""
        assert raw(html) == [] and "<b>" not in html
    plain = tg.AnalysisResults.load(
        tg.AnalysisResults(pd.DataFrame({"site": ["a"]}), pd.DataFrame()).save(tmp_path / "plain")
    )
    assert type(plain.metrics) is pd.DataFrame


def test_reports_and_views_and_what_a_store_gives(tmp_path) -> None:
    page = foreign().report(tmp_path / "report.html").read_text()
    view = str(tg.attention_view(torch.eye(2), [BAD, "a"], title=BAD))
    assert r"\u202e" in page and r"\u202e" in view and "<b>" not in view
    assert raw(page) == raw(view) == []
    store = tg.ActivationStore(tmp_path / "store")
    kept = store.save_analysis(foreign(), tag=BAD)
    for one in (store.load_analysis(kept), store.query().to_frame()):
        assert raw(repr(one)) == [] and r"\u202e" in repr(one) + store.query().to_frame().to_string()
    store.catalogue.set_state(kept, "failed", BAD)
    with pytest.raises(RuntimeError, match=r"\\u202e") as error:
        store.load_analysis(kept)
    assert raw(str(error.value)) == []
    with pytest.warns(UserWarning) as told:
        tell(f"of {BAD}", UserWarning)
    assert raw(str(told[0].message)) == []


@pytest.mark.parametrize("what", ["artifact_schema_version", "files"])
def test_what_a_bundle_says_in_errors(what, tmp_path) -> None:
    folder = foreign().save(tmp_path / "bundle")
    told = json.loads((folder / "metadata.json").read_text())
    told[what] = BAD if what != "files" else {BAD: "0"}
    (folder / "metadata.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"\\u202e") as error:
        tg.AnalysisResults.load(folder)
    assert raw(str(error.value)) == []


@pytest.mark.parametrize("kind", ["state", "checkpoint"])
def test_a_state_of_other_sites(kind, tmp_path) -> None:
    def batches():
        yield {"tokens": {BAD: torch.eye(4)}}
        if kind == "checkpoint":
            raise EOFError

    stages = lambda site: tg.ForEach(tg.StreamingCovariance(), [site])
    with contextlib.suppress(EOFError):
        tg.run(stages(BAD), batches(), **{kind: tmp_path / "file"}, every=1)
    with pytest.raises(ValueError, match=r"\\u202e") as error:
        if kind == "state":
            tg.merge_states([tmp_path / "file"], stages("x"))
        else:
            tg.run(stages("x"), batches(), checkpoint=tmp_path / "file")
    assert raw(str(error.value)) == []


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
