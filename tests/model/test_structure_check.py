"""Where the structure misleads, the numbers of a tiny pass say so."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tensordict import TensorDict
from torch import nn

import models
from tdgeom.model.calls.verified import verified
from tdgeom.model.capture import Capture
from tdgeom.model.intervene import Intervene


def bigcode(multi_query):
    config = tf.GPTBigCodeConfig(
        vocab_size=models.VOCAB,
        n_embd=models.WIDTH,
        n_layer=2,
        n_head=4,
        n_positions=64,
        multi_query=multi_query,
    )
    return models._seeded(tf.GPTBigCodeForCausalLM, config)


def test_a_fused_projection_laid_out_in_a_way_of_its_own():
    """Without multi-query its heads are side by side under a name that elsewhere means blocks."""
    model = bigcode(False)
    for make in (lambda: Capture(model, "k"), lambda: Intervene(model, {"q.1": lambda x: x})):
        with pytest.raises(
            RuntimeError, match=r"lie in it in another way. Remedy: sites='module_output:transformer\.h\.0"
        ):
            make()
    Capture(model, ["z", "head_output", "attn_pattern"])(TensorDict(models.text_batch()))
    good = bigcode(True)
    acts = Capture(good, ["v", "attn_pattern", "z"], heads=range(4))(TensorDict(models.text_batch()))["acts"]
    z = torch.einsum("bhqk,bkhd->bqhd", acts["attn_pattern.1"], acts["v.1"])
    torch.testing.assert_close(z, acts["z.1"])


def bart(layers=2):
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in
             (("layers", layers), ("attention_heads", 4), ("ffn_dim", 32))}  # fmt: skip
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return {
        "vocab_size": models.VOCAB, "d_model": models.WIDTH, "max_position_embeddings": 64, **sizes, **tokens,
    }  # fmt: skip


def test_a_stream_that_is_not_where_it_seems():
    """Norms behind attention and MLP under names that elsewhere stand in front of them."""
    model = models._seeded(tf.BartForConditionalGeneration, tf.BartConfig(**bart()))
    text = r"residual_input \+ attn_output.*'module_input:model\.encoder\.layers\.0\.self_attn_layer_norm'"
    with pytest.raises(RuntimeError, match=text):
        Capture(model, "encoder.residual_mid")
    with pytest.raises(RuntimeError, match="mlp_output do not add up to residual_output"):
        Capture(model, "decoder.residual_mid")
    Capture(model, ["v", "head_output"])


def test_cross_attention_on_the_way_to_the_mlp():
    model = models._seeded(tf.MBartForConditionalGeneration, tf.MBartConfig(**bart()))
    batch = {**models.text_batch(), "decoder_input_ids": models.text_batch()["input_ids"][:, :4]}
    kinds = ["decoder.residual_mid", "decoder.mlp_output", "decoder.residual_output"]
    acts = Capture(model, kinds)(TensorDict(batch))["acts"]
    middle, mlp, after = (acts[f"{kind}.1"] for kind in kinds)
    torch.testing.assert_close(middle + mlp, after)


def test_a_block_that_scales_what_it_adds_by_a_parameter_of_its_own():
    config = tf.BeitConfig(
        hidden_size=models.WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=8,
        patch_size=4,
    )  # fmt: skip
    model = models._seeded(tf.BeitForImageClassification, config)
    for kind in ("attn_output", "mlp_output"):
        with pytest.raises(
            RuntimeError, match=f"'{kind}' of Beit.*parameter of its own.*scaled as the block does"
        ):
            Capture(model, kind)
    Capture(model, ["residual_output", "z"])
    with torch.no_grad():
        for block in model.beit.layers if hasattr(model.beit, "layers") else model.beit.encoder.layer:
            block.lambda_1.fill_(1.0), block.lambda_2.fill_(1.0)
    Capture(model, ["attn_output", "mlp_output", "residual_mid"])


def test_a_block_that_registers_its_first_norm_last():
    config = tf.FalconConfig(
        vocab_size=models.VOCAB, hidden_size=models.WIDTH, num_hidden_layers=2, num_attention_heads=4,
        multi_query=False, parallel_attn=False,
    )  # fmt: skip
    model = models._seeded(tf.FalconForCausalLM, config)
    kinds = ["residual_input", "attn_norm", "attn_input", "attn_output", "residual_mid", "mlp_output"]
    acts = Capture(model, [*kinds, "residual_output"])(TensorDict(models.text_batch()))["acts"]
    assert torch.equal(acts["attn_norm.1"], acts["attn_input.1"])
    torch.testing.assert_close(acts["residual_mid.1"], acts["residual_input.1"] + acts["attn_output.1"])
    torch.testing.assert_close(acts["residual_output.1"], acts["residual_mid.1"] + acts["mlp_output.1"])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        return self.out(x.cumsum(1))


class Block(nn.Module):
    """The same layers in the same order, normalised before attention and MLP or behind them."""

    def __init__(self, behind):
        super().__init__()
        self.attn, self.norm1, self.behind = Attention(), nn.LayerNorm(8), behind
        self.mlp, self.norm2 = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), nn.LayerNorm(8)

    def forward(self, x):
        if self.behind:
            x = self.norm1(x + self.attn(x))
            return self.norm2(x + self.mlp(x))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    def __init__(self, behind):
        super().__init__()
        self.blocks = nn.ModuleList(Block(behind) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("form", ["module", "context"])
def test_a_model_of_unknown_inputs_is_checked_in_the_first_call(form):
    """No code of ours can make up its inputs: the user's first call tells, and leaves nothing behind."""
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    good, wrong = Net(False), Net(True)

    def call(model, capture):
        if form == "module":
            return capture(TensorDict({"x": x}))
        with capture as calls:
            model(x)
        return calls[0]

    capture = Capture(good, ["residual_input", "attn_output", "residual_mid"])
    for _ in range(2):
        acts = call(good, capture)["acts"]
        torch.testing.assert_close(acts["residual_mid.1"], acts["residual_input.1"] + acts["attn_output.1"])
    assert [kinds["residual_mid"] for kinds in verified(good)["structure"].values()] == [""]
    expected = wrong(x)
    with pytest.raises(
        RuntimeError, match=r"not where.*'module_input:blocks\.0\.norm1' where that norm stands"
    ):
        call(wrong, Capture(wrong, "residual_mid"))
    for model in (good, wrong):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    torch.testing.assert_close(wrong(x), expected)


def test_edits_are_not_mistaken_for_structure():
    model = Net(False)
    shift = lambda x: x + 1
    for kind in ("residual_input", "attn_output", "residual_mid"):
        with Intervene(model, {kind: shift}), Capture(model, "residual_mid") as calls:
            model(torch.randn(2, 3, 8))
        assert len(calls) == 1
        assert not any(verified(model).get("structure", {}).values())


def test_it_is_done_once_and_leaves_nothing_behind():
    model = models.gpt2().train()
    ran = []
    model.register_forward_hook(lambda *_: ran.append(1))
    counted = model.transformer.h[0].mlp.act
    own, calls = counted.forward, []
    counted.forward = lambda x: calls.append(1) or own(x)
    Capture(model, "v")
    assert len(calls) == 1
    Capture(model, "v")
    assert len(calls) == 1
    Capture(model, ["residual_input", "attn_output", "z"])
    assert len(calls) == 1
    assert ran == []  # the user's hooks see no call
    assert model.training
    assert "forward" not in model.transformer.h[0].attn.__dict__
    assert sum(len(m._forward_hooks) for m in model.modules()) == 1
    (kinds,) = verified(model)["structure"].values()  # its blocks are of one class
    assert kinds["v"] == kinds["z"] == ""
    model.transformer.h[1].mlp.act = torch.nn.ReLU()  # another class of blocks now
    Capture(model, "v")
    assert len(calls) == 2 and len(verified(model)["structure"]) == 2


class Relative(nn.Module):
    """Its scores hold what queries make of distances, beside the product of queries and keys."""

    def __init__(self, relative):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
        self.num_heads, self.relative = 2, relative
        self.distance = nn.Parameter(torch.randn(4, 3) * 3)

    def forward(self, x):
        q, k, v = (
            p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = q @ k.transpose(-1, -2) / 2
        if self.relative:
            scores = scores + torch.einsum("bhqd,dk->bhqk", q, self.distance)
        return self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, relative):
        super().__init__()
        self.attn, self.norm = Relative(relative), nn.LayerNorm(8)

    def forward(self, x):
        return x + self.attn(self.norm(x))


class Frames(nn.Module):
    def __init__(self, relative):
        super().__init__()
        self.blocks = nn.ModuleList(Layer(relative) for _ in range(2))

    def forward(self, frames):
        for block in self.blocks:
            frames = block(frames)
        return frames


@pytest.mark.parametrize("form", ["module", "context"])
def test_what_lies_inside_a_forward_is_checked_in_the_first_call_too(form):
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    for relative in (False, True):
        torch.manual_seed(1)
        model = Frames(relative).eval()

        def call(kind, model=model):
            capture = Capture(model, kind)
            if form == "module":
                return capture(TensorDict({"frames": x}))
            with capture as calls:
                model(x)
            return calls[0]

        call("residual_output")
        assert call(["attn_pattern", "z"])["acts", "attn_pattern.1"].shape == (2, 2, 3, 3)
        if relative:
            with pytest.raises(RuntimeError, match="not its scaled product with a bias of positions.*Remedy"):
                call("q_rotary")
        else:
            assert call("q_rotary")["acts", "q_rotary.1"].shape == (2, 3, 2, 4)
        assert not any("forward" in m.__dict__ or m._forward_hooks for m in model.modules())
