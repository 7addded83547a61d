"""Tiny mixtures of experts of several architectures, with weights large enough that routers have an opinion."""

from __future__ import annotations

import torch
import transformers as tf

from models import VOCAB, WIDTH

_BASE = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 24, "moe_intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
_LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "num_key_value_heads": 4,
}


def _groups(**changes):
    return {
        **_BASE,
        **_LATENT,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        **changes,
    }


def _switch(capacity=64):
    return tf.SwitchTransformersForConditionalGeneration(
        tf.SwitchTransformersConfig(
            vocab_size=VOCAB, d_model=WIDTH, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=4,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=capacity, pad_token_id=0,
            decoder_start_token_id=0,
        )
    )  # fmt: skip


BUILDERS = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_BASE, num_local_experts=4)),
    "qwen2_moe": lambda: tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**_BASE, num_experts=4, shared_expert_intermediate_size=12)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**_BASE, num_experts=4, head_dim=4)),
    "olmoe": lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(**_BASE, num_experts=4)),
    "deepseek_v2": lambda: tf.DeepseekV2ForCausalLM(tf.DeepseekV2Config(**_groups(topk_method="group_limited_greedy"))),
    "deepseek_v3": lambda: tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**_groups())),
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**_BASE, num_local_experts=4, head_dim=4)),
    "jetmoe": lambda: tf.JetMoeForCausalLM(
        tf.JetMoeConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_key_value_heads=2, kv_channels=4,
                        intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0)
    ),
    "llama4": lambda: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(**{**_BASE, "num_experts_per_tok": 1}, num_local_experts=4, head_dim=4, intermediate_size_mlp=24,
                            interleave_moe_layer_step=1)
    ),
    "switch": _switch,
    "switch, one a sequence": lambda: _switch(1),
}  # fmt: skip


def build(name):
    """The model, every weight drawn anew."""
    torch.manual_seed(0)
    model = BUILDERS[name]().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for path, buffer in model.named_buffers():
            if path.endswith("e_score_correction_bias"):
                buffer.copy_(torch.linspace(2.0, 0.0, buffer.numel()))
    return model
