"""The command line, with a tiny model in a local folder and no network."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings

import pandas as pd
import pytest
from rich.console import Console
from tdgeom.demo import demo_texts
from tdgeom.text import TextBatches, read_text
from transformers import AutoTokenizer

import models
import tdgeom as tg
from tdgeom import cli
from tdgeom.cli.print_results import print_results
from terminal import refused


@pytest.fixture(scope="module")
def bundle(folder, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    options = (
        "--max-rows 700 --max-length 48 --diagnostics normalization_ablation --layers 0,-1 --plots "
        "--sites residual_input,mlp_output --run-name try --seed 3"
    )
    code = cli.main(["analyze", folder, "--text", text, "--out", str(out), *options.split()])
    assert code == 0
    return out


def test_analyze_writes_what_the_options_ask_for(bundle, folder, text):
    results = tg.AnalysisResults.load(bundle)
    assert sorted(results.metrics["site"]) == [
        "mlp_output.0", "mlp_output.2", "residual_input.0", "residual_input.2",
    ]  # fmt: skip
    assert results.metadata["rows_observed"] == 700 and results.metadata["settings"]["seed"] == 3
    assert results.metadata["run_name"] == "try"
    assert results.metadata["dataset"] == text and results.metadata["tokenizer"] == folder
    assert set(results.diagnostics) == {"normalization_ablation"}
    assert {path.name for path in (bundle / "plots").iterdir()} >= {"spectrum.png", "profile.png"}


def test_analyze_gives_the_numbers_of_the_library(command, folder, text, tmp_path):
    code, out, err = command("analyze", folder, "--text", text, "--max-rows", 500, "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    loader = TextBatches(read_text(text), AutoTokenizer.from_pretrained(folder), max_length=64)
    same = tg.analyze_model(folder, loader, max_rows=500, progress=False)
    saved = tg.AnalysisResults.load(tmp_path / "run")
    pd.testing.assert_series_equal(saved.metrics["d_pr"], same.metrics["d_pr"])
    assert f"{same.metrics['d_pr'][0]:.1f}" in out
    assert str(tmp_path / "run") in out and "500 tokens" in out


def test_analyze_reads_json_lines_and_ranges_and_drops_special_tokens(command, folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"body": text}) for text in demo_texts()[:3]))
    out = tmp_path / "run"
    code, _, err = command(
        "analyze", folder, "--jsonl", f"{path}:body", "--layers", "1:", "--metrics", "spectrum", "--skip-special",
        "--out", out, "--save-mode", "json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    results = tg.AnalysisResults.load(out)
    assert results.metrics["layer"].tolist() == [1, 2] and (out / "metrics.json").is_file()
    assert results.novelty.empty and results.metadata["settings"]["select"]["skip_special"]


def test_analyze_refuses_before_it_works(command, folder, text, bundle, tmp_path):
    start = ("analyze", folder)
    assert refused(command(*start), "exactly one of --text", "tdgeom analyze --help")
    assert refused(command(*start, "--text", text, "--jsonl", text), "exactly one of --text")
    assert refused(command(*start, "--text", tmp_path / "no.txt"), "no.txt does not exist")
    assert refused(command(*start, "--text", text, "--plots"), "--plots needs --out")
    assert refused(command(*start, "--text", text, "--out", bundle), "exists already", "--overwrite")
    assert refused(command(*start, "--text", text, "--out", bundle.parent, "--overwrite"), "no metadata.json")
    assert refused(command(*start, "--text", text, "--save-mode", "xml"), "bundle, csv or json")
    assert refused(command(*start, "--text", text, "--max-length", 65), "64 positions")
    assert refused(command(*start, "--text", text, "--layers", "1:x"), "a range such as 2:8")


def test_errors_of_the_library_are_one_line(command, folder, text, tmp_path):
    start = ("analyze", folder, "--text", text, "--max-rows", 100)
    assert refused(command(*start, "--layers", 9), "layer 9 is out of range")
    assert refused(command(*start, "--sites", "residual_inptu"), "Did you mean 'residual_input'?")
    assert refused(
        command(*start, "--metrics", "spectra"), "metrics: 'spectra' is none. Did you mean 'spectrum'?"
    )
    assert refused(command(*start, "--diagnostics", "x"), "unknown diagnostics ['x']")
    no_folder = f"there is no folder {tmp_path / 'nowhere'}, and as an id:"
    assert refused(command("analyze", tmp_path / "nowhere", "--text", text), no_folder, "--tokenizer")
    assert refused(command("sites", tmp_path / "nowhere"), no_folder, "config.json")
    assert refused(command("show", tmp_path), "no metadata.json")
    assert refused(command("analyze", folder, "--bogus"), "--bogus", "--help")
    assert refused(command("analyse"), "analyse")
    assert refused(command("analyze", folder, "--max-rows", "many"), "'--max-rows'")


def test_debug_shows_the_error_itself(tmp_path):
    with pytest.raises(FileNotFoundError):
        cli.main(["show", str(tmp_path), "--debug"])


def test_show_prints_each_site_with_a_bar_in_80_and_120_columns(command, bundle, monkeypatch):
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        code, out, err = command("show", bundle)
        assert code == 0 and all(line.startswith("tdgeom: warning: ") for line in err.splitlines())
        assert max(map(len, out.splitlines())) <= width
        assert "…" not in out
        for site in ("residual_input.0", "mlp_output.2"):
            (row,) = [
                line
                for line in out.splitlines()
                if line.startswith((site, f" {site}", f"    {site}")) and "█" in line
            ]
            assert re.search(r"\d\.\d", row)
        folded = " ".join(out.split())  # where lines break depends on the length of the model's path
        for word in ("d_pr", "top1_", "linear_", "token_", "700 tokens", "how many directions"):
            assert word in folded


def test_the_ablation_beside_a_baseline_has_a_row_for_each(command, folder, text):
    options = ("--max-rows", 100, "--untrained", "--diagnostics", "normalization_ablation", "--layers", 0)
    code, out, err = command("analyze", folder, "--text", text, *options)
    assert (code, err) == (0, "")
    rows = out.split("Normalization ablation: d_pr")[1].splitlines()
    found = [re.findall(r"^ *0 (trained|untrained)((?: +[\d.]+){4})$", row) for row in rows]
    assert [row[0][0] for row in found if row] == ["trained", "untrained"]


def test_tables_need_no_unicode(bundle):
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_results(tg.AnalysisResults.load(bundle), Console(file=file, width=60))
    file.seek(0)
    lines = file.read().splitlines()
    assert any("###" in line for line in lines) and max(map(len, lines)) <= 60


def test_sites_lists_kinds_with_module_paths(command, folder):
    code, out, err = command("sites", folder)
    assert (code, err) == (0, "")
    assert "BertForMaskedLM: 3 layers, 16 features" in out
    (row,) = [line for line in out.splitlines() if line.startswith("residual_input ")]
    assert row.split() == ["residual_input", "0-2", "bert.encoder.layer.*", "input"]
    code, out, _ = command("sites", folder, "--all")
    assert re.search(r"^mlp_output\.2 +2 +bert\.encoder\.layer\.2\.output\.dense", out, re.MULTILINE)


def test_sites_needs_only_a_configuration(command, tmp_path):
    models.t5().config.save_pretrained(tmp_path)
    code, out, err = command("sites", tmp_path)
    assert (code, err) == (0, "")
    assert "encoder 3 layers, decoder 3 layers" in out and "encoder.residual_output" in out


def test_sites_verifies_them_against_the_model(command, folder, text):
    for given in ([], ["--text", text]):
        code, out, err = command("sites", folder, "--verify", *given)
        assert (code, err) == (0, "")
        (row,) = [
            line
            for line in out.splitlines()
            if line.startswith("residual_input ") and "hidden states" in line
        ]
        layers, error, said = row.split()[-3:]
        assert (layers, said) == ("0-2", "ok") and float(error) < 1e-6
        assert re.search(r"^\d+ checks ok, 0 failed, \d+ not made\.$", out, re.MULTILINE)
    code, out, _ = command("sites", folder, "--verify", "--layers", "1")
    assert re.search(r"^mlp_output +edit +1 +\S+ +ok", out, re.MULTILINE)
    assert refused(command("sites", folder, "--text", text), "add --verify")


def test_a_failed_check_is_an_exit_code(command, folder, monkeypatch):
    table = tg.verify_sites(models.bert(), models.text_batch(), sites="residual_output", edits=False)
    wrong = table.assign(outcome="failed", note="what came is another tensor")
    monkeypatch.setattr(tg, "verify_sites", lambda *given, **more: wrong)
    code, out, _ = command("sites", folder, "--verify")
    assert (
        code == 1 and "Failed" in out and "residual_output 0-2, own hook: what came is another tensor" in out
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["analyze", "-h"], ["demo", "-h"], ["show", "-h"], ["sites", "-h"]]
)
def test_help(command, arguments):
    code, out, err = command(*arguments)
    assert code == 0 and err == "" and "Usage" in out
    if arguments[0] != "--help":
        assert "Example" in out


def test_without_a_command_help_comes_first(command):
    for arguments, text in (([], "Measure the geometry"), (["runs"], "Find, check, move")):
        code, out, err = command(*arguments)
        assert code == 2 and text in out
        assert err == f"tdgeom: error: name a command. See: {' '.join(['tdgeom', *arguments])} --help\n"


def test_python_dash_m_is_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "tdgeom", "show", "no-such-folder"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("tdgeom: error: no-such-folder holds no bundle")


def test_warnings_of_ours_are_one_line_and_others_none(command):
    @cli.app.command("warn")
    def warn():
        warnings.simplefilter("always")
        warnings.warn("two\nlines", tg.UndefinedMeasureWarning, stacklevel=1)
        warnings.warn("somebody else's", FutureWarning, stacklevel=1)

    try:
        assert command("warn") == (0, "", "tdgeom: warning: two lines\n")
    finally:
        cli.app.registered_commands.pop()


def test_interrupt_is_one_line_and_exit_code_130(folder, tmp_path):
    pipe = tmp_path / "endless.txt"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [sys.executable, "-m", "tdgeom", "analyze", folder, "--text", pipe, "--out", tmp_path / "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        # a shell that started the tests in the background has them ignore Ctrl-C, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    handle = None
    while handle is None and process.poll() is None:  # until it reads, the model being loaded by then
        try:
            handle = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.05)
    os.write(handle, b"some text\n\nmore text\n\n" * 100)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    os.close(handle)
    assert (process.returncode, out, err) == (130, "", "tdgeom: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["endless.txt"]
