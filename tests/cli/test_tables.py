"""Tables in a narrow terminal: kinds together, every column shown or named, no number shown as another."""

from __future__ import annotations

import io
import re

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

import tdgeom as tg
from tdgeom.cli.print_comparison import print_comparison
from tdgeom.cli.print_profile import print_profiles
from tdgeom.cli.print_results import METRICS, print_results
from tdgeom.cli.print_runs import print_runs
from tdgeom.cli.terminal_tables import cells_of, print_in_groups

KINDS = ("residual_input", "mlp_output")


def printed(write, thing, width=80, *more):
    file = io.StringIO()
    write(thing, Console(file=file, width=width), *more)
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    return text


def analysis(layers=3, **metadata):
    """An analysis whose every number is another one, in the order in which a model meets its sites."""
    places = [(kind, layer) for layer in range(layers) for kind in KINDS]
    names = [*METRICS, "twonn_estimate", "twonn_standard_error", "my_own_measure_with_a_long_name"]
    numbers = (
        np.arange(len(places) * len(names)).reshape(len(places), len(names)) + 100.1
    )  # 100.1, 101.1, ...
    table = pd.DataFrame(numbers, columns=names)
    table.insert(0, "site", [f"{kind}.{layer}" for kind, layer in places])
    table.insert(1, "kind", [kind for kind, _ in places])
    table.insert(2, "layer", [layer for _, layer in places])
    table["rows_observed"], table["hidden_dim"], table["k_used"] = 987654, 64, 32
    settings = {"extra_stages": [{"out_keys": [["dimension", "twonn", "estimate"]]}]}
    return tg.AnalysisResults(table, pd.DataFrame(), metadata={"settings": settings, **metadata}), names


@pytest.mark.parametrize("width", [60, 80, 100, 200, 400])
def test_every_column_is_shown_or_named(width):
    results, names = analysis()
    text = " ".join(printed(print_results, results, width).split())
    shown, _, rest = text.partition("Not shown: ")
    left = re.split(r"[,;] ", rest)[: len(names)] if rest else []
    for name in names:
        cell = f"{results.metrics[name][0]:.1f}"
        assert (cell in shown) != (name in left), name
    assert ("--columns all" in rest) == bool(left)
    assert "twonn_estimate" not in left  # what was asked for by name comes before what is usual


@pytest.mark.parametrize("width", [60, 80, 200])
def test_all_columns_are_tables_side_by_side_and_below(width):
    results, names = analysis()
    text = printed(print_results, results, width, "all")
    for name in names:
        for value in results.metrics[name]:
            assert len(re.findall(rf"(?<![\d.]){value:.1f}(?![\d.])", text)) == 1, (name, value)
    assert "987654" not in text and text.count("Sites") > 1 - (width > 150)


def test_columns_are_chosen_by_name():
    results, _ = analysis()
    text = printed(print_results, results, 80, "ve_32,twonn_standard_error")
    assert text.index("127.1") < text.index("130.1") and "d_pr" not in text
    with pytest.raises(ValueError, match=r"no column 've32'\. Did you mean ve_32\? There are d_pr, "):
        print_results(results, Console(file=io.StringIO()), "ve32")


@pytest.mark.parametrize("columns", [(), ("all",)])
def test_rows_of_one_kind_stand_together(columns):
    results, _ = analysis(layers=12)
    text = printed(print_results, results, 80, *columns)
    first = [
        line.split()[0] for line in text.splitlines() if re.match(r" *(residual_input|mlp_output)\.", line)
    ][:24]
    assert first == [f"{kind}.{layer}" for kind in KINDS for layer in range(12)]


def test_one_kind_needs_no_names():
    results, _ = analysis()
    results.metrics = results.metrics[results.metrics["kind"] == "mlp_output"].reset_index(drop=True)
    assert re.search(r"^ +2  \d", printed(print_results, results), re.MULTILINE)


def test_the_precision_is_that_of_the_column():
    assert cells_of([1234.56, 2.0], "x") == ["1,235", "2"]
    assert cells_of([12.345, 0.5], "x") == ["12.3", "0.5"]
    assert cells_of([0.98765, 0.1], "x") == ["0.988", "0.100"]
    assert cells_of([0.0012345, 0.001], "x") == ["0.00123", "0.00100"]
    assert cells_of([4.567e-6, None], "x") == ["4.6e-06", "-"]
    assert cells_of([2.5e9, float("nan"), float("inf")], "x") == ["2.5e+09", "-", "inf"]
    assert cells_of([100.0, 0.004], "x") == ["100.0", "4.0e-03"]  # not 0.0
    assert cells_of([0.0, 1e-17], "x") == ["0.000", "0.000"]  # rounding
    assert cells_of([12.0, 700.0], "k90") == ["12", "700"] and cells_of([True, False], "x") == ["yes", "no"]
    assert cells_of([123_456_789], "rows") == ["123,456,789"]


@pytest.mark.parametrize("width", [30, 50, 80, 1000])
def test_no_column_of_a_group_is_lost(width):
    columns = [(f"column_number_{i}", [f"{i}.{j}" for j in range(2)]) for i in range(20)]
    file = io.StringIO()
    print_in_groups(Console(file=file, width=width), "Title", ("row", ["[b]", "b"]), columns)
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= max(width, 25) and "[b]" in text
    assert all(re.search(rf"(?<![\d.]){i}\.{j}(?!\d)", text) for i in range(20) for j in range(2))


def test_a_profile_of_many_scales_and_estimators_fits():
    rows = [
        {"site": f"residual_output.{layer}", "estimator": name, "step": step, "estimate": 100 + layer + step}
        for layer in range(3)
        for name in ("gride", "levina_bickel_with_a_long_name")
        for step in range(14)
    ]
    results = tg.AnalysisResults(
        pd.DataFrame(), pd.DataFrame(), diagnostics={"intrinsic_dimension": pd.DataFrame(rows)}
    )
    text = printed(print_profiles, results)
    assert all(text.count(f"scale {step}") >= 2 for step in range(1, 15))


def test_a_comparison_of_many_measures_fits_and_calls_the_models_by_their_names():
    names = ("gpt2", "my-gpt2")
    measures = [f"measure_number_{i}" for i in range(9)]
    pairs = [
        {
            "a": f"{names[0]}/residual_output.{i}",
            "b": f"{names[1]}/residual_output.{j}",
            "layer_a": i,
            "layer_b": j,
        }
        | {name: 100.0 * n + 10 * i + (i == j) for n, name in enumerate(measures)}
        for i in range(3)
        for j in range(3)
    ]
    data = {"models": {name: {"id": name} for name in names}, "rows_observed": 5, "align": "rows"}
    text = printed(print_comparison, tg.Comparison(pd.DataFrame(), pd.DataFrame(pairs), metadata=data))
    assert "Each layer of gpt2, and the layer of my-gpt2 that is nearest" in text
    for n in range(9):
        for layer in range(3):
            assert f"{100.0 * n + 10 * layer + 1:.1f} at {layer}" in text


def test_runs_fit_with_what_is_known_of_them(tmp_path):
    store = tg.ActivationStore(tmp_path / "store")
    path = "/somewhere/very/deep/" + "x" * 60 + "/checkpoint-1200"
    for model, tags in (("gpt2", ["first"]), (path, []), ("b[/]\x1b[31mad", ["second", "third"])):
        store.save({"x": torch_rows()}, model=model, tag=tags)
    runs = store.query()
    text = printed(print_runs, runs)
    assert "3 runs" in text and all(run in text for run in runs.ids)
    for told in ("gpt2", "checkpoint-1200", "second, third", "b[/]", "complete", "capture"):
        assert told in text
    assert "\x1b" not in text and "Empty: dataset" in text
    assert printed(print_runs, store.query(model="none")) == "no runs\n"


def torch_rows():
    import torch

    return torch.ones(2, 3)
