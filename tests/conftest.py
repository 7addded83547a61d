"""Settings every test shares: no network, one thread a worker, the same examples in every run."""

from __future__ import annotations

import json
import os
from importlib import import_module

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Before doctests are collected: they are to meet the module that run uses, not a copy of it.
import_module("tdgeom.run.checkpoint")
collect_ignore = [] if torch.cuda.is_available() else ["test_cuda.py"]

settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random BERT of three layers with a real tokenizer, as ``from_pretrained`` reads it."""
    from tdgeom.demo import demo_model_path
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    config = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of twelve documents."""
    from tdgeom.demo import demo_texts

    path = tmp_path_factory.mktemp("text") / "topics.txt"
    flat = (" ".join(document.split()) for document in demo_texts()[:12])
    path.write_text("\n\n".join(flat), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def byte_tokenizer():
    """A byte-level tokenizer of 400 pieces."""
    from tdgeom.demo import demo_texts
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<eos>"], show_progress=False)
    tokenizer.train_from_iterator(demo_texts()[:50], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture(scope="module")
def slow_tokenizers(tmp_path_factory):
    """Tokenizers without a backend that share one vocabulary: BERT's by case, CTRL's by the order of merges."""
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy
    from transformers.models.ctrl.tokenization_ctrl import CTRLTokenizer

    folder = tmp_path_factory.mktemp("slow")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "cat",
        "sat",
        "##s",
        "on",
        "mat",
        "The",
        "Cat",
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    pieces = ["<unk>", "a@@", "b@@", "c@@", "a", "b", "c", "ab@@", "bc", "ab", "abc"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    merges = ("a b", "b c</w>")
    for name, lines in (("first", merges), ("second", merges[::-1])):
        (folder / f"{name}.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))
    bert = {case: BertTokenizerLegacy(folder / "vocab.txt", do_lower_case=case) for case in (True, False)}
    ctrl = {
        name: CTRLTokenizer(folder / "vocab.json", folder / f"{name}.txt") for name in ("first", "second")
    }
    return folder, bert, ctrl


@pytest.fixture
def command(capsys, monkeypatch):
    """Run a command in this process: (exit code, stdout, stderr)."""
    from tdgeom import cli

    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run
