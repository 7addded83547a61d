"""The report's file, without a browser: what it holds, what it says, how large it is."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch

import tdgeom as tg
from reported import HOSTILE, compared, made_up
from tdgeom.measures.columns import COLUMNS, column_of
from tdgeom.report import ReportedRun, write_report
from tdgeom.report.markup import element, json_block
from tdgeom.report.profile_charts import drawn_once
from tdgeom.report.reported_run import series_rows


class Page(HTMLParser):
    """The elements of a page, their texts, and the data for its script."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements, self.texts, self.scripts, self.held = [], {}, [], []
        self.feed(self.source)
        self.data = json.loads(next(text for kind, text in self.scripts if kind == "application/json"))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "input"):
            self.held.append(tag)
        if tag == "script":
            self.scripts.append([dict(attributes).get("type"), ""])

    def handle_endtag(self, tag):
        assert self.held.pop() == tag

    def handle_data(self, data):
        if self.held and self.held[-1] == "script":
            self.scripts[-1][1] += data
        elif self.held:
            self.texts.setdefault(self.held[-1], []).append(data)

    def chart(self, key):
        return self.data["charts"][key]

    def titled(self, title):
        """The specification of the chart under a heading."""
        index = self.texts["h3"].index(title)
        return list(self.data["charts"].values())[index]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return Page(write_report([made_up()], tmp_path_factory.mktemp("report") / "r.html"))


def values(spec):
    return spec["data"]["values"]


def test_a_report_is_one_sound_file_that_forbids_requests(one):
    assert one.held == []
    names = [attributes.get("name") for _, attributes in one.elements]
    policy = next(a["content"] for _, a in one.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "unsafe-eval" not in policy and "generator" in names
    for kind, text in one.scripts:
        if kind is None:
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy
    outside = [
        a for _, a in one.elements if str(a.get("src", a.get("href", ""))).startswith(("http", "//", "data:"))
    ]
    assert outside == []


def test_headings_never_skip_a_level_and_every_section_is_named(one):
    levels = [int(tag[1]) for tag, _ in one.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    keys = {attributes.get("id") for _, attributes in one.elements}
    for tag, attributes in one.elements:
        if tag == "section":
            assert attributes["aria-labelledby"] in keys
        if tag == "a" and attributes["href"].startswith("#"):
            assert attributes["href"][1:] in keys


def test_every_chart_is_valid_and_says_itself_in_words(one):
    import vl_convert

    for key, spec in one.data["charts"].items():
        assert len(spec["description"]) > 20, key
        json.dumps(vl_convert.vegalite_to_vega(spec))


def test_spectra_end_where_rounding_begins_and_the_rest_is_shaded(one):
    spec = one.chart("spectra-0")
    band, lines, _ = spec["layer"]
    assert band["data"]["values"] == [{"from": 63, "to": 64}] and band["mark"]["type"] == "rect"
    run = made_up()
    for record in values(spec):
        expected = run.eigenvalues[f"layer_{int(record['layer']):02d}"]
        assert record["rank"][0] == 1 and record["rank"][-1] == 63 and len(record["rank"]) <= 150
        shares = expected[np.array(record["rank"]) - 1] / expected.sum()
        np.testing.assert_allclose(record["share"], shares, rtol=1e-4)
    assert lines["encoding"]["x"]["scale"]["type"] == lines["encoding"]["y"]["scale"]["type"] == "log"


def test_a_profile_has_its_error_bars_and_its_fixed_scale(one):
    table = made_up().tables["metrics"]
    spec = one.titled("Participation ratio (dimensions)")
    np.testing.assert_allclose([v["y"] for v in values(spec)], table["d_pr"], rtol=1e-4)
    np.testing.assert_allclose([v["high"] - v["low"] for v in values(spec)], 1.0, rtol=1e-3)  # ± one of 0.5
    assert any(layer["mark"]["type"] == "rule" for layer in spec["layer"])
    scale = one.titled("IsoScore")["layer"][0]["encoding"]["y"]["scale"]
    assert scale["domain"] == [0, 1]
    assert one.titled("My own score")["layer"][0]["encoding"]["y"]["scale"].get("domain") is None


def test_equal_lines_are_drawn_once(one):
    spec = one.chart("ablation-0")
    names = spec["layer"][0]["encoding"]["color"]["scale"]["domain"]
    assert names == ["raw", "rows at unit length = rows at unit RMS", "features at unit variance"]
    assert len(values(spec)) == 3 * 6
    rows = pd.DataFrame({"series": ["a", "b"], "x": [0, 0], "y": [1.0, 1.001], "site": ["s", "s"]})
    assert drawn_once(rows)[1] == ["a", "b"]


def test_marks_and_warnings_stand_out(one):
    said = " ".join(one.texts["li"])
    for words in ("near rank 1", "few rows for their dimension", "rounding decides alpha_req", "1 warning"):
        assert words in said, words
    assert "1 of 6 sites (residual_input.1)" in said


def test_the_protocol_holds_settings_versions_and_hashes(one):
    text = " ".join(one.texts["pre"] + one.texts["dd"])
    for words in ('"seed": 0', "ab" * 32, "12,345,678", "max_rows", "a/model"):
        assert words in text, words


def test_tables_keep_every_number(one):
    whole = one.data["tables"]["whole/metrics"]
    expected = made_up().tables["metrics"]
    assert whole["columns"] == list(expected)
    assert [row[whole["columns"].index("d_pr")] for row in whole["rows"]] == expected["d_pr"].tolist()
    shown = {name for key, table in one.data["tables"].items() if "/" not in key for name in table["columns"]}
    assert {
        "d_pr",
        "alpha_req",
        "near_rank1",
        "few_rows",
        "unresolved",
        "my_own_score",
        "twonn_standard_error",
    } <= shown


def test_an_error_stands_beside_what_it_is_of(one):
    shown = [
        table["columns"] for key, table in one.data["tables"].items() if key.startswith("metrics_dimension")
    ]
    (columns,) = [names for names in shown if "d_pr" in names]
    assert columns[columns.index("d_pr") + 1] == "d_pr_se"


def test_router_loads_are_a_matrix(one):
    grid = {(v["r"], v["c"]): v["v"] for v in values(one.titled("Load of every expert"))}
    loads = made_up().tables["router"]["load"]
    assert grid[("2", "3")] == pytest.approx(loads[2][3], rel=1e-4) and len(grid) == 6 * 4


def test_two_runs_are_overlaid_with_their_differences(tmp_path):
    runs = [made_up("first"), made_up("second", seed=1)]
    page = Page(write_report(runs, tmp_path / "two.html"))
    key = f"dimension-{[t for t in page.texts['h3']].index('Participation ratio (dimensions)') - 1}"
    both, change = page.chart(key), page.chart(f"{key}-difference")
    assert {v["series"] for v in values(both)} == {"first", "second"}
    a, b = (run.tables["metrics"]["d_pr"].to_numpy() for run in runs)
    np.testing.assert_allclose([v["y"] for v in values(change)], b - a, rtol=1e-3)
    # a line keeps its colour in both
    colour = dict(zip(*both["layer"][0]["encoding"]["color"]["scale"].values()))
    assert change["layer"][-1]["encoding"]["color"]["scale"]["range"] == [colour["second"]]


def test_runs_of_unequal_depth_share_an_axis_of_relative_depth():
    rows, x = series_rows([made_up("a", layers=3), made_up("b", layers=5)], "metrics")
    assert x == "relative_depth" and rows["_x"].tolist() == [0, 0.5, 1, 0, 0.25, 0.5, 0.75, 1]
    assert series_rows([made_up("a"), made_up("b")], "metrics")[1] == "layer"


def test_a_comparison_is_matrices_on_the_scale_of_the_measure(tmp_path):
    page = Page(write_report([compared()], tmp_path / "c.html"))
    spec = page.titled("Linear CKA, debiased")
    grid = {(v["r"], v["c"]): v["v"] for v in values(spec)}
    assert grid[("1", "3")] == pytest.approx(1 / 3, rel=1e-4) and len(grid) == 25
    assert spec["layer"][0]["encoding"]["color"]["scale"]["domain"] == [0, 1]
    assert "one (a) and two (b)" in page.texts["h1"][0]


def test_thirty_two_layers_of_a_wide_model_stay_under_three_megabytes(tmp_path):
    run = made_up(layers=32, width=4096, experts=64)
    kind = "residual_input"
    pairs = pd.DataFrame(
        [{"a": f"{kind}.{i}", "b": f"{kind}.{j}", "linear_cka": 1 / (1 + j - i),
          "cknna": 1 / (2 + j - i), "kind": kind, "layer": i}
         for i in range(32) for j in range(i + 1, 32)]
    )  # fmt: skip
    run = ReportedRun("wide", {**run.tables, "novelty": pairs}, run.eigenvalues, run.metadata)
    assert write_report([run], tmp_path / "wide.html").stat().st_size < 3_000_000


def test_hostile_names_never_become_markup(tmp_path):
    path = write_report([made_up(hostile=HOSTILE)], tmp_path / "h.html", title=HOSTILE)
    page = Page(path)
    assert page.held == [] and not {"img", "b"} & {tag for tag, _ in page.elements}
    assert len(page.scripts) == 3 and not any("onerror" in attributes for _, attributes in page.elements)
    assert any(value["site"].startswith(HOSTILE) for value in values(page.titled("IsoScore")))


def test_a_name_never_ends_its_block():
    assert "</" not in json_block("x", {HOSTILE: HOSTILE})[40:-9]
    assert element("p", HOSTILE, title=HOSTILE).count("<") == 2


def test_results_write_their_report_and_it_lies_in_the_bundle(tmp_path):
    run = made_up()
    results = tg.AnalysisResults(
        run.tables["metrics"], run.tables["novelty"], eigenvalues=run.eigenvalues, metadata=dict(run.metadata)
    )
    with pytest.raises(ValueError, match=r"nothing is saved yet.*report.html"):
        results.report()
    results.save(tmp_path / "run")
    assert results.report() == tmp_path / "run" / "report.html"
    loaded = tg.AnalysisResults.load(tmp_path / "run")  # the report breaks no hash
    assert loaded.report(tmp_path / "other.html", beside=results, title="Both").is_file()
    assert "<h1>Both</h1>" in (tmp_path / "other.html").read_text(encoding="utf-8")


def test_without_the_drawing_library_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    with pytest.raises(ModuleNotFoundError, match="pip install vl-convert-python"):
        write_report([made_up()], tmp_path / "r.html")
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path / "r.html")


def test_every_column_of_an_analysis_is_described():
    from tdgeom.measures.registry import MEASURES
    from tdgeom.measures.sample_metrics import SAMPLE_METRICS
    from tdgeom.measures.spectrum_metrics import SPECTRUM_METRICS

    marks = {"near_rank1", "sv_few_rows"}
    missing = {*SPECTRUM_METRICS, *SAMPLE_METRICS, *MEASURES} - set(COLUMNS) - marks
    assert missing == set()
    assert column_of("d_pr").says and all(c.label for c in COLUMNS.values())


def test_grids_of_patching_sweeps_and_profiles_are_drawn(tmp_path):
    from tensordict import TensorDict

    grid = torch.tensor([[0.0, 1.0, 0.25], [0.5, -0.5, 0.75]])
    layers, columns = torch.tensor([4, 7]), torch.tensor([0, 1, 5])
    kind = {"grid": grid * 10, "recovered": grid, "layers": layers, "columns": columns}
    patched = TensorDict({(root, "residual_input"): value for root, value in kind.items()})
    page = Page(tg.write_report(patched, tmp_path / "patching.html"))
    cells = {(v["r"], v["c"]): v["v"] for v in values(page.titled("Patching residual_input"))}
    assert len(cells) == 6 and cells[("7", "1")] == -0.5 and cells[("4", "5")] == 0.25

    both = {
        root: TensorDict({"kl": value, "own": 1 - value})
        for root, value in kind.items()
        if root in ("grid", "recovered")
    }
    patched = TensorDict({(root, "z"): value for root, value in {**kind, **both}.items()})
    page = Page(tg.write_report(patched, tmp_path / "several.html"))
    for metric, expected in (("kl", -0.5), ("own", 1.5)):
        cells = {(v["r"], v["c"]): v["v"] for v in values(page.titled(f"Patching z, {metric}"))}
        assert len(cells) == 6 and cells[("7", "1")] == expected

    metrics = made_up().tables["metrics"]
    sweep = pd.concat([metrics.assign(step=step, d_pr=metrics["d_pr"] + step) for step in (0, 10, 200)])
    page = Page(tg.write_report(sweep.reset_index(drop=True), tmp_path / "sweep.html"))
    lines = values(page.titled("Participation ratio over steps"))
    assert [v["y"] for v in lines if v["layer"] == "2"] == pytest.approx(
        [metrics["d_pr"][2] + s for s in (0, 10, 200)], rel=1e-4
    )
    last = values(page.titled("Participation ratio (dimensions)"))
    assert [v["y"] for v in last] == pytest.approx((metrics["d_pr"] + 200).tolist(), rel=1e-4)


def test_a_tidy_table_of_steps_layers_and_measures_is_a_sweep(tmp_path):
    tidy = pd.DataFrame(
        [
            {"step": step, "layer": layer, "metric": name, "value": step + layer + of, "standard_error": 0.5}
            for step in (0, 10, 200)
            for layer in range(3)
            for name, of in (("d_pr", 1.0), ("my_score", 5.0))
        ]
    )
    page = Page(tg.write_report(tidy, tmp_path / "sweep.html"))
    for title, of in (("Participation ratio over steps", 1.0), ("My score over steps", 5.0)):
        lines = [v for v in values(page.titled(title)) if v["layer"] == "2"]
        assert [(v["x"], v["y"]) for v in lines] == [(step, step + 2 + of) for step in (0, 10, 200)]
        assert all(v["high"] - v["low"] == 1 for v in lines)


def test_runs_of_one_step_each_are_a_sweep_of_which_first_and_last_are_compared(tmp_path):
    metrics = made_up().tables["metrics"]
    steps = (200, 0, 10)  # in any order
    runs = [
        ReportedRun(f"checkpoint {s}", {"metrics": metrics.assign(d_pr=metrics["d_pr"] + s)}, {}, {"step": s})
        for s in steps
    ]
    page = Page(write_report(runs, tmp_path / "steps.html"))
    lines = [v for v in values(page.titled("Participation ratio over steps")) if v["layer"] == "2"]
    assert [v["x"] for v in lines] == [0, 10, 200]
    assert [v["y"] for v in lines] == pytest.approx([metrics["d_pr"][2] + s for s in (0, 10, 200)], rel=1e-4)
    drawn = [
        {v.get("series") for v in values(spec)}
        for spec in page.data["charts"].values()
        if "values" in spec["data"]
    ]
    assert {"step 0", "step 200"} in drawn
    apart = [
        ReportedRun(run.name, run.tables, {}, {}) for run in runs
    ]  # no step is told: runs like any others
    assert not any(
        "over steps" in title for title in Page(write_report(apart, tmp_path / "apart.html")).texts["h3"]
    )


def test_what_belongs_to_a_measure_is_named_after_it_and_helpers_stay_in_the_download(tmp_path):
    assert column_of("linear_cka_p").axis == "linear CKA, p-value"
    assert column_of("twonn_se").axis == "intrinsic dimension, TwoNN, standard error (dimensions)"
    assert (
        column_of("neighborhood_overlap_z").axis
        == "neighbourhood overlap, above chance (standard deviations)"
    )
    assert column_of("linear_cka_null_mean").low == 0 and column_of("linear_cka_calibrated").says
    table = pd.DataFrame(
        {"site": ["residual_input.0", "residual_input.1"], "layer": [0, 1], "d_pr": [3.0, 2.0]}
    )
    helpers = {"d_pr_se": 0.1, "d_pr_bias": 0.2, "d_pr_low": 1.5, "d_pr_high": 3.5, "energy_low": 7.0}
    page = Page(tg.write_report(table.assign(**helpers), tmp_path / "errors.html"))
    shown = {
        name
        for key, one in page.data["tables"].items()
        if key.startswith("metrics_")
        for name in one["columns"]
    }
    assert {"d_pr", "d_pr_se", "energy_low"} <= shown
    assert not shown & {"d_pr_bias", "d_pr_low", "d_pr_high"}
    assert {"d_pr_bias", "d_pr_low", "d_pr_high"} <= set(page.data["tables"]["whole/metrics"]["columns"])
    pairs = pd.DataFrame({"a": ["x.0", "x.1"], "b": ["x.1", "x.2"], "linear_cka": [0.5, 0.6]})
    null = {
        "linear_cka_null_mean": 0.1,
        "linear_cka_null_sd": 0.01,
        "linear_cka_z": 3.0,
        "linear_cka_p": 0.01,
    }
    page = Page(tg.write_report(pairs.assign(**null), tmp_path / "null.html"))
    titles = page.texts["h3"]
    assert any("p-value" in one for one in titles) and not any("by chance" in one for one in titles)


def test_dimension_over_scales_is_drawn(tmp_path):
    from tensordict import TensorDict

    sites = ["residual_input.0", "residual_input.1"]
    rows = TensorDict({("sample", site): torch.rand(300, 4) for site in sites})
    result = tg.ForEach(tg.Gride(range_max=16), sites)(rows)
    page = Page(tg.write_report(result, tmp_path / "gride.html"))
    points = [v for v in values(page.titled("Gride over scales")) if v["layer"] == "1"]
    expected = result["dimension", sites[1], "gride", "estimate"]
    assert [v["y"] for v in points] == pytest.approx(expected.tolist(), rel=1e-4)
    assert [v["x"] for v in points] == pytest.approx(
        result["dimension", sites[1], "gride", "scale"].tolist(), rel=1e-4
    )


def test_what_is_no_result_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"got str.*tg.load_results\(folder\)"):
        tg.write_report("run", tmp_path / "r.html")
    with pytest.raises(ValueError, match="at least one run"):
        tg.write_report([], tmp_path / "r.html")


def test_the_command_writes_the_report_of_one_bundle_or_several(tmp_path, monkeypatch, capsys):
    from tdgeom import cli

    monkeypatch.chdir(tmp_path)
    for index, name in enumerate(("first", "second")):
        run = made_up(seed=index)
        tg.AnalysisResults(
            run.tables["metrics"], run.tables["novelty"], metadata={"model_id": "m", "run_name": "same"}
        ).save(name)
    assert cli.main(["report", "first"]) == 0
    assert str(tmp_path / "first" / "report.html") in capsys.readouterr().out
    assert cli.main(["report", "first", "second", "--title", "Both <of> them"]) == 0
    page = Page(tmp_path / "report.html")
    assert page.texts["h1"] == ["Both <of> them"] and page.data["series"] == ["first", "second"]
    assert cli.main(["report", "nowhere"]) == 2
    assert "holds no bundle" in capsys.readouterr().err
