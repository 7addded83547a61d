"""``tdgeom store``: the rows that the shell keeps are the model's own."""

from __future__ import annotations

import json

import torch
from tdgeom.text import TextBatches, read_text
from transformers import AutoModel, AutoTokenizer

import tdgeom as tg
from terminal import refused


def hidden_states(folder, text, layer):
    """The rows of a layer by transformers' own outputs, one sequence after another, and the index of each row's document."""
    model = AutoModel.from_pretrained(folder).eval()
    rows, documents, ids = [], [], []
    for batch in TextBatches(
        read_text(text), AutoTokenizer.from_pretrained(folder), batch_size=1, max_length=40
    ):
        with torch.no_grad():
            out = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
        rows.append(out.hidden_states[layer + 1][0])
        ids.append(batch["input_ids"][0])
        documents += [int(batch["document_id"])] * len(ids[-1])
    return torch.cat(rows), torch.tensor(documents), torch.cat(ids)


def test_rows_are_kept_found_and_read_again(command, folder, text, tmp_path):
    where = tmp_path / "activations"
    given = [
        "store",
        folder,
        "--text",
        text,
        "--max-length",
        40,
        "--sites",
        "residual_output",
        "--layers",
        "1,-1",
    ]
    code, out, err = command(*given, "--also", "input_ids", "--tag", "a", "--tag", "b", "--out", where)
    assert (code, err) == (0, "")
    store = tg.ActivationStore(where)
    (run,) = store.query(model=folder, dataset=text, tag=["a", "b"]).ids
    expected, documents, ids = hidden_states(folder, text, 1)
    assert f"Run {run} in {where}: {len(expected):,} rows at 2 sites" in out
    held = store.rows(run)[:]
    torch.testing.assert_close(held["tokens", "residual_output.1"], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(held["document_id"], documents) and torch.equal(held["carried", "input_ids"], ids)
    told = store.metadata(run)["metadata"]["command"]
    assert (
        told["name"] == "store" and told["options"]["layers"] == "1,-1" and set(told["weights"]) == {folder}
    )
    code, listed, _ = command("runs", "list", "--store", where)
    assert code == 0 and run in listed and "a, b" in listed


def test_the_rows_are_those_asked_for_and_json_says_where(command, folder, text, tmp_path, monkeypatch):
    monkeypatch.setenv("TDGEOM_STORE", str(tmp_path / "activations"))
    given = ["store", folder, "--text", text, "--max-length", 40, "--json", "--skip-first", 1]
    code, out, err = command(*given, "--max-rows", 30, "--dtype", "bfloat16", "--layers", 2)
    told = json.loads(out)
    assert (code, err) == (0, "") and told["rows"] == 30 and told["sites"] == ["residual_output.2"]
    assert 1e-4 < told["relative_error"] < 4e-3
    held = tg.ActivationStore.from_env().rows(told["run"])[:]
    values = held["tokens", "residual_output.2"]
    assert torch.equal(values, values.bfloat16().float()) and int(held["position"].min()) == 1
    code, out, _ = command(*given, "--pool", "mean")
    loader = TextBatches(read_text(text), AutoTokenizer.from_pretrained(folder), max_length=40)
    assert code == 0 and json.loads(out)["rows"] == sum(len(batch["input_ids"]) for batch in loader)
    code, out, _ = command("runs", "list", "--json")
    assert [one["model"] for one in json.loads(out)["runs"]] == [folder, folder]


def test_mistakes_leave_no_store(command, folder, text, tmp_path, monkeypatch):
    monkeypatch.delenv("TDGEOM_STORE", raising=False)
    where = tmp_path / "activations"
    given = ["store", folder, "--text", text]
    assert refused(command(*given), "--store DIR", "TDGEOM_STORE")
    assert refused(command(*given, "--store", where, "--dtype", "half"), "--dtype takes one of", "bfloat16")
    assert refused(
        command(*given, "--store", where, "--sites", "residual_outptu"), "Did you mean 'residual_output'?"
    )
    assert refused(command(*given, "--store", where, "--positions", "lsat"), "--positions takes")
    assert not where.exists()
    assert refused(command(*given, "--store", where, "--resume", "r1"), "the query found no run")


def test_an_interrupted_run_says_how_to_go_on(command, folder, text, tmp_path, monkeypatch):
    where, interrupted = tmp_path / "activations", []
    batches = TextBatches.__iter__

    def broken(self):
        rows = 0
        for batch in batches(self):
            rows += int(batch["attention_mask"].sum())
            if rows > 2200 and not interrupted:
                interrupted.append(rows)
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(TextBatches, "__iter__", broken)
    given = ["store", folder, "--text", text, "--max-length", 32, "--batch-size", 2, "--store", where]
    code, out, err = command(*given)
    (run,) = tg.ActivationStore(where).query(state="failed").ids
    assert (code, out) == (130, "") and f"--resume {run} goes on with it" in err
    code, out, err = command(*given, "--resume", run[:6])
    assert (code, err) == (0, "") and f"Run {run} in" in out
    expected = tg.ActivationStore(where).rows(run)
    monkeypatch.undo()
    code, out, _ = command(*given, "--json")
    whole = tg.ActivationStore(where).rows(json.loads(out)["run"])
    key = ("tokens", "residual_output.0")
    assert torch.equal(expected[:]["row_id"], whole[:]["row_id"]) and torch.equal(
        expected[:][key], whole[:][key]
    )
