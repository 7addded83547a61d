"""One block of every class is looked at: hybrids, gates, adapters, scaled branches, two streams, parts in parallel lists."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tensordict import TensorDict
from torch import nn

import models
import tdgeom as tg
from models import VOCAB, WIDTH

_LLAMA = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
_LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "num_key_value_heads": 4,
    "moe_intermediate_size": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
}  # fmt: skip
ADDED = ["attn_output", "mlp_output"]


def drawn(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def layers_of(model, kind):
    return [e.site.layer for e in tg.available_sites(model) if e.site.kind == kind]


def minimax():
    kinds = ["full_attention", "linear_attention", "full_attention"]
    config = tf.MiniMaxConfig(
        **_LLAMA, head_dim=4, num_local_experts=4, num_experts_per_tok=2, layer_types=kinds
    )
    return drawn(tf.MiniMaxForCausalLM(config))


def zamba2():
    config = tf.Zamba2Config(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=4, layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        mamba_d_state=8, mamba_headdim=8, mamba_ngroups=1, n_mamba_heads=4, intermediate_size=24, num_attention_heads=4,
        num_mem_blocks=1, use_shared_attention_adapter=True, adapter_rank=2, pad_token_id=0,
    )  # fmt: skip
    return drawn(tf.Zamba2ForCausalLM(config))


def qwen3_next():
    config = tf.Qwen3NextConfig(
        **{**_LLAMA, "num_hidden_layers": 2}, head_dim=4, layer_types=["linear_attention", "full_attention"], num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=12, shared_expert_intermediate_size=12, linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=4, linear_value_head_dim=4,
    )  # fmt: skip
    return drawn(tf.Qwen3NextForCausalLM(config))


def test_linear_attention_has_no_pattern_and_says_so():
    model = minimax()
    assert layers_of(model, "attn_pattern") == [0, 2]
    with pytest.raises(
        RuntimeError, match=r"'attn_pattern'.*at the layers \[1\]: no softmax over keys was seen"
    ):
        tg.Capture(model, "attn_pattern.1")
    with pytest.raises(RuntimeError, match=r"at the layers \[1\]"):
        tg.Capture(model, "attn_pattern", layers=[0, 1])
    assert tg.Capture(model, "attn_pattern").sites == ["attn_pattern.0", "attn_pattern.2"]


@pytest.mark.parametrize("build", [minimax, zamba2, qwen3_next])
def test_shares_add_up_at_every_layer_that_has_them(build):
    model, batch = build(), models.text_batch()
    for layer in layers_of(model, "head_output"):
        acts = tg.Capture(model, [f"head_output.{layer}", f"attn_output.{layer}", f"z.{layer}"])(
            TensorDict(batch)
        )["acts"]
        torch.testing.assert_close(
            acts[f"head_output.{layer}"].sum(2), acts[f"attn_output.{layer}"], rtol=1e-4, atol=1e-5
        )
    for layer in layers_of(model, "mlp_act"):
        capture = tg.Capture(model, [f"mlp_act.{layer}", f"mlp_output.{layer}"])
        with torch.no_grad(), tg.Intervene(model, {f"mlp_act.{layer}": tg.Scale(0.0)}), capture as calls:
            model(**batch)
        out = calls[0]["acts", f"mlp_output.{layer}"]
        torch.testing.assert_close(out, out[:1, :1].expand_as(out))  # nothing but a bias is left


def test_a_gate_behind_the_projection_is_not_z():
    """The same layers, the gate in front of the output projection or behind it."""

    class Attention(nn.Module):
        def __init__(self, behind):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.gate_proj = (
                nn.Linear(8, 8) for _ in range(5)
            )
            self.num_heads, self.behind = 2, behind

        def forward(self, hidden_states):
            q, k, v = (
                p(hidden_states).unflatten(-1, (2, 4)).transpose(1, 2)
                for p in (self.q_proj, self.k_proj, self.v_proj)
            )
            z = ((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
            gate = self.gate_proj(hidden_states).sigmoid()
            return self.o_proj(z) * gate if self.behind else self.o_proj(z * gate)

    good, wrong = models.network(lambda: Attention(False)), models.network(lambda: Attention(True))
    for model, holds in ((good, True), (wrong, False)):
        kinds = {e.site.kind for e in tg.available_sites(model)}
        assert {"attn_output", "attn_pattern", "v", "q_rotary"} <= kinds
        assert (kinds >= {"z", "head_output"}) is holds
    with pytest.raises(
        RuntimeError, match="'z' of .*'blocks.0.attn.o_proj', which should project it, is not attn_output"
    ):
        tg.Intervene(wrong, {"z.1": tg.Scale(0.0)})


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.proj(x.cumsum(1))


@pytest.mark.parametrize("scale", [1.0, 0.97, 0.5])
def test_a_factor_of_any_name(scale):
    """An attribute that no rule knows multiplies what the block adds: 3 % are seen too, and a change of it is seen anew."""
    model = models.network(Mixing, scale)
    have = {e.site.kind for e in tg.available_sites(model)}
    if scale == 1.0:
        assert have >= set(ADDED)
        for block in model.blocks:
            block.factor = 0.5
    assert not set(ADDED) & {e.site.kind for e in tg.available_sites(model)}
    for kind in ADDED:
        with pytest.raises(
            RuntimeError,
            match=f"'{kind}'.*is not what is added to the stream.*Remedy: 'module_output:blocks.0",
        ):
            tg.Capture(model, kind)
    assert {"residual_input", "residual_output"} <= have


def test_a_scale_that_is_trained_later_is_looked_at_again():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
            self.norm, self.alpha = nn.LayerNorm(8), nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x + self.alpha * self.mlp(self.norm(x))

    model = models.network(Mixing)
    model.blocks = nn.ModuleList(Scaled() for _ in range(2))
    tg.Capture(model, "mlp_output")
    with torch.no_grad():
        model.blocks[1].alpha.fill_(2.0)
    assert layers_of(model, "mlp_output") == [0]
    with pytest.raises(
        RuntimeError, match=r"at the layers \[1\]: the block scales it by a parameter of its own"
    ):
        tg.Capture(model, "mlp_output.1")


# ------------------------------------------------------------------------------------------ patterns without projections


def deepseek(kind, config, **changes):
    return drawn(kind(config(**{**_LLAMA, **_LATENT, **changes})))


PATTERNS = {
    "deepseek_v2": lambda: deepseek(tf.DeepseekV2ForCausalLM, tf.DeepseekV2Config),
    "deepseek_v3": lambda: deepseek(tf.DeepseekV3ForCausalLM, tf.DeepseekV3Config, n_group=2, topk_group=1),
    "jetmoe": lambda: drawn(
        tf.JetMoeForCausalLM(
            tf.JetMoeConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_key_value_heads=2, kv_channels=4,
                            intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0)
        )
    ),
    "xlnet": lambda: drawn(
        tf.XLNetLMHeadModel(tf.XLNetConfig(vocab_size=VOCAB, d_model=WIDTH, n_layer=2, n_head=4, d_inner=24, pad_token_id=0))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_need_no_projections(name):
    model = PATTERNS[name]()
    batch = {"input_ids": models.text_batch()["input_ids"]}
    acts = tg.Capture(model, ["attn_scores", "attn_pattern"])(TensorDict(batch))["acts"]
    if name != "xlnet":
        model.set_attn_implementation("eager")
    with torch.no_grad():
        reported = model(**batch, output_attentions=True).attentions
        plain = model(**batch).logits
    for layer, attention in enumerate(reported):
        pattern = acts[f"attn_pattern.{layer}"]
        attention = (
            attention.permute(0, 1, 2, 3)
            if attention.shape == pattern.shape
            else attention.permute(2, 3, 0, 1)
        )
        torch.testing.assert_close(pattern, attention)
        torch.testing.assert_close(acts[f"attn_scores.{layer}"].softmax(-1), pattern)
    with torch.no_grad(), tg.Intervene(model, {"attn_pattern.1": lambda p: p.roll(1, -1)}):
        assert (model(**batch).logits - plain).abs().max() > 1e-3
