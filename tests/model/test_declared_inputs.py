"""Every key that is read is in ``in_keys``: what follows them loses nothing."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential

import models
import tdgeom as tg

IDS = models.text_batch()["input_ids"]
MASK = torch.ones_like(IDS)
MASK[0, :3] = MASK[1, :2] = 0
SPECIAL = torch.zeros_like(IDS)
SPECIAL[:, 4] = 1


def everything(**further):
    """A batch with all that a model or a stage could look for, padded on the left."""
    types = torch.arange(7).ge(4).long().expand(3, 7).contiguous()
    entries = {
        "input_ids": IDS, "attention_mask": MASK, "token_type_ids": types, "special_tokens_mask": SPECIAL,
        "labels": IDS.roll(1, 1), "sequence_id": torch.arange(3), "unrelated": torch.ones(3),
    }  # fmt: skip
    return TensorDict({**entries, **further})


def bert():
    model = models.bert()
    return tg.Capture(model, ["residual_output", "attn_pattern"])


def gpt2():
    return tg.Capture(models.gpt2(), "residual_output", model_outputs="logits")


def t5():
    return tg.Capture(models.t5(), "residual_output")


def edited():
    """An edit at special tokens, one at positions, and one that takes another run's activations from the batch."""
    basis = torch.linspace(-1, 1, models.WIDTH)
    edits = {
        "residual_output.0": [tg.Steer(basis, positions="special"), tg.Scale(0.5, positions="last-1")],
        "residual_output.1": [
            tg.Patch(key="other", positions="first"),
            tg.Steer(basis, positions=slice(1, 3)),
        ],
    }
    return tg.Intervene(models.llama(), edits)


def reduced():
    capture = tg.Capture(models.llama(), ["residual_output.1", "attn_pattern.1"])
    special = {"special": "special", "last": "last"}
    return TensorDictSequential(
        capture,
        tg.AggregateActs(["residual_output.1"], positions="special", reduce="mean"),
        tg.GroupAttention(["attn_pattern.1"], special, {"first": "first", "rest": "patches"}),
    )


def decoded():
    capture = tg.Capture(models.t5(), ["encoder.residual_output.1", "decoder.residual_output.1"])
    return TensorDictSequential(capture, tg.AggregateActs(capture.sites, reduce="mean"))


OTHER = TensorDict({"input_ids": IDS.flip(0).contiguous(), "attention_mask": MASK.flip(0).contiguous()})
DECODER = MASK.flip(1).contiguous()
MADE = {
    # what it is, what else the batch holds, which of its entries change the numbers
    "bert": (bert, {}, ["attention_mask", "token_type_ids"]),
    "gpt2": (gpt2, {}, ["attention_mask", "token_type_ids"]),
    "t5": (t5, {}, ["attention_mask", "labels"]),
    "edited": (edited, {"other": OTHER}, ["attention_mask", "special_tokens_mask"]),
    "reduced": (reduced, {}, ["attention_mask", "special_tokens_mask"]),
    "decoded": (decoded, {"decoder_attention_mask": DECODER}, ["attention_mask", "decoder_attention_mask", "labels"]),
}  # fmt: skip


def leaves(stage, td):
    out = stage(td)
    return [out.get(key) for key in stage.out_keys]


@pytest.mark.parametrize("name", MADE)
def test_nothing_is_read_that_is_not_declared(name):
    make, further, matter = MADE[name]
    stage, td = make(), everything(**further)
    expected = leaves(stage, td.copy())
    needed = td.select(*stage.in_keys, strict=False)
    for one, other in zip(leaves(stage, needed.copy()), expected, strict=True):
        assert torch.equal(one, other)
    for key in matter:  # and what is declared does something
        assert key in stage.in_keys
        try:
            found = leaves(stage, td.exclude(key))
        except (ValueError, KeyError, RuntimeError):
            continue  # needed, and said so
        assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["bert", "gpt2", "reduced", "decoded"])
def test_a_sequence_around_it_keeps_what_is_optional(name):
    make, further, matter = MADE[name]
    stage, td = make(), everything(**further)
    expected = leaves(stage, td.copy())
    sequence = TensorDictSequential(stage)
    given = {key: td[key] for key in sequence.in_keys if key in td.keys()}
    by_keyword = sequence(**given)
    for one, other in zip(
        by_keyword if isinstance(by_keyword, tuple) else [by_keyword], expected, strict=True
    ):
        assert torch.equal(one, other)
    # a stage that makes the mask stays in front of those that read it
    mask = TensorDictModule(
        lambda ids, mask: mask * (ids != -1).long(), ["input_ids", "raw_mask"], ["attention_mask"]
    )
    whole = TensorDictSequential(mask, stage)
    raw = td.exclude("attention_mask").set("raw_mask", MASK)
    for part in (
        whole.select_subsequence(out_keys=stage.out_keys),
        whole.select_subsequence(in_keys=list(raw.keys())),
    ):
        assert len(list(part)) == 2
        for one, other in zip(leaves(stage, part[0](raw.copy())), expected, strict=True):
            assert torch.equal(one, other)
    assert set(matter) - {"attention_mask"} <= set(sequence.in_keys)


def test_only_the_main_input_must_be_there():
    capture = tg.Capture(models.llama(), "residual_output.1")
    assert [key for key in capture.in_keys if key not in capture.optional_in_keys] == ["input_ids"]
    embedded = models.llama().model.embed_tokens(IDS).detach()
    by_embedding = tg.Capture(models.llama(), "residual_output.1", in_keys=["inputs_embeds"])
    assert "input_ids" in by_embedding.optional_in_keys
    expected = capture(input_ids=IDS, attention_mask=MASK)
    assert torch.equal(by_embedding(inputs_embeds=embedded, attention_mask=MASK), expected)
    held = tg.Capture(models.llama(), "residual_output.1", withhold=["attention_mask", "position_ids"])
    assert {"attention_mask", "position_ids"}.isdisjoint(held.in_keys)
    assert torch.equal(held(everything())["acts", "residual_output.1"], capture(input_ids=IDS))
    flags = {"use_cache", "past_key_values", "return_dict", "output_attentions", "labels", "sequence_id"}
    assert flags.isdisjoint(capture.in_keys)
