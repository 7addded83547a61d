"""Blocks and their parts are found from structure, and the numbers read there add up."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tensordict import TensorDict
from torch import nn

import models
from tdgeom.model.calls.checked_sites import available_sites
from tdgeom.model.capture import Capture
from tdgeom.model.structure.blocks import find_stacks

KINDS = ["embed", "residual_input", "attn_input", "attn_output", "mlp_input", "mlp_output", "residual_output"]
POST_NORM = {"bert", "roberta", "distilbert"}
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def batch_for(name):
    if name == "vit":
        return {"pixel_values": IMAGES}
    batch = models.text_batch()
    return {"input_ids": batch["input_ids"]} if name == "image_gpt" else batch


@pytest.fixture(params=[*models.TEXT_MODELS, *models.IMAGE_MODELS])
def architecture(request):
    name = request.param
    return name, {**models.TEXT_MODELS, **models.IMAGE_MODELS}[name](), batch_for(name)


def test_the_residual_stream(architecture):
    name, model, batch = architecture
    # one family adds its attention output to its MLP output in place
    acts = Capture(model, KINDS, clone=name == "falcon")(TensorDict(batch))["acts"]
    hidden = model(**batch, output_hidden_states=True).hidden_states
    torch.testing.assert_close(acts["embed"], acts["residual_input.0"], rtol=0, atol=0)
    for layer in range(models.DEPTH):
        read = {kind: acts[f"{kind}.{layer}"] for kind in KINDS[1:]}
        assert {tuple(value.shape) for value in read.values()} == {tuple(hidden[0].shape)}
        assert len(hidden[0]) == 3
        torch.testing.assert_close(read["residual_input"], hidden[layer], rtol=0, atol=0)
        if layer + 1 < models.DEPTH:
            torch.testing.assert_close(
                read["residual_output"], acts[f"residual_input.{layer + 1}"], rtol=0, atol=0
            )
        assert read["attn_output"].norm() > 1e-2 * read["residual_input"].norm()  # so that the sum can fail
        assert read["mlp_output"].norm() > 1e-2 * read["residual_input"].norm()
        if name not in POST_NORM:
            total = read["residual_input"] + read["attn_output"] + read["mlp_output"]
            torch.testing.assert_close(read["residual_output"], total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("bert", "attention.output.LayerNorm", "output.LayerNorm"),
        ("roberta", "attention.output.LayerNorm", "output.LayerNorm"),
        ("distilbert", "sa_layer_norm", "output_layer_norm"),
    ],
)
def test_post_norm_blocks_normalise_the_sum(name, first, second):
    model = models.TEXT_MODELS[name]()
    acts = Capture(model, KINDS)(TensorDict(models.text_batch()))["acts"]
    for layer, block in enumerate(find_stacks(model)[0].blocks):
        one, two = block.module.get_submodule(first), block.module.get_submodule(second)
        middle = one(acts[f"residual_input.{layer}"] + acts[f"attn_output.{layer}"])
        torch.testing.assert_close(acts[f"mlp_input.{layer}"], middle)
        torch.testing.assert_close(
            acts[f"residual_output.{layer}"], two(middle + acts[f"mlp_output.{layer}"])
        )


@pytest.mark.parametrize(
    ("name", "before_attention", "before_mlp"),
    [
        ("gpt2", "ln_1", "ln_2"),
        ("llama", "input_layernorm", "post_attention_layernorm"),
        ("gemma3", "input_layernorm", "pre_feedforward_layernorm"),
        ("opt", "self_attn_layer_norm", "final_layer_norm"),
        ("esm", "attention.LayerNorm", "LayerNorm"),
    ],
)
def test_inputs_are_what_comes_out_of_the_norm(name, before_attention, before_mlp):
    model = models.TEXT_MODELS[name]()
    acts = Capture(model, KINDS)(TensorDict(models.text_batch()))["acts"]
    block = find_stacks(model)[0].blocks[1].module
    one, two = block.get_submodule(before_attention), block.get_submodule(before_mlp)
    torch.testing.assert_close(acts["attn_input.1"], one(acts["residual_input.1"]))
    torch.testing.assert_close(acts["mlp_input.1"], two(acts["residual_input.1"] + acts["attn_output.1"]))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "gemma2", "phi", "esm", "opt", "bloom", "vit"])
def test_final_norm_is_the_last_hidden_state(name):
    model = {**models.TEXT_MODELS, **models.IMAGE_MODELS}[name]()
    batch = batch_for(name)
    acts = Capture(model, "final_norm")(TensorDict(batch))["acts"]
    expected = model.base_model(**batch).last_hidden_state
    torch.testing.assert_close(acts["final_norm"], expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta"])
def test_a_head_s_norm_is_not_the_final_norm(name):
    kinds = {entry.site.kind for entry in available_sites(models.TEXT_MODELS[name]())}
    assert "final_norm" not in kinds


def test_both_stacks_of_t5():
    model, batch = models.t5(), models.text_batch()
    kinds = ["residual_input", "attn_output", "mlp_output", "residual_output", "final_norm"]
    labels = batch["input_ids"][:, :5].contiguous()
    capture = Capture(model, kinds)
    acts = capture(TensorDict({**batch, "labels": labels}))["acts"]
    with torch.no_grad():
        out = model(**batch, labels=labels, output_hidden_states=True)
    for layer in range(models.DEPTH):
        total = sum(acts[f"encoder.{kind}.{layer}"] for kind in kinds[:3])
        torch.testing.assert_close(acts[f"encoder.residual_output.{layer}"], total, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(acts[f"encoder.residual_input.{layer}"], out.encoder_hidden_states[layer])
        torch.testing.assert_close(acts[f"decoder.residual_input.{layer}"], out.decoder_hidden_states[layer])
    torch.testing.assert_close(acts["encoder.final_norm"], out.encoder_last_hidden_state)
    assert acts["decoder.final_norm"].shape == (3, 5, models.WIDTH)
    stacks = [site.stack for site in capture.sites]
    assert stacks == sorted(stacks, reverse=True)  # the encoder runs first
    bare = Capture(tf.T5EncoderModel(model.config), "residual_input")
    assert bare.sites == ["residual_input.0", "residual_input.1", "residual_input.2"]


def test_t5_without_decoder_inputs():
    model, batch = models.t5(), models.text_batch()
    acts = Capture(model, "encoder.residual_output")(TensorDict(batch))["acts"]
    assert len(acts.keys()) == models.DEPTH
    with pytest.raises(ValueError, match="decoder_input_ids.*labels.*encoder sites"):
        Capture(model, "residual_output")(TensorDict(batch))
    given = {**batch, "decoder_input_ids": batch["input_ids"][:, :4]}
    acts = Capture(model, "decoder.residual_output")(TensorDict(given))["acts"]
    assert acts["decoder.residual_output.0"].shape == (3, 4, models.WIDTH)


def test_router_logits_keep_batch_and_position():
    model, batch = models.mixtral(), models.text_batch()
    capture = Capture(model, "router_logits")
    acts = capture(TensorDict(batch))["acts"]
    out = model(**batch, output_router_logits=True)
    for layer in range(models.DEPTH):
        assert acts[f"router_logits.{layer}"].shape == (3, 7, 4)
        torch.testing.assert_close(acts[f"router_logits.{layer}"].flatten(0, 1), out.router_logits[layer])
    assert capture.module_paths["router_logits.1"] == "model.layers.1.mlp.gate"


def test_a_single_layer_is_still_a_stack():
    for build in (models.llama, models.mixtral):
        model = build(num_hidden_layers=1)
        assert Capture(model, "residual_input").module_paths == {"residual_input.0": "model.layers.0"}


@pytest.mark.parametrize("groups", [1, 2])
def test_shared_blocks_are_one_layer_a_call(groups):
    model = models.albert(num_hidden_layers=4, num_hidden_groups=groups)
    batch = models.text_batch()
    capture = Capture(model, ["residual_input", "residual_output"])
    acts = capture(TensorDict(batch))["acts"]
    hidden = model(**batch, output_hidden_states=True).hidden_states
    for layer in range(4):
        torch.testing.assert_close(acts[f"residual_input.{layer}"], hidden[layer], rtol=0, atol=0)
        torch.testing.assert_close(acts[f"residual_output.{layer}"], hidden[layer + 1], rtol=0, atol=0)


# ------------------------------------------------------------------------------------ plain modules


class Wrapped(nn.Module):
    """A block that returns a tuple and is called by keyword."""

    def __init__(self, width=4):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, *, scale=None, hidden_states):
        return hidden_states + self.linear(hidden_states), None


class Custom(nn.Module):
    """Blocks in a ModuleList, experts and heads beside them."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(5)])
        self.stages = nn.ModuleList([Wrapped() for _ in range(3)])
        self.heads = nn.ModuleList([nn.Linear(4, 2) for _ in range(6)])
        self.seen = []

    def forward(self, x, mask=None, shift=0.0):
        self.seen.append(mask)
        for stage in self.stages:
            x = stage(hidden_states=x)[0]
        return [head(x) for head in self.heads]


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(3)])

    def forward(self, x):
        return sum(w[..., None] * e(x) for w, e in zip(self.gate(x).unbind(-1), self.experts, strict=True))


def test_keyword_calls_and_tuples():
    model, x = Custom(), torch.randn(3, 5, 4)
    capture = Capture(model, ["residual_input", "residual_output"])
    acts = capture(TensorDict({"x": x, "mask": torch.ones(3)}))["acts"]
    assert capture.in_keys == ["x", "mask", "shift"] and capture.optional_in_keys == ["mask", "shift"]
    assert model.seen[-1] is not None
    assert [e.path for e in find_stacks(model)[0].blocks] == ["stages.0", "stages.1", "stages.2"]
    for layer in range(3):
        torch.testing.assert_close(acts[f"residual_input.{layer}"], x)
        x = model.stages[layer](hidden_states=x)[0].detach()
        torch.testing.assert_close(acts[f"residual_output.{layer}"], x)


def test_experts_are_never_blocks():
    assert find_stacks(Experts()) == []


def test_a_sequential_of_linear_layers():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(3, 4)
    acts = Capture(model, "residual_output")(TensorDict({"input": x}))["acts"]
    for layer, end in enumerate((1, 3, 5)):
        torch.testing.assert_close(acts[f"residual_output.{layer}"], model[:end](x).detach())


def test_a_block_listed_twice_is_two_layers():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Linear(4, 4), shared)
    x = torch.randn(3, 4)
    acts = Capture(model, "residual_output")(TensorDict({"input": x}))["acts"]
    for layer in range(3):
        torch.testing.assert_close(acts[f"residual_output.{layer}"], model[: layer + 1](x).detach())


def test_torch_s_own_encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(8), enable_nested_tensor=False).eval()
    x = torch.randn(3, 5, 8)
    acts = Capture(model, [*KINDS, "final_norm"])(TensorDict({"src": x}))["acts"]
    for i in range(3):
        total = acts[f"residual_input.{i}"] + acts[f"attn_output.{i}"] + acts[f"mlp_output.{i}"]
        torch.testing.assert_close(acts[f"residual_output.{i}"], total)
    torch.testing.assert_close(acts["final_norm"], model(x).detach())


class Scaled(nn.Module):
    """Its MLP output passes through a module that no rule knows before it is added."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
        self.mystery = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.mystery(self.mlp(x))


def test_an_output_that_is_transformed_before_it_is_added_is_refused():
    model = nn.Sequential(Scaled(), Scaled())
    batch = {"input": torch.randn(3, 4)}
    with pytest.raises(RuntimeError, match=r"Remedy: sites='module_output:0\.mystery'"):
        Capture(model, "mlp_output")(TensorDict(batch))
    acts = Capture(model, ["module_output:*.mystery", "residual_input", "residual_output"])(
        TensorDict(batch)
    )["acts"]
    total = acts["residual_input.1"] + acts["module_output:1.mystery"]
    torch.testing.assert_close(acts["residual_output.1"], total)
