"""Tiny random models of many architectures: from a configuration, with every known size made small, to a model that computes."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
import transformers as tf
from torch import nn

VOCAB, WIDTH, DEPTH, HEADS, INNER = 96, 32, 3, 4, 48

# what configurations call their sizes, and what these are here; a configuration gets those that it knows
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size",), VOCAB),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim"), WIDTH
    ),
    **dict.fromkeys(("projection_dim", "embed_dim"), WIDTH),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "hidden_dim",
            "d_ff",
            "d_inner",
            "dff",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
        ),
        INNER,
    ),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "num_decoder_layers",
            "encoder_layers",
            "decoder_layers",
        ),
        DEPTH,
    ),
    **dict.fromkeys(("num_encoder_layers",), DEPTH),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "encoder_attention_heads",
            "decoder_attention_heads",
        ),
        HEADS,
    ),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 64
    ),
    **dict.fromkeys(("num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok",), 2),
    **dict.fromkeys(("n_routed_experts",), 8),
    **dict.fromkeys(("n_group",), 2),
    **dict.fromkeys(("topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 8),
    "qk_rope_head_dim": 4,
    **dict.fromkeys(("state_size",), 8),
    **dict.fromkeys(("image_size",), 16),
    **dict.fromkeys(("patch_size",), 4),
    "num_channels": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}


def tiny_config(kind: Any, **changes: Any) -> Any:
    """A configuration with every size that it knows made small, and the changes."""
    known = inspect.signature(kind).parameters
    sizes = {name: value for name, value in SIZES.items() if name in known}
    return kind(**{**sizes, **changes})


def tiny_model(kind: Any, config: Any, gain: float = 6.0) -> nn.Module:
    """The model with weights that make every branch count: no identity norms, zero biases, tiny matrices or scales of one."""
    torch.manual_seed(0)
    return stirred(kind(config).eval(), gain)


def stirred(model: nn.Module, gain: float = 6.0) -> nn.Module:
    """A model whose fresh weights are changed in place so that a part left out, or counted twice, shows in what comes out."""
    generator = torch.Generator().manual_seed(1)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator).to(like.dtype)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            last = name.rpartition(".")[2]
            if not parameter.is_floating_point():
                continue
            if parameter.ndim == 1 and ("norm" in name.lower() or "ln_" in name or _SCALES.search(last)):
                parameter.add_(0.3 * noise(parameter))
            elif parameter.ndim == 1 and "bias" in last and _SETTLED.search(name) is None:
                parameter.add_(0.05 * noise(parameter))
            elif parameter.ndim >= 2:
                size = float(parameter.std())
                if size == 0:
                    parameter.add_(0.12 * noise(parameter))
                elif size < 0.06 and last in ("weight", "gate_up_proj", "down_proj"):
                    parameter.mul_(min(gain, 0.12 / size))
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):  # what a trained block multiplies its output by
                buffer.fill_(0.7)
    return model


# scales that start at one (or nothing), and biases that start where a recurrence needs them
_SCALES = re.compile(r"lambda|gamma|scale|sinks|weight_g")
_SETTLED = re.compile(r"dt_proj|dt_bias|conv1d|fgate|igate|e_score_correction_bias")


def model_class(name: str) -> Any:
    """A class of transformers by its name."""
    return getattr(tf, name)
