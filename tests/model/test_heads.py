"""Heads, patterns and the stream between attention and MLP: the numbers add up on every architecture."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn

import models
from tdgeom.model.calls.checked_sites import available_sites
from tdgeom.model.capture import Capture
from tdgeom.model.structure.blocks import find_stacks

POST_NORM = {"bert", "roberta", "distilbert"}
PARALLEL = {"gpt_neox", "phi", "falcon"}
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))
ALL = {**models.TEXT_MODELS, **models.IMAGE_MODELS}


def batch_for(name):
    if name == "vit":
        return {"pixel_values": IMAGES}
    batch = models.text_batch()
    return {"input_ids": batch["input_ids"]} if name == "image_gpt" else batch


@pytest.fixture(params=ALL)
def architecture(request):
    return request.param, ALL[request.param](), batch_for(request.param)


def implementations(model):
    return [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]


def test_head_outputs_add_up(architecture):
    name, model, batch = architecture
    acts = Capture(model, ["z", "head_output", "attn_output"], clone=name == "falcon")(TensorDict(batch))[
        "acts"
    ]
    for layer, block in enumerate(find_stacks(model)[0].blocks):
        shares, whole = acts[f"head_output.{layer}"], acts[f"attn_output.{layer}"]
        path = {e.site: e.module_path for e in available_sites(model)}[f"head_output.{layer}"]
        bias = getattr(model.get_submodule(path), "bias", None)
        expected = whole if bias is None else whole - bias
        assert shares.shape == (*whole.shape[:2], 4, models.WIDTH)
        assert acts[f"z.{layer}"].shape[2:] == (4, 4)
        torch.testing.assert_close(shares.sum(2), expected, rtol=1e-4, atol=2e-5)
        assert (
            shares[:, :, 0] - shares[:, :, 1]
        ).norm() > 1e-3 * shares.norm()  # heads are not copies of one
        assert block.path in path


def test_the_stream_in_the_middle(architecture):
    name, model, batch = architecture
    kinds = ["residual_input", "attn_output", "mlp_output", "residual_output"]
    if name in PARALLEL:
        with pytest.raises(ValueError, match="no 'residual_mid'"):
            Capture(model, "residual_mid")
        return
    acts = Capture(model, [*kinds, "residual_mid"])(TensorDict(batch))["acts"]
    for layer in range(models.DEPTH):
        before, attention, mlp, after = (acts[f"{kind}.{layer}"] for kind in kinds)
        middle = acts[f"residual_mid.{layer}"]
        torch.testing.assert_close(middle, before + attention, rtol=1e-5, atol=1e-5)
        if name not in POST_NORM:
            torch.testing.assert_close(after, middle + mlp, rtol=1e-5, atol=1e-5)


def test_patterns_are_what_the_model_reports(architecture):
    name, model, batch = architecture
    before = implementations(model)
    capture = Capture(model, ["attn_scores", "attn_pattern"])
    acts = capture(TensorDict(batch))["acts"]
    assert implementations(model) == before
    assert not any("forward" in module.__dict__ for module in model.modules())
    if name == "falcon":  # its own way of choosing a kernel, made when the model is
        model.config._attn_implementation = "eager"
    else:
        model.set_attn_implementation("eager")
    with torch.no_grad():
        reported = model(**batch, output_attentions=True).attentions
    for layer in range(models.DEPTH):
        pattern, scores = acts[f"attn_pattern.{layer}"], acts[f"attn_scores.{layer}"]
        torch.testing.assert_close(pattern, reported[layer], rtol=0, atol=0)
        torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]), rtol=0, atol=1e-6)
        torch.testing.assert_close(scores.softmax(-1), pattern)
        assert pattern.shape[1] == 4


def test_values_weighted_by_the_pattern_are_z(architecture):
    """Fused projections are taken apart as the model does: pattern and values give each head's z."""
    _, model, batch = architecture
    capture = Capture(model, ["q", "k", "v", "z", "attn_pattern"])
    acts = capture(TensorDict(batch))["acts"]
    values = Capture(model, "v", heads=range(4))(TensorDict(batch))["acts"]
    for layer in range(models.DEPTH):
        v, pattern, z = values[f"v.{layer}"], acts[f"attn_pattern.{layer}"], acts[f"z.{layer}"]
        torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", pattern, v), z, rtol=1e-4, atol=1e-5)
        assert acts[f"q.{layer}"].shape[2:] == (4, 4)
        assert acts[f"k.{layer}"].shape == acts[f"v.{layer}"].shape
        groups = 4 // acts[f"v.{layer}"].shape[2]
        for head in range(4):  # a query head reads its own key/value head
            torch.testing.assert_close(
                v[:, :, head], acts[f"v.{layer}"][:, :, head // groups], rtol=1e-3, atol=1e-5
            )


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "bert", "vit"])
def test_queries_and_keys_without_rotation_give_the_scores(name):
    """Where nothing turns them after the projection, q k' / sqrt(d) is what the softmax receives."""
    model = ALL[name]()
    if name == "gpt_neox":  # no rotation at position 0
        batch = {"input_ids": torch.tensor([[7], [9], [11]])}
    else:
        batch = batch_for(name)
    acts = Capture(model, ["q", "k", "attn_scores"])(TensorDict(batch))["acts"]
    scores = torch.einsum("bqhd,bkhd->bhqk", acts["q.1"], acts["k.1"]) / 2
    seen = acts["attn_scores.1"]
    keep = seen > -1e30
    torch.testing.assert_close(seen[keep], scores[keep], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "vit"])
def test_neurons_go_through_the_last_layer_of_the_mlp(name):
    model = models.t5() if name == "t5" else ALL[name]()
    kind = "encoder.mlp_act" if name == "t5" else "mlp_act"
    out = kind.replace("_act", "_output")
    capture = Capture(model, [kind, out])
    acts = capture(TensorDict(batch_for(name)))["acts"]
    for layer in range(models.DEPTH):
        last = model.get_submodule(capture.module_paths[f"{kind}.{layer}"])
        torch.testing.assert_close(last(acts[f"{kind}.{layer}"]).detach(), acts[f"{out}.{layer}"])
    with pytest.raises(ValueError, match="no 'mlp_act'"):
        Capture(models.mixtral(), "mlp_act")  # its experts are one tensor


def test_norm_outputs():
    model = models.llama()
    acts = Capture(model, ["attn_norm", "mlp_norm", "attn_input", "mlp_input"])(
        TensorDict(batch_for("llama"))
    )["acts"]
    for layer in range(models.DEPTH):
        for half in ("attn", "mlp"):
            torch.testing.assert_close(
                acts[f"{half}_norm.{layer}"], acts[f"{half}_input.{layer}"], rtol=0, atol=0
            )
    bert = models.bert()
    acts = Capture(bert, ["attn_norm", "mlp_norm", "mlp_input", "residual_output"])(
        TensorDict(batch_for("bert"))
    )["acts"]
    torch.testing.assert_close(acts["attn_norm.1"], acts["mlp_input.1"], rtol=0, atol=0)
    torch.testing.assert_close(acts["mlp_norm.1"], acts["residual_output.1"], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["BitNet", "Llama4", "DeepseekV3"])
def test_norms_inside_attention_are_not_the_block_s(name):
    import transformers as tf

    latent = {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 4,
    }
    dense = {
        "first_k_dense_replace": 9,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    }
    changes = {
        "BitNet": {},
        "Llama4": {"head_dim": 4, "num_local_experts": 2, "intermediate_size_mlp": 32},
        "DeepseekV3": {"num_key_value_heads": 4, **latent, **dense},
    }[name]
    config = getattr(tf, "Llama4TextConfig" if name == "Llama4" else f"{name}Config")
    model = models._seeded(getattr(tf, f"{name}ForCausalLM"), config(**{**models._LLAMA, **changes}))
    acts = Capture(model, ["attn_norm", "attn_input"])(TensorDict(models.text_batch()))["acts"]
    for layer in range(models.DEPTH):
        assert torch.equal(acts[f"attn_norm.{layer}"], acts[f"attn_input.{layer}"])


def test_heads_are_selected():
    model, batch = models.llama(), TensorDict(models.text_batch())
    kinds = ["k", "z", "head_output", "attn_pattern", "residual_input"]
    whole = Capture(model, kinds, layers=1)(batch.copy())["acts"]
    some = Capture(model, kinds, layers=1, heads=[3, -4])(batch.copy())["acts"]
    assert torch.equal(some["z.1"], whole["z.1"][:, :, [3, 0]])
    assert torch.equal(some["head_output.1"], whole["head_output.1"][:, :, [3, 0]])
    assert torch.equal(some["attn_pattern.1"], whole["attn_pattern.1"][:, [3, 0]])
    assert torch.equal(some["k.1"], whole["k.1"][:, :, [1, 0]])
    assert torch.equal(some["residual_input.1"], whole["residual_input.1"])
    with pytest.raises(IndexError, match="head 4 is out of range.*4 query heads"):
        Capture(model, "k", heads=4)
    with pytest.raises(ValueError, match="heads= needs a site with heads"):
        Capture(model, "residual_input", heads=0)


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2"])
def test_padding_and_batching_change_no_head(name):
    model, ids = ALL[name](), models.text_batch()["input_ids"]
    kinds = ["q", "z", "head_output", "residual_mid", "mlp_act", "attn_pattern"]
    capture = Capture(model, kinds)
    lengths = [7, 4, 5]
    for side in ("left", "right"):
        padded, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
        spans = [slice(9 - n, 9) if side == "left" else slice(0, n) for n in lengths]
        for row, (span, n) in enumerate(zip(spans, lengths)):
            padded[row, span], mask[row, span] = ids[row, :n], 1
        acts = capture(TensorDict({"input_ids": padded, "attention_mask": mask}))["acts"]
        for row, (span, n) in enumerate(zip(spans, lengths)):
            alone = capture(TensorDict({"input_ids": ids[row : row + 1, :n]}))["acts"]
            for site in capture.sites:
                value = acts[site][row]
                value = value[:, span, span] if site.kind == "attn_pattern" else value[span]
                torch.testing.assert_close(value, alone[site][0], rtol=1e-3, atol=1e-4)


class Attention(nn.Module):
    """Attention by torch's fused function, with no configuration and no eager kernel."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.num_heads = nn.Linear(8, 24), nn.Linear(8, 8), 2

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(8), Attention(), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def test_a_module_that_only_knows_the_fused_function():
    model, x = nn.Sequential(Block(), Block()), torch.randn(3, 5, 8)
    expected = model(x)
    acts = Capture(model, ["attn_pattern", "v", "z", "residual_mid", "residual_output", "mlp_output"])(
        TensorDict({"input": x})
    )["acts"]
    assert acts["attn_pattern.0"].triu(1).abs().sum() == 0
    rebuilt = torch.einsum("bhqk,bkhd->bqhd", acts["attn_pattern.1"], acts["v.1"])
    torch.testing.assert_close(rebuilt, acts["z.1"])
    torch.testing.assert_close(acts["residual_mid.1"] + acts["mlp_output.1"], acts["residual_output.1"])
    torch.testing.assert_close(acts["residual_output.1"], expected.detach())


# -------------------------------------------------------------------------------- choosing and keeping


def test_expressions_classes_callbacks_and_an_outer_cache():
    import re

    model, batch, seen = models.gpt2(), TensorDict(models.text_batch()), []
    cache = TensorDict({})
    capture = Capture(
        model,
        re.compile(r"transformer\.h\.\d\.(mlp|ln_1)"),
        skip_classes=[nn.LayerNorm],
        callback=lambda site, value: seen.append(site) or value.mean(-1),
        nested=True,
        cache=cache,
    )
    assert [site.path for site in capture.sites] == [f"transformer.h.{i}.mlp" for i in range(3)]
    td = capture(batch.copy())
    assert td["acts", "transformer", "h", "1", "mlp"].shape == (3, 7)
    assert seen == capture.sites
    assert torch.equal(
        cache["acts", "transformer", "h", "1", "mlp"], td["acts", "transformer", "h", "1", "mlp"]
    )
    only = Capture(model, "module_output:transformer.h.*.*", classes=[nn.LayerNorm])
    assert len(only.sites) == 6
    with pytest.raises(ValueError, match="leave none.*GPT2MLP"):
        Capture(model, re.compile(r"transformer\.h\.1\.mlp"), classes=[nn.LayerNorm])
    with pytest.raises(ValueError, match="whole path"):
        Capture(model, re.compile("mlp"))


def test_hooks_can_be_switched_off_inside():
    model, batch = models.gpt2(), models.text_batch()
    capture = Capture(model, ["residual_input", "attn_pattern"])
    with capture as calls:
        model(**batch)
        with capture.disable_hooks():
            model(**batch)
        model(**batch)
    assert len(calls) == 2
    with pytest.raises(RuntimeError, match="entered Capture"), capture.disable_hooks():
        pass
