"""Metrics of patched runs: answers mean what they mean in logit attribution, functions are checked for what they give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

import models
import tdgeom as tg

WORDS = {
    word: number
    for number, word in enumerate(["[UNK]", "[PAD]", "yes", "no", "red", "blue", "one", "two", "three"])
}


def tokenizer():
    known = Tokenizer(tokenizer_models.WordLevel(WORDS, unk_token="[UNK]"))
    known.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=known, unk_token="[UNK]", pad_token="[PAD]")


def pair(batch=3):
    ids = torch.randint(4, models.VOCAB, (2, batch, 5), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids[0]}, {"input_ids": ids[1]}


SETTINGS = {"layers": 1, "positions": 2, "progress": False}


def test_answers_are_those_of_logit_attribution():
    """Each form gives the logits that the table of the unpatched run has."""
    model, (clean, corrupted) = models.llama(), pair()
    forms = [
        (5, {}),
        ((5, 9), {}),
        ([5, (7, 9)], {}),
        ([5, 6, 7], {"per_text": True}),
        ([5, 6, 7], {"per_text": False}),
        ([(5, 6), (7, 8), (9, 10)], {"per_text": True}),
        (torch.tensor([5, 6, 7]), {}),
        (np.array([5, 6, 7]), {}),
        (torch.tensor([[5, 6], [7, 8], [9, 10]]), {}),
        (([5, 6, 7], 9), {}),
        ((torch.tensor([5, 6, 7]), np.array([8, 9, 10])), {}),
        ("red", {"tokenizer": tokenizer()}),
        (("yes", "no"), {"tokenizer": tokenizer()}),
        ((["yes", "red", "one"], "no"), {"tokenizer": tokenizer()}),
    ]
    for answers, given in forms:
        out = tg.activation_patching(
            model, clean, corrupted, metric="logit", answers=answers, **given, **SETTINGS
        )
        table = tg.logit_attribution(model, corrupted, answers, by="layer", **given)
        expected = table.groupby(["text", "answer"], sort=False)["model_logit"].first()
        expected = torch.tensor(expected.to_numpy().copy()).reshape(3, -1)
        held = out["corrupted"]
        own = held[:, None] if isinstance(held, torch.Tensor) else torch.stack(list(held.values()), 1)
        torch.testing.assert_close(own.double(), expected, rtol=1e-5, atol=1e-6)
    out = tg.activation_patching(
        model,
        clean,
        corrupted,
        metric="logit",
        answers=["red", ("yes", "no")],
        tokenizer=tokenizer(),
        **SETTINGS,
    )
    assert list(out["grid", "residual_input"].keys()) == ["red", "yes - no"]
    for answers, match in (
        ([5, 6, 7], r"Remedy: per_text=True"),
        (([5, 6], 9), "one for each of the 3 texts, got 2"),
        (((5, 6), 9), "a tuple in answers= is a difference of two tokens"),
        (np.array([0.5, 1.0, 2.0]), "token ids, integers, got float64"),
        (torch.tensor([5, 6]), r"\(B,\) or \(B, A\) for the 3 texts"),
    ):
        for call in (
            lambda a: tg.activation_patching(model, clean, corrupted, metric="logit", answers=a, **SETTINGS),
            lambda a: tg.logit_attribution(model, corrupted, a),
        ):
            with pytest.raises(ValueError, match=match):
                call(answers)


def test_texts_are_tokenized_for_both_runs():
    model, words = models.llama(), tokenizer()
    texts = ["yes red one", "no blue one"], ["yes blue one", "no red one"]
    out = tg.activation_patching(
        model, *texts, answers=("red", "blue"), tokenizer=words, layers=0, progress=False
    )
    ids = [words(given, return_tensors="pt")["input_ids"] for given in texts]
    by_id = tg.activation_patching(
        model, *({"input_ids": one} for one in ids), answers=(4, 5), layers=0, progress=False
    )
    assert torch.equal(out["grid", "residual_input"], by_id["grid", "residual_input"])
    for call in (
        lambda given: tg.activation_patching(model, given, given, answers=4, tokenizer=words),
        lambda given: tg.logit_attribution(model, given, 4, tokenizer=words),
    ):
        for given, match in (
            ([], "was given no text"),
            ("", "a text without a token"),
            (["yes", ""], "without a token"),
        ):
            with pytest.raises(ValueError, match=match):
                call(given)


def test_several_metrics_are_measured_in_the_same_passes():
    model, runs = models.gpt2(), pair()
    seen = []

    def middle(logits):
        seen.append(len(logits))
        return logits[:, 7]

    metrics = {"difference": "logit_diff", "share": "probability", "kl": "kl", "own": middle}
    out = tg.activation_patching(model, *runs, metric=metrics, answers=(5, 9), layers=1, progress=False)
    counted, seen[:] = len(seen), []
    tg.activation_patching(model, *runs, metric=middle, layers=1, progress=False)
    assert counted == len(seen)  # as often as alone
    for name, alone in (
        ("difference", {"metric": "logit_diff", "answers": (5, 9)}),
        ("kl", {"metric": "kl"}),
        ("own", {"metric": lambda logits, example: logits[:, 7]}),
    ):
        one = tg.activation_patching(model, *runs, layers=1, progress=False, **alone)
        for root in ("grid", "per_example", "recovered"):
            assert torch.equal(out[root, "residual_input", name], one[root, "residual_input"])
        assert torch.equal(out["clean", name], one["clean"])
    with torch.no_grad():
        shares = [model(**run).logits[:, -1].double().softmax(-1) for run in runs]
    for name, share in zip(("clean", "corrupted"), shares):
        torch.testing.assert_close(
            out[name, "share"].double(), share[:, 5] - share[:, 9], rtol=1e-4, atol=1e-6
        )
    listed = tg.activation_patching(
        model, *runs, metric=["kl", "logit"], answers=[5, 9], layers=1, progress=False
    )
    assert list(listed["grid", "residual_input"].keys()) == ["kl", "logit of 5", "logit of 9"]


def test_functions_may_read_any_output_and_have_to_give_a_number_a_row():
    bert, runs = models.bert(), pair()
    bare = bert.bert

    def pooled(hidden, example):
        assert hidden.shape[1:] == (5, models.WIDTH) and len(example) == len(hidden)
        return hidden.mean((1, 2))

    out = tg.activation_patching(bare, *runs, metric=pooled, output="last_hidden_state", **SETTINGS)
    whole = tg.activation_patching(
        bare, *runs, metric=lambda given: given.last_hidden_state.mean((1, 2)), output=None, **SETTINGS
    )
    with torch.no_grad():
        expected = bare(**runs[0]).last_hidden_state.mean((1, 2))
    torch.testing.assert_close(out["clean"], expected)
    torch.testing.assert_close(
        out["grid", "residual_input"], whole["grid", "residual_input"], rtol=1e-5, atol=1e-7
    )
    place = tg.activation_patching(bert, *runs, metric="logit", answers=5, logits_at=1, **SETTINGS)
    with torch.no_grad():
        torch.testing.assert_close(place["clean"], bert(**runs[0]).logits[:, 1, 5])
    for given, match in (
        (
            {"metric": lambda x: x.mean()},
            r"expected to give one number a row, \(3,\) for \(3, 48\), gave \(\)",
        ),
        ({"metric": lambda x: x[:, :2]}, r"gave \(3, 2\)"),
        ({"metric": lambda x: [1.0] * len(x)}, "gave list"),
        ({"metric": lambda x: x[:, 0] * float("nan")}, "gave NaN"),
        ({"metric": lambda a, b, c: a}, "needs 3 arguments"),
        ({"metric": "kl", "output": None}, "are of logits, and output=None"),
        ({"metric": "kl", "answers": 5}, "answers= was given, and no metric asks for them"),
        ({"metric": "logit_diff", "answers": 5}, "a difference of two. Remedy: metric='logit'"),
        ({"metric": {}}, "names no metric"),
        ({"metric": {"a": "acc"}}, "'logit_diff', 'logit', 'probability', 'kl', a function"),
        ({"metric": "kl", "logits_at": "all"}, "logits_at='all' is one position of each example"),
        ({"metric": "kl", "rows": 0}, "rows= is how many rows a pass has"),
    ):
        with pytest.raises(ValueError, match=match):
            tg.activation_patching(bert, *runs, **{**SETTINGS, **given})

    def with_default(logits, token=5):  # not example indices
        return logits[:, token]

    own = tg.activation_patching(bert, *runs, metric=with_default, **SETTINGS)
    named = tg.activation_patching(bert, *runs, metric="logit", answers=5, **SETTINGS)
    assert torch.equal(own["grid", "residual_input"], named["grid", "residual_input"])
