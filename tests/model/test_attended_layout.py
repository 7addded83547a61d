"""Runs padded differently: what is taken from another run lands on the same tokens, keys of patterns included."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

import models
import tdgeom as tg
from tdgeom.model.calls.model_inputs import position_ids
from tdgeom.model.capture import Capture
from tdgeom.model.intervene import Intervene

TEXTS = [
    torch.randint(4, models.VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in (7, 4, 3, 5)
]


def padded(texts, side, width):
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        where = slice(width - len(text), width) if side == "left" else slice(0, len(text))
        ids[row, where], mask[row, where] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def logits(model, batch):
    with torch.no_grad():
        out = model(**batch, position_ids=position_ids(batch["attention_mask"])).logits
    return out[batch["attention_mask"].bool()]


@pytest.mark.parametrize("kind", ["attn_pattern", "attn_scores", "z", "k", "residual_mid"])
@pytest.mark.parametrize("width", [7, 9])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_run_patched_with_itself_padded_on_the_other_side(name, kind, width):
    model = models.TEXT_MODELS[name]()
    own = Capture(model, kind)(TensorDict(padded(TEXTS[:3], "left", 7)))
    batch = padded(TEXTS[:3], "right", width)
    expected = logits(model, batch)
    with Intervene(model, {kind: tg.Patch(own)}):
        torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-5)


def test_a_decoder_is_matched_by_padding_of_its_own():
    """As many decoder tokens as prompt tokens: the prompt's padding says nothing of them."""
    model = models.t5()
    batch = {**padded(TEXTS[:3], "right", 7), "decoder_input_ids": models.text_batch()["input_ids"]}
    with torch.no_grad():
        expected = model(**batch).logits
    for kind in ("decoder.residual_output", "decoder.attn_pattern", "encoder.z"):
        own = Capture(model, kind)(TensorDict(batch))
        with torch.no_grad(), Intervene(model, {kind: tg.Patch(own)}):
            found = model(**batch).logits
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max(), kind


def test_attention_to_positions_that_are_not_there_is_refused():
    model = models.bert()
    longer = Capture(model, ["attn_pattern", "attn_scores"])(TensorDict(padded(TEXTS[:1], "right", 7)))
    batch = padded(TEXTS[3:], "right", 7)
    for kind in ("attn_pattern", "attn_scores"):
        with (
            pytest.raises(ValueError, match="attends to positions that this run does not have.*one length"),
            Intervene(model, {kind: tg.Patch(longer, positions="first")}),
        ):
            logits(model, batch)


def test_a_step_with_a_cache_takes_the_keys_of_the_other_run():
    model, text = models.llama(), TEXTS[0][None]
    own = Capture(model, "attn_pattern")(TensorDict({"input_ids": text}))
    with torch.no_grad():
        start = model(text[:, :-1], use_cache=True).past_key_values
        expected = model(text).logits[:, -1]
        with Intervene(model, {"attn_pattern": tg.Patch(own, positions="last")}):
            found = model(text[:, -1:], past_key_values=start).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_resampling_never_takes_padding(side):
    """Each sequence gets another one's values by rank; a shorter one is gone through again."""
    batch = padded(TEXTS[:3], side, 8)
    mask = batch["attention_mask"]
    value = torch.where(mask.bool(), batch["input_ids"], -1)[..., None].float()
    new = tg.Ablate("resample")(activation=value, attention_mask=mask)[..., 0]
    rows = [new[row][mask[row].bool()].long().tolist() for row in range(3)]
    texts = [text.tolist() for text in TEXTS[:3]]
    shift = next(s for s in (1, 2) if rows[0][0] == texts[-s][0])
    for row, found in enumerate(rows):
        drawn = texts[row - shift]
        assert found == [drawn[place % len(drawn)] for place in range(len(found))]
    reference = TensorDict({("acts", "x"): value[:1], "attention_mask": mask[:1]})
    edit = tg.Ablate("resample", reference=reference)
    td = TensorDict({"activation": torch.zeros(3, 5, 1), "attention_mask": torch.ones(3, 5)})
    td.set_non_tensor("site", "x")
    assert edit(td)["activation"][..., 0].long().tolist() == [texts[0][:5]] * 3


def test_resampled_patterns_stay_patterns():
    model, batch = models.llama(), padded(TEXTS[:3], "left", 8)
    keep = batch["attention_mask"].bool()
    with Intervene(model, {"attn_pattern": tg.Ablate("resample")}), Capture(model, "attn_pattern") as calls:
        logits(model, batch)
    for layer in range(models.DEPTH):
        pattern = calls[0]["acts", f"attn_pattern.{layer}"].transpose(1, 2)
        torch.testing.assert_close(pattern.sum(-1)[keep], torch.ones(int(keep.sum()), 4))
        assert float(pattern.masked_fill(keep[:, None, None], 0)[keep].abs().max()) == 0.0


@pytest.mark.parametrize("kind", ["z", "attn_pattern"])
@pytest.mark.parametrize("sides", [("right", "left"), ("left", "right"), ("left", "left")])
def test_the_grid_of_heads_equals_pairs_of_unequal_length_one_by_one(kind, sides):
    model, clean, corrupted = models.llama(), TEXTS[:3], [TEXTS[3], TEXTS[1].flip(0), TEXTS[0].flip(0)[:6]]
    found = tg.activation_patching(
        model,
        padded(clean, sides[0], 8),
        padded(corrupted, sides[1], 7),
        kind,
        answers=(5, 6),
        align="start",
        progress=False,
    )["per_example", kind]
    for row, (one, other) in enumerate(zip(clean, corrupted)):
        acts = Capture(model, kind)(TensorDict({"input_ids": one[None]}))["acts"]
        both = min(len(one), len(other))
        for layer in range(models.DEPTH):
            theirs = acts[f"{kind}.{layer}"]
            for head in range(4):

                def patch(value, theirs=theirs, head=head, both=both):
                    value = value.clone()
                    if kind == "z":  # positions that the clean run lacks stay as they are
                        value[:, :both, head] = theirs[:, :both, head]
                    else:
                        value[:, head, :both] = 0
                        value[:, head, :both, :both] = theirs[:, head, :both, :both]
                    return value

                with torch.no_grad(), Intervene(model, {f"{kind}.{layer}": patch}):
                    last = model(other[None]).logits[0, -1].double()
                torch.testing.assert_close(found[layer, head, row], last[5] - last[6], rtol=1e-4, atol=1e-5)
