"""The rows of two models that belong together: tokens that end together, tokenizers that cut alike."""

from __future__ import annotations

import copy

import pytest
import torch
from tdgeom.demo import demo_model, demo_texts
from tensordict import TensorDict
from transformers import BertTokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy
from transformers.models.ctrl.tokenization_ctrl import CTRLTokenizer

from tdgeom.rows.tokenizer_alignment import AlignedRows, PairedTexts, cut_alike, matched_ends


def test_matched_ends_by_hand() -> None:
    a, b = [(0, 0), (0, 3), (3, 4), (5, 9), (0, 0)], [(0, 4), (4, 5), (5, 7), (7, 9)]
    assert matched_ends(a, b) == [(2, 0), (3, 3)]
    assert matched_ends([(0, 0)], b) == []


def test_tokens_that_end_together_have_read_the_same_text(byte_tokenizer) -> None:
    _, words = demo_model()
    texts = demo_texts()[:5]
    with pytest.warns(
        UserWarning, match=r"a document has \d+ tokens: .* beyond max_length=60 is left out"
    ) as caught:
        (batch,) = PairedTexts(texts, words, byte_tokenizer, batch_size=5, max_length=60)
    assert len(caught) == 1, "one warning for all documents of both sides"
    for row, text in enumerate(texts):
        spans = [t(text, return_offsets_mapping=True)["offset_mapping"] for t in (words, byte_tokenizer)]
        pairs = [
            (int(i), int(j)) for i, j in zip(batch["aligned"]["a"][row], batch["aligned"]["b"][row]) if i >= 0
        ]
        assert len(pairs) > 5
        for i, j in pairs:
            assert spans[0][i][1] == spans[1][j][1] > 0


def test_pairs_lie_on_the_cpu_whatever_the_default_device(byte_tokenizer) -> None:
    loader = PairedTexts(["one two", "three"], byte_tokenizer, byte_tokenizer)
    (plain,) = loader
    with torch.device("meta"):
        (batch,) = loader
    assert torch.equal(batch["aligned"]["a"], plain["aligned"]["a"])
    assert torch.equal(batch["document_id"], plain["document_id"])


def test_slow_tokenizers_are_told_apart_by_what_they_cut(slow_tokenizers):
    folder, bert, ctrl = slow_tokenizers
    assert not any(t.is_fast for t in (*bert.values(), *ctrl.values()))
    assert bert[True].get_vocab() == bert[False].get_vocab()
    assert not cut_alike(bert[True], bert[False])
    assert cut_alike(bert[True], BertTokenizerLegacy(folder / "vocab.txt", do_lower_case=True))
    assert ctrl["first"].get_vocab() == ctrl["second"].get_vocab()
    assert not cut_alike(ctrl["first"], ctrl["second"])
    assert cut_alike(ctrl["first"], CTRLTokenizer(folder / "vocab.json", folder / "first.txt"))
    assert not cut_alike(bert[True], ctrl["first"])


def test_a_slow_and_a_fast_tokenizer_of_one_kind_are_alike(slow_tokenizers):
    folder, bert, _ = slow_tokenizers
    fast = {case: BertTokenizer(str(folder / "vocab.txt"), do_lower_case=case) for case in (True, False)}
    assert fast[True].is_fast and fast[True].get_vocab() == bert[True].get_vocab()
    for case in (True, False):
        assert cut_alike(bert[case], fast[case])
        assert not cut_alike(bert[case], fast[not case])
    assert cut_alike(fast[True], copy.deepcopy(fast[True])) and not cut_alike(fast[True], fast[False])


def test_aligned_rows_leave_out_a_document_without_words() -> None:
    acts = {"a/x": torch.ones(2, 2, 1), "b/x": torch.ones(2, 3, 1)}
    where = {"a": torch.tensor([[True, False], [True, True]]), "b": torch.tensor([[False] * 3, [True] * 3])}
    td = TensorDict({"acts": acts, "aligned": where, "sequence_id": torch.tensor([4, 5])})
    td = AlignedRows(["a/x"], ["b/x"], align="document")(td)
    assert td["row_id"].tolist() == [5 << 20] and td["tokens", "a/x"].tolist() == [[1.0]]


def test_mistakes_say_what_to_do(byte_tokenizer) -> None:
    _, words = demo_model()

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="needs tokenizers that know where"):
        PairedTexts(["a"], Slow(), words)
    with pytest.raises(TypeError, match="put it in a list"):
        PairedTexts("one text", words, byte_tokenizer)
    with pytest.raises(TypeError, match="documents as strings, got dict: give the texts themselves"):
        next(iter(PairedTexts([{"input_ids": torch.ones(1, 2)}], words, byte_tokenizer)))
