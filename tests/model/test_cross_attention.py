"""Attention to another sequence has kinds of its own."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tensordict import TensorDict

import models
import tdgeom as tg
from models import VOCAB, WIDTH

KINDS = [
    "cross_attn_input", "cross_q", "cross_k", "cross_v", "cross_attn_scores", "cross_attn_pattern", "cross_z",
    "cross_head_output", "cross_attn_output",
]  # fmt: skip
STREAM = [
    "residual_input",
    "attn_output",
    "cross_attn_output",
    "mlp_output",
    "residual_mid",
    "residual_output",
]


def mbart():
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in
             (("layers", 2), ("attention_heads", 4), ("ffn_dim", 24))}  # fmt: skip
    config = tf.MBartConfig(
        vocab_size=VOCAB, d_model=WIDTH, max_position_embeddings=64, pad_token_id=0, init_std=0.3, **sizes
    )
    return models._seeded(tf.MBartForConditionalGeneration, config)


def bert():
    config = tf.BertConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, is_decoder=True,
        add_cross_attention=True, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    encoder = tf.BertConfig(vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                            pad_token_id=0)  # fmt: skip
    both = tf.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, config)
    both.decoder_start_token_id = both.pad_token_id = 0
    return models._seeded(tf.EncoderDecoderModel, both)


BUILDERS = {"t5": models.t5, "mbart": mbart, "bert": bert}


@pytest.fixture(params=BUILDERS)
def pair(request):
    batch = {**models.text_batch(), "decoder_input_ids": models.text_batch()["input_ids"][:, 1:5]}
    return request.param, BUILDERS[request.param](), batch


def test_what_is_read(pair):
    name, model, batch = pair
    model.set_attn_implementation("eager")
    stack = "decoder"
    acts = tg.Capture(model, [f"{stack}.{kind}" for kind in KINDS])(TensorDict(batch))["acts"]
    with torch.no_grad():
        reported = model(**batch, output_attentions=True).cross_attentions
    for layer, pattern in enumerate(reported):
        read = {kind: acts[f"{stack}.{kind}.{layer}"] for kind in KINDS}
        torch.testing.assert_close(read["cross_attn_pattern"], pattern)
        torch.testing.assert_close(read["cross_attn_scores"].softmax(-1), pattern)
        assert read["cross_q"].shape[:3] == (3, 4, 4) and read["cross_k"].shape[:3] == (3, 7, 4)
        z = torch.einsum("bhqk,bkhd->bqhd", pattern, read["cross_v"])
        torch.testing.assert_close(read["cross_z"], z, rtol=1e-4, atol=1e-5)
        scale = 1.0 if name == "t5" else read["cross_q"].shape[-1] ** -0.5
        scores = torch.einsum("bqhd,bkhd->bhqk", read["cross_q"], read["cross_k"]) * scale
        attended = batch["attention_mask"].bool()[:, None, None].expand_as(scores)
        torch.testing.assert_close(
            scores[attended], read["cross_attn_scores"][attended], rtol=1e-3, atol=1e-4
        )
        rest = read["cross_head_output"].sum(2) - read["cross_attn_output"]
        torch.testing.assert_close(rest, rest[:1, :1].expand_as(rest), rtol=1e-3, atol=1e-4)  # less the bias
    assert not any(
        e.site.kind.startswith("cross") for e in tg.available_sites(model) if e.site.stack == "encoder"
    )


def test_it_is_added_to_the_stream(pair):
    name, model, batch = pair
    if name == "bert":  # normalises behind every part
        return
    acts = tg.Capture(model, [f"decoder.{kind}" for kind in STREAM])(TensorDict(batch))["acts"]
    before, own, cross, mlp, middle, after = (acts[f"decoder.{kind}.1"] for kind in STREAM)
    torch.testing.assert_close(before + own + cross, middle, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(middle + mlp, after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kind", ["cross_attn_output", "cross_z", "cross_head_output", "cross_attn_pattern", "cross_v"]
)
def test_edits(pair, kind):
    """Zeros there are an attention that gives its output projection's bias."""
    _, model, batch = pair
    capture = tg.Capture(model, "decoder.cross_attn_output.1")
    with torch.no_grad():
        plain = model(**batch).logits
        with tg.Intervene(model, {f"decoder.{kind}.1": tg.Scale(0.0)}), capture as calls:
            edited = model(**batch).logits
    out = calls[0]["acts", "decoder.cross_attn_output.1"]
    torch.testing.assert_close(out, out[:1, :1].expand_as(out))
    assert (edited - plain).abs().max() > 1e-4


def test_positions_of_the_other_sequence_are_not_guessed():
    model, batch = models.t5(), {**models.text_batch(), "decoder_input_ids": models.text_batch()["input_ids"]}
    for site, edit in (
        ("decoder.cross_k.1", tg.Scale(0.0, positions="last")),
        ("decoder.cross_v.1", tg.Scale(0.0, positions=[1])),
        ("decoder.cross_attn_pattern.1", tg.BlockAttention(queries="last", keys=0)),
    ):
        with (
            torch.no_grad(),
            tg.Intervene(model, {site: edit}),
            pytest.raises(ValueError, match="the other sequence, whose mask and tokens"),
        ):
            model(**batch)
    with (
        torch.no_grad(),
        tg.Intervene(model, {"decoder.cross_attn_pattern.1": tg.BlockAttention(queries="last")}),
    ):
        model(**batch)
