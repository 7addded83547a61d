"""The stream is found by what is handed on: lists of parts, shared groups, blocks of two streams."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tensordict import TensorDict
from torch import nn

import models
import tdgeom as tg
from models import VOCAB, WIDTH


def xlm():
    return tf.XLMWithLMHeadModel(
        tf.XLMConfig(vocab_size=VOCAB, emb_dim=WIDTH, n_layers=3, n_heads=4, max_position_embeddings=64)
    )


def flaubert():
    config = tf.FlaubertConfig(
        vocab_size=VOCAB, emb_dim=WIDTH, n_layers=3, n_heads=4, max_position_embeddings=64, pre_norm=True
    )
    return tf.FlaubertWithLMHeadModel(config)


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(x)


class Other(Part):
    pass


class Loop(nn.Module):
    """The block is written out in the model; names say nothing."""

    def __init__(self):
        super().__init__()
        self.ones, self.twos = (
            nn.ModuleList(Part() for _ in range(3)),
            nn.ModuleList(Other() for _ in range(3)),
        )

    def forward(self, x):
        for one, two in zip(self.ones, self.twos, strict=True):
            x = x + one(x)
            x = x + two(x)
        return x


@pytest.mark.parametrize("build", [xlm, flaubert])
def test_parts_in_parallel_lists_are_no_blocks(build):
    model = build().eval()
    assert tg.available_sites(model) == []
    for kind in ("residual_output", "attn_output", "residual_input.1"):
        with pytest.raises(ValueError, match="expected repeated blocks.*Remedy: name the module"):
            tg.Capture(model, kind)
    with pytest.raises(ValueError, match="no 'attn_input' site"):
        tg.hidden_state_sites(model)


def test_parts_can_be_named():
    ids = models.text_batch()["input_ids"]
    acts = tg.Capture(xlm().eval(), "module_output:transformer.attentions.*")(TensorDict({"input_ids": ids}))[
        "acts"
    ]
    assert len(acts.keys()) == 3


@pytest.mark.parametrize("form", ["module", "context"])
def test_lists_whose_names_say_nothing_are_told_by_the_first_call(form):
    model, x = Loop().eval(), torch.randn(2, 5, 8)
    capture = tg.Capture(model, "residual_output")
    with pytest.raises(
        RuntimeError, match="receives what the one before it gave: the stream runs outside of them"
    ):
        if form == "module":
            capture(TensorDict({"x": x}))
        else:
            with capture:
                model(x)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(("groups", "inner"), [(1, 1), (2, 1), (2, 2), (1, 2), (4, 1)])
def test_groups_of_shared_layers(groups, inner):
    """As many layers as states: four passes through a group, of one layer or two."""
    model = models.albert(num_hidden_layers=4, num_hidden_groups=groups, inner_group_num=inner)
    batch = models.text_batch()
    kinds = ["residual_input", "residual_output", "attn_pattern", "q"]
    acts = tg.Capture(model, kinds)(TensorDict(batch))["acts"]
    model.set_attn_implementation("eager")
    out = model(**batch, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 4 * inner + 1 and len(acts.keys()) == 4 * 4 * inner
    for layer in range(4 * inner):
        torch.testing.assert_close(acts[f"residual_input.{layer}"], out.hidden_states[layer])
        torch.testing.assert_close(acts[f"residual_output.{layer}"], out.hidden_states[layer + 1])
        torch.testing.assert_close(acts[f"attn_pattern.{layer}"], out.attentions[layer])


class TwoStreams(nn.Module):
    """As image models of two streams have them: text and image in, text and image out, in another order."""

    def __init__(self):
        super().__init__()
        self.ff, self.ff_context, self.mix = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden_states, encoder_hidden_states):
        both = self.mix(torch.cat([encoder_hidden_states, hidden_states], 1)).cumsum(1)
        text, image = both.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], 1)
        return encoder_hidden_states + self.ff_context(text), hidden_states + self.ff(image)


class Streams(nn.Module):
    def __init__(self, tokens=False):
        super().__init__()
        self.embed = nn.Embedding(20, 8) if tokens else nn.Identity()
        self.blocks = nn.ModuleList(TwoStreams() for _ in range(3))

    def run(self, image, text):
        for block in self.blocks:
            text, image = block(hidden_states=image, encoder_hidden_states=text)
        return image


class Tokens(Streams):
    def forward(self, input_ids):
        return self.run(self.embed(input_ids), self.embed(input_ids.flip(1)))


class Images(Streams):
    def forward(self, hidden_states, encoder_hidden_states):
        return self.run(hidden_states, encoder_hidden_states)


def test_the_stream_of_a_pair_is_what_the_next_block_receives():
    model, ids = Tokens(tokens=True).eval(), torch.arange(10).reshape(2, 5)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, a, out: seen.append(out[1].detach()))
    with torch.no_grad():
        model(ids)
    acts = tg.Capture(model, ["residual_input", "residual_output"])(TensorDict({"input_ids": ids}))["acts"]
    for layer in range(3):
        torch.testing.assert_close(acts[f"residual_output.{layer}"], seen[layer])
    torch.testing.assert_close(acts["residual_input.2"], seen[1])
    with torch.no_grad(), tg.Intervene(model, {"residual_output.2": tg.Scale(2.0)}):
        torch.testing.assert_close(model(ids), 2 * seen[2])


@pytest.mark.parametrize("form", ["module", "context"])
def test_a_pair_that_nobody_could_try_is_refused_in_words(form):
    model, given = (
        Images().eval(),
        {"hidden_states": torch.randn(2, 4, 8), "encoder_hidden_states": torch.randn(2, 3, 8)},
    )
    capture = tg.Capture(model, "residual_output", in_keys=list(given))
    with pytest.raises(
        RuntimeError, match=r"another part of what TwoStreams gives. Remedy: \"module_output:<path>\[1\]\""
    ):
        if form == "module":
            capture(TensorDict(given))
        else:
            with capture:
                model(**given)
    acts = tg.Capture(model, ["residual_input", "module_output:blocks.*[1]"], in_keys=list(given))(
        TensorDict(given)
    )["acts"]
    torch.testing.assert_close(acts["module_output:blocks.1[1]"], acts["residual_input.2"])
