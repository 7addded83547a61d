"""What commands share: which rows are measured, options from a file, JSON for machines, completion in the shell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import typer
from tdgeom.text import TextBatches, read_text
from transformers import AutoTokenizer

import tdgeom as tg
from tdgeom import cli
from tdgeom.analysis.analysis_settings import FAMILIES as OF_THE_LIBRARY
from tdgeom.cli.completion import FAMILIES, completing, measures, pair_measures, site_kinds
from tdgeom.cli.options import position_choice
from tdgeom.measures.registry import known_measures
from terminal import refused

COMMANDS = typer.main.get_command(cli.app).commands
SHARED = {
    "skip_first",
    "skip_special",
    "max_length",
    "positions",
    "pool",
    "config",
    "as_json",
    "batch_size",
    "device",
}
# which of the commands measure rows of a model, by the argument that names it
MEASURE = [
    name
    for name, command in COMMANDS.items()
    if name != "sites" and {parameter.name for parameter in command.params} & {"model", "model_a"}
]


def test_every_command_that_reads_a_model_has_the_shared_options():
    assert set(MEASURE) >= {"analyze", "compare", "dimension", "overlap"}
    for name in MEASURE:
        assert {parameter.name for parameter in COMMANDS[name].params} >= SHARED, name


@pytest.mark.parametrize(
    ("options", "select"),
    [
        ("--skip-first 2 --skip-special", {"skip_first": 2, "skip_special": True}),
        ("--positions 2:8", {"positions": slice(2, 8)}),
        ("--positions 1,3,-2 --pool mean", {"positions": [1, 3, -2], "pool": "mean"}),
        ("--positions last-1", {"positions": "last-1"}),
    ],
)
def test_the_rows_are_those_that_the_options_name(command, folder, text, options, select):
    code, out, _ = command("analyze", folder, "--text", text, "--max-length", 40, "--json", *options.split())
    assert code == 0
    loader = TextBatches(read_text(text), AutoTokenizer.from_pretrained(folder), max_length=40)
    same = tg.analyze_model(folder, loader, select=select, progress=False)
    printed = json.loads(out)
    assert [row["d_pr"] for row in printed["metrics"]] == pytest.approx(
        same.metrics["d_pr"].tolist(), rel=1e-9
    )
    assert printed["metadata"]["rows_observed"] == same.metadata["rows_observed"]


@pytest.mark.parametrize("name", ["compare", "dimension", "overlap"])
def test_other_commands_select_rows_too(command, folder, text, name):
    more = [
        "--max-length",
        32,
        "--max-rows",
        300,
        "--pool",
        "none",
        "--skip-first",
        1,
        "--positions",
        "1:9",
        "--json",
    ]
    models = [folder, folder] if name == "compare" else [folder]
    code, out, _ = command(name, *models, "--text", text, *more)
    select = json.loads(out)["metadata"]["settings"]["select"]
    assert code == 0 and select["skip_first"] == 1 and "1" in str(select["positions"])


def test_positions_are_words_numbers_and_ranges():
    assert position_choice("last-2") == "last-2" and position_choice("0,5,-1") == [0, 5, -1]
    assert position_choice("-1") == [-1] and position_choice("2:") == slice(2, None)
    for wrong in ("lsat", "1:x", "1,x", "labels"):
        with pytest.raises(typer.BadParameter, match=f"--positions takes all, .*got '{wrong}'"):
            position_choice(wrong)


def test_json_is_all_that_stdout_holds(command, folder, text, tmp_path):
    out = tmp_path / "run"
    given = ["analyze", folder, "--text", text, "--max-rows", "60", "--out", str(out), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "tdgeom", *given],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "80"},
    )
    printed = json.loads(done.stdout)
    assert done.returncode == 0 and "tdgeom: warning: " in done.stderr
    saved = tg.AnalysisResults.load(out)
    pd.testing.assert_frame_equal(
        pd.DataFrame(printed["metrics"])[["site", "d_pr"]], saved.metrics[["site", "d_pr"]], rtol=1e-12
    )
    assert printed["folder"] == str(out) and None in {row["alpha_req"] for row in printed["metrics"]}
    code, shown, err = command("show", out, "--json")
    same = [[(row["site"], row["d_pr"]) for row in one["metrics"]] for one in (printed, json.loads(shown))]
    assert (code, err) == (0, "") and same[0] == same[1]
    assert refused(command("show", tmp_path, "--json"), "no metadata.json")
    code, shown, again = command("show", out)  # warns as the analysis did
    assert again == done.stderr and "few rows" in again and " * " in shown and "so few tokens" in shown
    code, listed, err = command("sites", folder, "--json")
    (site,) = [one for one in json.loads(listed)["sites"] if one["site"] == "mlp_output.2"]
    assert site["module"] == "bert.encoder.layer.2.output.dense" and site["layer"] == 2 and err == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_80_columns_is_whole(command, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = command(name, "--help")
    assert (code, err) == (0, "") and "…" not in out and max(map(len, out.splitlines())) <= 80
    # each option in a line of its own, named whole
    options = [
        option for parameter in COMMANDS[name].params for option in parameter.opts if option.startswith("--")
    ]
    assert all(option in out for option in options)


def test_every_command_has_a_line_in_the_guide():
    guide = (Path(__file__).parents[2] / "docs" / "command_line.md").read_text(encoding="utf-8")
    assert {line.split()[2].strip("`") for line in guide.splitlines() if line.startswith("| `tdgeom")} == set(
        COMMANDS
    )


# ---------------------------------------------------------------------------------------- files of options


YAML = """
# what is written with a dash or an underscore is one option
text: {text}
max-rows: 300
layers: [0, -1]
skip_special: true
sites: [residual_input, mlp_output]
metrics: spectrum
seed:
"""
TOML = """
model = "{folder}"
text = '{text}'
max_rows = 300
layers = "0,-1"
skip-special = true
sites = ["residual_input", "mlp_output"]
metrics = "spectrum"
"""


def test_options_come_from_a_file_and_those_of_the_line_count_more(command, folder, text, tmp_path):
    found = []
    for name, words in (("run.yaml", YAML), ("run.toml", TOML)):
        path = tmp_path / name
        path.write_text(words.format(folder=folder, text=text))
        given = [] if name.endswith("toml") else [folder]
        code, out, err = command("analyze", *given, "--config", path, "--max-rows", 200, "--json")
        assert code == 0, err
        found.append(json.loads(out))
    yaml, toml = found
    assert yaml["metrics"] == toml["metrics"] and yaml["metadata"]["rows_observed"] == 200
    assert {row["site"] for row in yaml["metrics"]} == {
        "residual_input.0", "mlp_output.0", "residual_input.2", "mlp_output.2",
    }  # fmt: skip
    record = toml["metadata"]["command"]
    assert record["name"] == "analyze" and record["options"]["max_rows"] == 200
    assert record["options"]["skip_special"] is True and record["options"]["model"] == folder
    assert set(record["files"]) == {text} and set(record["weights"]) == {folder}
    # what was recorded is a file of options too
    again = tmp_path / "again.json"
    again.write_text(json.dumps(record["options"]))
    code, out, _ = command("analyze", "--config", again, "--json")
    assert code == 0 and json.loads(out)["metrics"] == toml["metrics"]


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("a.yaml", "max_row: 3", ("max_row is no option of tdgeom analyze", "max_rows")),
        ("a.yaml", "skipfirst: 3", ("skipfirst is no option", "skip_first")),
        ("a.toml", "maximum_tokens = 3", ("maximum_tokens is no option",)),
        ("a.yaml", "config: b.yaml", ("config is no option",)),
        ("a.yaml", "command: compare", ("for tdgeom compare, not for tdgeom analyze",)),
        ("a.yaml", "max_rows: many", ("'--max-rows'", "valid integer")),
        ("a.yaml", "max_rows: {least: 3}", ("max_rows takes one value or a list",)),
        ("a.yaml", "- max_rows", ("an option a line", "list")),
        ("a.yaml", "a: [", ("cannot be read",)),
        ("a.toml", "max_rows", ("cannot be read",)),
        ("a.ini", "max_rows=3", (".yaml, .yml, .json or .toml",)),
        (None, "", ("does not exist",)),
    ],
)
def test_a_file_that_says_something_else_is_refused(command, folder, tmp_path, name, words, said):
    path = tmp_path / (name or "none.yaml")
    if name:
        path.write_text(words)
    assert refused(command("analyze", folder, "--config", path), *said)


# ---------------------------------------------------------------------------------------- the shell


def completed(line):
    words = line.split(" ")
    done = subprocess.run(
        [sys.executable, "-c", "from tdgeom import cli; cli.main()"],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "_TDGEOM_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
        },
    )
    assert done.returncode == 0 and done.stderr == ""
    return done.stdout.split()


def test_the_shell_completes_commands_options_sites_and_measures():
    assert completed("tdgeom ana") == ["analyze"]
    assert completed("tdgeom analyze gpt2 --skip") == ["--skip-first", "--skip-special"]
    assert completed("tdgeom analyze gpt2 --sites residual_") == [
        "residual_input",
        "residual_mid",
        "residual_output",
    ]
    assert completed("tdgeom analyze gpt2 --sites embed,final") == ["embed,final_norm"]
    assert completed("tdgeom compare a b --metrics rsa,proc") == ["rsa,procrustes"]
    assert completed("tdgeom dimension gpt2 --estimator twonn,gr") == ["twonn,gride"]


def test_what_is_completed_is_what_the_library_knows():
    assert ("default", *OF_THE_LIBRARY) == FAMILIES
    assert set(measures()) == {*FAMILIES, *known_measures()}
    assert set(pair_measures()) <= set(known_measures())
    assert set(site_kinds()) >= {"residual_input", "module_output:", "attn_pattern"}
    assert completing(lambda: ["ab", "ac", "b"])("ab,") == ["ab,ac", "ab,b"]


def test_the_version_is_that_of_the_package(command):
    from importlib.metadata import version

    code, out, err = command("--version")
    assert (code, err) == (0, "") and out.splitlines()[0] == f"tdgeom {tg.__version__}"
    assert f"torch {version('torch')}" in out.splitlines() and version("tdgeom") == tg.__version__
