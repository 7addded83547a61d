"""Positions by token id at parts of a model that are called with embeddings: the calls around know the ids."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tensordict import TensorDict
from torch import nn

import models
import tdgeom as tg

SITE = "language_model.residual_output.0"
IMAGE, PIVOT = 5, 50


def tokens() -> torch.Tensor:
    ids = torch.randint(10, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    ids[:, 1:5], ids[0, 6], ids[1, 7] = IMAGE, PIVOT, PIVOT
    return ids


@pytest.fixture(scope="module")
def pictures():
    torch.manual_seed(0)
    text = dict(
        model_type="llama",
        vocab_size=97,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    vision = dict(
        model_type="clip_vision_model",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=8,
    )
    config = tf.LlavaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
    return tf.LlavaForConditionalGeneration(config).eval()


def steered(model, site, positions, call):
    """Which positions an edit moves, call by call."""

    def read():
        with torch.no_grad(), tg.Capture(model, site) as calls:
            call(model)
        return [one["acts", site] for one in calls if "acts" in one.keys()]

    before = read()
    edit = tg.Steer(torch.full((before[0].shape[-1],), 9.0), positions=positions)
    with tg.Intervene(model, {site: edit}):
        after = read()
    return [((new - old).abs().amax(-1) > 1).tolist() for old, new in zip(before, after)]


def test_a_language_model_behind_images_is_steered_where_the_outer_ids_say(pictures):
    ids, pixels = tokens(), torch.randn(2, 3, 8, 8)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    whole = lambda model: model(**batch)
    assert steered(pictures, SITE, tg.SpecialTokens((IMAGE,)), whole) == [(ids == IMAGE).tolist()]
    after = ids.eq(PIVOT).cumsum(1).bool() & (ids != PIVOT)
    assert steered(pictures, SITE, tg.Between(PIVOT, None), whole) == [after.tolist()]
    text = lambda model: model(input_ids=ids.where(ids != IMAGE, ids.new_tensor(8)))
    assert steered(pictures, SITE, tg.SpecialTokens((8,)), text) == [(ids == IMAGE).tolist()]
    with pytest.raises(ValueError, match="places are those of an image"):
        steered(pictures, "vision_tower.residual_output.0", tg.SpecialTokens((IMAGE,)), whole)
    inner = lambda model: model.model.language_model(inputs_embeds=torch.randn(2, 9, 16))
    with pytest.raises(ValueError, match="none that are known to be those of this site"):
        steered(pictures, SITE, tg.SpecialTokens((IMAGE,)), inner)


def test_every_step_of_generate_knows_the_pivot_of_its_prompt(pictures):
    ids = tokens()
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 3, 8, 8),
    }
    more = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    moved = steered(pictures, SITE, tg.Between(PIVOT, None), lambda model: model.generate(**batch, **more))
    assert [len(one[0]) for one in moved] == [9, 1, 1] and all(one == [[True], [True]] for one in moved[1:])
    after = ids.eq(PIVOT).cumsum(1).bool() & (ids != PIVOT)
    assert moved[0] == after.tolist()


class Embeds(nn.Module):
    """Calls a model with embeddings of its own making."""

    def __init__(self, inner, change):
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, input_ids, attention_mask=None):
        embeds = self.change(self.inner.get_input_embeddings()(input_ids))
        if attention_mask is not None and embeds.shape[1] > input_ids.shape[1]:
            front = attention_mask.new_ones(len(embeds), embeds.shape[1] - input_ids.shape[1])
            attention_mask = torch.cat([front, attention_mask], 1)
        return self.inner(inputs_embeds=embeds, attention_mask=attention_mask)


def soft_prompt(embeds):
    return torch.cat([embeds.new_full((len(embeds), 2, embeds.shape[2]), 0.3), embeds], 1)


@pytest.mark.parametrize(
    "change", [lambda e: e, lambda e: 4 * e, soft_prompt], ids=["same", "scaled", "prompt"]
)
def test_embeddings_of_a_wrapper_are_known_by_the_ids_they_are_of(change):
    inner, ids = models.llama(), models.text_batch()["input_ids"]
    ids[0, 3] = ids[2, 5] = wanted = 30
    width = change(torch.zeros(1, 7, 1)).shape[1]
    right = nn.functional.pad(ids == wanted, (width - ids.shape[1], 0))
    call = lambda model: model(ids, torch.ones_like(ids))
    place = "module_output:inner.model.layers.0"
    assert steered(Embeds(inner, change), place, tg.SpecialTokens((wanted,)), call) == [right.tolist()]


@pytest.mark.parametrize("change", [lambda e: e.flip(1), lambda e: e[:, :-1], lambda e: torch.randn_like(e)])
def test_embeddings_of_other_tokens_are_refused(change):
    inner, ids = models.llama(), models.text_batch()["input_ids"]
    with pytest.raises(ValueError, match="none that are known to be those of this site"):
        steered(
            Embeds(inner, change),
            "module_output:inner.model.layers.0",
            tg.SpecialTokens((int(ids[0, 0]),)),
            lambda model: model(ids),
        )


def test_each_side_of_an_encoder_decoder_has_its_own_ids():
    model, ids = models.t5(), models.text_batch()["input_ids"]
    own, other = ids.clone(), ids.flip(1).clone()
    own[:, 2], other[:, 4] = 41, 41
    batch = {"input_ids": own, "attention_mask": torch.ones_like(own), "decoder_input_ids": other}
    wanted = tg.SpecialTokens((41,))
    for site, ids in (("encoder.residual_output.0", own), ("decoder.residual_output.0", other)):
        assert steered(model, site, wanted, lambda model: model(**batch)) == [(ids == 41).tolist()]
        td = tg.Capture(model, site)(TensorDict(batch))
        rows = tg.SelectTokens([site], positions=wanted)(td.copy())
        here = (ids == 41).nonzero()
        assert rows["row_id"].tolist() == ((here[:, 0] << 20) + here[:, 1]).tolist()
        reduced = tg.AggregateActs([site], positions=wanted, reduce="sum")(td.copy())["acts", site]
        expected = (td["acts", site] * (ids == 41)[..., None]).sum(1)
        torch.testing.assert_close(reduced, expected)
    # keys of the cross-attention lie at the encoder's tokens
    td = tg.Capture(model, "decoder.cross_k.0")(TensorDict(batch))
    keys = tg.AggregateActs(["decoder.cross_k.0"], positions=wanted, reduce="sum")(td.copy())
    expected = (td["acts", "decoder.cross_k.0"] * (own == 41)[..., None, None]).sum(1)
    torch.testing.assert_close(keys["acts", "decoder.cross_k.0"], expected)


def test_ids_of_a_decoder_are_not_those_of_what_its_encoder_hears():
    sizes = dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)
    ids = dict(decoder_start_token_id=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = tf.WhisperConfig(
        vocab_size=97,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        num_mel_bins=4,
        max_source_positions=10,
        **sizes,
        **ids,
    )
    model, spoken = tf.WhisperForConditionalGeneration(config).eval(), torch.randint(10, 97, (2, 10))
    call = lambda model: model(input_features=torch.randn(2, 4, 20), decoder_input_ids=spoken)
    wanted = tg.SpecialTokens((int(spoken[0, 3]),))
    with pytest.raises(ValueError, match="none that are known to be those of this site"):
        steered(model, "encoder.residual_output.0", wanted, call)


def test_a_padded_batch_of_images_is_captured_after_a_call_too(pictures):
    """The hooks with which the library collects hidden states stay while positions are checked: the tower is read by them."""
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 8, 8)}
    with torch.no_grad():
        pictures(**batch)
        read = tg.Capture(pictures, SITE)(TensorDict(batch))["acts", SITE]
        with tg.Capture(pictures, SITE) as calls:
            pictures(**batch)
    torch.testing.assert_close(read[mask.bool()], calls[0]["acts", SITE][mask.bool()])
