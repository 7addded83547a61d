"""Documents to batches, with tokenizers of three kinds: with and without a pad token, fast and slow."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from tdgeom.demo import demo_model_path
from tdgeom.text import TextBatches, read_dataset, read_jsonl, read_text
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

import tdgeom as tg
from models import bert

WORDS = ["<unk>", "<eos>", *(f"w{i}" for i in range(40))]


@pytest.fixture(scope="module")
def words():
    """No pad token, no special tokens added: like GPT-2's."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


@pytest.fixture(scope="module")
def minilm():
    return AutoTokenizer.from_pretrained(demo_model_path())


def text(*numbers):
    return " ".join(f"w{number}" for number in numbers)


def attended(loader):
    """Each sequence's ids without padding, with its document."""
    return [
        (int(document), row[mask.bool()].tolist())
        for batch in loader
        for document, row, mask in zip(batch["document_id"], batch["input_ids"], batch["attention_mask"])
    ]


def test_long_documents_are_split_and_keep_their_document(words):
    loader = TextBatches([text(*range(7)), text(1), "", "  ", text(2, 3)], words, batch_size=2, max_length=3)
    assert attended(loader) == [
        (0, [2, 3, 4]), (0, [5, 6, 7]), (0, [8]), (1, [3]), (4, [4, 5]),
    ]  # fmt: skip


def test_batches_lie_on_the_cpu_whatever_the_default_device(words):
    loader = TextBatches([text(0), text(0, 1)], words, labels=[1, 0])
    with torch.device("meta"):
        (batch,) = loader
    assert {value.device.type for value in batch.values()} == {"cpu"}
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]] and batch["label"].tolist() == [1, 0]


def test_batches_are_padded_within_the_batch_with_the_end_token(words):
    first, second = TextBatches([text(0), text(0, 1, 2), text(5)], words, batch_size=2, max_length=8)
    assert first["input_ids"].tolist() == [[2, 1, 1], [2, 3, 4]]
    assert first["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert first["special_tokens_mask"].tolist() == [[0, 1, 1], [0, 0, 0]]
    assert second["input_ids"].shape == (1, 1)
    assert "token_type_ids" not in first and words.pad_token is None
    assert all(value.dtype == torch.int64 for value in first.values())


def test_special_tokens_are_the_tokenizers_own(minilm):
    (batch,) = TextBatches(["Hello there. " * 6], minilm, max_length=10)
    assert batch["input_ids"].shape == (3, 10)
    assert (batch["input_ids"][:, 0] == minilm.cls_token_id).all()
    assert batch["special_tokens_mask"][0].tolist() == [1, *[0] * 8, 1]
    assert batch["token_type_ids"].shape == (3, 10)
    inner = batch["input_ids"][batch["special_tokens_mask"] == 0]
    assert inner.tolist() == minilm("Hello there. " * 6, add_special_tokens=False)["input_ids"]


def test_slow_tokenizers_split_alike():
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    (batch,) = TextBatches(["abcdefg"], tokenizer, max_length=4)
    assert batch["attention_mask"].sum(-1).tolist() == [4, 4, 2]
    assert batch["input_ids"][0, -1] == tokenizer.eos_token_id
    assert batch["special_tokens_mask"][2].tolist() == [0, 1, 1, 1]
    inner = batch["input_ids"][batch["special_tokens_mask"] == 0]
    assert tokenizer.decode(inner) == "abcdefg"


def test_labels_follow_documents(words):
    loader = TextBatches([text(0, 1, 2), text(3)], words, max_length=2, labels=[7, 9])
    (batch,) = loader
    assert batch["label"].tolist() == [7, 7, 9] and batch["label"].dtype == torch.int64


def test_batch_size_and_padding_change_no_row(words):
    documents = [text(*range(1, 1 + n)) for n in (3, 9, 1, 5, 12)]
    model = bert()
    values = []
    for batch_size in (1, 3):
        loader = TextBatches(documents, words, batch_size=batch_size, max_length=6)
        result = tg.analyze_model(model=model, dataloader=loader, progress=False, metrics=["spectrum"])
        assert result.metadata["rows_observed"] == 30
        values.append(result.metrics["d_pr"].tolist())
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_lists_and_readers_are_read_again_generators_are_not(words, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("w1 w2\n\nw3", encoding="utf-8")
    for source in ([text(1)], read_text(path)):
        loader = TextBatches(source, words)
        assert attended(loader) == attended(loader)
    once = TextBatches((text(i) for i in range(3)), words)
    assert len(attended(once)) == 3
    with pytest.raises(RuntimeError, match="second time.*Give a list"):
        next(iter(once))


def test_documents_are_read_lazily(words):
    seen = []

    def source():
        for number in range(1000):
            seen.append(number)
            yield text(1, 2)

    next(iter(TextBatches(source(), words, batch_size=4)))
    assert len(seen) <= 8


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("one string",), TypeError, "put it in a list"),
        (([1],), TypeError, "strings, got int at 0"),
    ],
)
def test_wrong_texts(words, arguments, error, message):
    with pytest.raises(error, match=message):
        list(TextBatches(*arguments, words))


def test_wrong_settings(words, minilm):
    with pytest.raises(ValueError, match="batch_size >= 1"):
        TextBatches([], words, batch_size=0)
    with pytest.raises(ValueError, match="max_length > 2"):
        TextBatches([], minilm, max_length=2)
    with pytest.raises(ValueError, match="one label a document, got 1 for 2"):
        TextBatches(["a", "b"], words, labels=[0])
    assert next(iter(TextBatches(["w1", "w2"], words, labels=["yes", "no"])))["label"] == ["yes", "no"]
    with pytest.raises(ValueError, match="more documents"):
        list(TextBatches(iter(["w1", "w2"]), words, labels=[0]))


def test_read_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\none\ntwo\n \n\nthree\n", encoding="utf-8-sig")
    assert list(read_text(path)) == ["one\ntwo", "three"]
    with pytest.raises(FileNotFoundError, match=r"nothing.txt does not exist"):
        read_text(tmp_path / "nothing.txt")
    with pytest.raises(FileNotFoundError, match="is a directory"):
        read_text(tmp_path)
    path.write_bytes(b"caf\xe9 \n")
    with pytest.raises(ValueError, match="not UTF-8.*iconv"):
        list(read_text(path))
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="holds no text"):
        list(read_text(path))


def test_read_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, ({"text": "one", "n": 1}, {"text": "two", "n": 2}))) + "\n\n")
    assert list(read_jsonl(f"{path}:text")) == list(read_jsonl(str(path))) == ["one", "two"]
    with pytest.raises(ValueError, match=r"line 1.*string under 'n', got int"):
        list(read_jsonl(f"{path}:n"))
    with pytest.raises(ValueError, match=r"line 1.*no such field.*\['n', 'text'\]"):
        list(read_jsonl(f"{path}:body"))
    path.write_text('{"text": "one"}\n{broken\n')
    with pytest.raises(ValueError, match="line 2: expected one JSON object"):
        list(read_jsonl(f"{path}:text"))
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1.*got list"):
        list(read_jsonl(f"{path}:text"))


def test_read_dataset_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        read_dataset("imdb")


def test_read_dataset_names_configuration_split_and_field(monkeypatch):
    # the package is optional and not among the tested ones: its one function that we call, with the same arguments
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        if name == "gone":
            raise ConnectionError("no such\nplace")
        return [{"text": "one", "body": "two"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert list(read_dataset("imdb")) == ["one"]
    documents = read_dataset("wikitext:raw:test:body")
    assert list(documents) == list(documents) == ["two"]
    assert list(read_dataset("imdb::test")) == ["one"]
    assert asked == [
        ("imdb", None, "train", True),
        ("wikitext", "raw", "test", True),
        ("imdb", None, "test", True),
    ]
    with pytest.raises(ValueError, match="no such field"):
        list(read_dataset("imdb:::title"))
    with pytest.raises(ValueError, match="'gone'.*no such place"):
        read_dataset("gone")
    with pytest.raises(ValueError, match="NAME"):
        read_dataset("a:b:c:d:e")
