"""Commands under torchrun: the work is shared, rank 0 prints and writes, all exit alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as kinds
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tdgeom.cli.launched_ranks import launched

# several commands in one start, as a shell script in every process would do; what each prints and its exit code
PROGRAM = """
import contextlib, io, json, os, sys
from tdgeom.cli.app import main
found = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    found.append([code, out.getvalue(), err.getvalue()])
with open(f"{sys.argv[2]}/{os.environ.get('RANK', 0)}.json", "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    words = [f"w{i}" for i in range(60)]
    known = {word: number for number, word in enumerate(["<pad>", "<unk>", *words])}
    tokenizer = Tokenizer(kinds.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=62, n_positions=64, bos_token_id=None, eos_token_id=None
    )
    for name, seed in (("a", 0), ("b", 1)):
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    lines = [" ".join(words[(7 * i + 3 * j) % 60] for j in range(12 - i % 3)) for i in range(90)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    for part in range(3):
        (folder / f"part-{part}.txt").write_text("\n\n".join(lines[part::3]))
    return folder


def commands(folder, out):
    model, text = str(folder / "a"), ["--text", str(folder / "text.txt"), "--batch-size", "4"]
    return [
        [
            "analyze",
            model,
            *text,
            "--out",
            str(out / "analyze"),
            "--max-rows",
            "400",
            "--checkpoint",
            str(out / "state"),
            "--every",
            "3",
        ],
        ["compare", model, str(folder / "b"), *text, "--out", str(out / "compare")],
        ["dimension", model, *text, "--out", str(out / "dimension")],
        ["overlap", model, *text, "--out", str(out / "overlap")],
        ["store", model, *text, "--store", str(out / "store")],
        ["show", str(out / "analyze")],
        ["analyze", model, "--text", str(folder / "nothing.txt")],
        ["analyze", model, *text, "--out", str(out / "analyze")],
    ]


def started(folder, world, listed, program=PROGRAM):
    out = folder / f"of-{world}"
    out.mkdir(exist_ok=True)
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    )
    (folder / "program.py").write_text(program)
    subprocess.run(
        [sys.executable, *launcher, str(folder / "program.py"), json.dumps(listed(folder, out)), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    return out, [json.loads((out / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def alone(folder):
    out, (one,) = started(folder, 1, commands)
    return out, one


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_commands_share_the_work_and_print_once(folder, alone, world):
    alone, one = alone
    out, ranks = started(folder, world, commands)
    for number, arguments in enumerate(commands(folder, out)):
        codes = [rank[number][0] for rank in ranks]
        assert codes == [one[number][0]] * world, (arguments, [rank[number] for rank in ranks])
        assert [rank[number][1:] for rank in ranks[1:]] == [["", ""]] * (world - 1), arguments
        printed, told = one[number][1], one[number][2]
        if arguments[0] not in ("store", "show"):  # run ids and widths of paths
            assert len(ranks[0][number][1].splitlines()) == len(printed.splitlines()), arguments
        assert len(ranks[0][number][2].splitlines()) == len(told.splitlines()), ranks[0][number][2]
    assert [run[0] for run in one] == [0, 0, 0, 0, 0, 0, 2, 2]
    tables = {"analyze": "metrics", "compare": "novelty", "dimension": "metrics", "overlap": "metrics"}
    for name, table in tables.items():
        numbers = [
            pd.read_csv(where / name / f"{table}.csv").select_dtypes("number") for where in (alone, out)
        ]
        pd.testing.assert_frame_equal(*numbers, rtol=1e-6, atol=1e-7)
    assert not list(out.glob("state*"))  # removed where the tables are saved
    told = json.loads((out / "analyze" / "metadata.json").read_text())
    assert told["rows_observed"] == 400 and told["loader"].startswith("one loader, shared out among")


@pytest.mark.slow
def test_parts_of_ones_own_are_put_together(folder):
    def parts(folder, out):
        text = ["--sharded", "--text", str(folder / "part-RANK.txt")]
        return [["analyze", str(folder / "a"), *text, "--out", str(out / "parts")]]

    arguments = "json.loads(sys.argv[1])"
    own = PROGRAM.replace(arguments, f"{arguments[:-1]}.replace('RANK', os.environ['RANK']))")
    out, ranks = started(folder, 3, parts, own)
    assert [rank[0][0] for rank in ranks] == [0, 0, 0], ranks
    told = json.loads((out / "parts" / "metadata.json").read_text())
    assert told["rows_observed"] == len((folder / "text.txt").read_text().split())
    assert "numbered by rank and index: only runs on 3 ranks" in told["loader"]


def test_one_process_makes_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launched() is None
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched() is None


def test_processes_that_cannot_find_each_other_are_told_so(monkeypatch, capsys):
    from tdgeom.cli.app import main

    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert main(["show", "nothing"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("tdgeom: error: RANK and WORLD_SIZE say") and "torchrun --nproc-per-node" in said
