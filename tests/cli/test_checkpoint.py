"""``tdgeom analyze --checkpoint``: an interrupted command goes on where it was, and ends with the same tables."""

from __future__ import annotations

import tempfile

import pandas as pd
import pytest
import torch
from tdgeom.text import TextBatches
from transformers import AutoModelForMaskedLM

import tdgeom as tg
from terminal import refused

EVERY_BATCH = ("--every", 1, "--batch-size", 2, "--max-length", 48)


@pytest.fixture
def interrupt_after(monkeypatch):
    """Ctrl-C when the command asks its text for one batch more than this; None: never."""
    whole = TextBatches.__iter__

    def set_to(count):
        def batches(self):
            for number, batch in enumerate(whole(self)):
                if number == count:
                    raise KeyboardInterrupt
                yield batch

        monkeypatch.setattr(TextBatches, "__iter__", batches)

    return set_to


@pytest.fixture
def passes(monkeypatch):
    """How often a model was run."""
    from tdgeom.model.capture import Capture

    forward, calls = Capture.forward, []
    monkeypatch.setattr(
        Capture, "forward", lambda self, *given, **named: calls.append(1) or forward(self, *given, **named)
    )
    return calls


def same_tables(found, expected):
    for name in ("metrics", "novelty"):
        pd.testing.assert_frame_equal(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
    assert found.metadata["rows_observed"] == expected.metadata["rows_observed"]


@pytest.mark.parametrize("name", ["analyze", "compare"])
def test_an_interrupted_command_goes_on_and_ends_with_the_same_tables(
    command, folder, text, tmp_path, interrupt_after, passes, name
):
    models = [folder] if name == "analyze" else [folder, folder]
    start = (name, *models, "--text", text, *EVERY_BATCH)
    assert command(*start, "--out", tmp_path / "whole")[0] == 0
    once = len(passes)
    state, out = tmp_path / "state", tmp_path / "run"
    for count in (2, 5):
        interrupt_after(count)
        code, _, _ = command(*start, "--out", out, "--checkpoint", state)
        assert code != 0 and state.is_file() and not out.exists()
    interrupt_after(None)
    assert command(*start, "--out", out, "--checkpoint", state)[0] == 0
    assert len(passes) == 2 * once and not state.exists()
    same_tables(tg.AnalysisResults.load(out), tg.AnalysisResults.load(tmp_path / "whole"))


def test_another_command_does_not_go_on_with_it(command, folder, text, tmp_path, interrupt_after):
    start, state = ("analyze", folder, "--text", text, *EVERY_BATCH, "--checkpoint"), tmp_path / "state"
    interrupt_after(3)
    assert command(*start, state)[0] != 0
    interrupt_after(None)
    before = state.read_bytes()
    assert refused(
        command(*start, state, "--max-rows", 99),
        "belongs to another run: settings.max_rows is 100000 there and 99",
    )
    assert refused(command(*start, state, "--seed", 5), "settings.seed is 0 there and 5 here")
    assert refused(command(*start, state, "--skip-first", 1), "settings.skip_first is 0 there and 1 here")
    assert refused(command(*start, state, "--max-length", 32), "first batch is not the one of then")
    model = AutoModelForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight += 1e-3
    model.save_pretrained(tmp_path / "other")
    other = ("analyze", tmp_path / "other", "--tokenizer", folder, *start[2:])
    assert refused(
        command(*other, state), "stages[0].model.weights.sha256 is", "remove the file to start anew"
    )
    assert state.read_bytes() == before
    assert command(*start, state)[0] == 0 and not state.exists()


def test_a_damaged_or_misplaced_checkpoint_is_one_line(command, folder, text, tmp_path):
    start = ("analyze", folder, "--text", text, "--checkpoint")
    assert refused(command(*start, tmp_path / "no" / "state"), "lies in no folder that exists")
    (tmp_path / "state").write_bytes(b"\x80\x04.")
    assert refused(command(*start, tmp_path / "state"), "cannot be read", "Remove it to start anew")
    assert refused(command(*start, tmp_path), "is a folder: name a file to keep the state in")


def test_what_cannot_be_saved_where_it_was_to_be_is_shown_and_saved_elsewhere(
    command, folder, text, tmp_path, monkeypatch
) -> None:
    save, out = tg.AnalysisResults.save, tmp_path / "out"

    def refused(results, save_dir, *args, **named):
        if save_dir == out:
            raise OSError(28, "No space left on device", str(out / "metrics.csv"))
        return save(results, save_dir, *args, **named)

    monkeypatch.setattr(tg.AnalysisResults, "save", refused)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    state = tmp_path / "state"
    wanted = ("--metrics", "spectrum", "--max-rows", 300, "--checkpoint", state, "--out", out)
    code, said, error = command("analyze", folder, "--text", text, *wanted)
    assert code == 2 and "d_pr" in said and state.exists()
    assert "No space left on device" in error and "The analysis is in" in error
    [refuge] = tmp_path.glob("tdgeom-*/out")
    assert tg.load_results(refuge).metadata["rows_observed"] == 300
