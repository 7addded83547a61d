"""Tiny random models, built from configurations: no download, a few thousand parameters each."""

from __future__ import annotations

import torch
import transformers as tf
from torch import nn

VOCAB, WIDTH, DEPTH = 48, 16, 3
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_GEMMA = {**_LLAMA, "head_dim": 4}


def gpt2(**changes) -> nn.Module:
    config = tf.GPT2Config(
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_layer=DEPTH,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        **changes,
    )
    return _seeded(tf.GPT2LMHeadModel, config)


def llama(**changes) -> nn.Module:
    return _seeded(tf.LlamaForCausalLM, tf.LlamaConfig(**{**_LLAMA, **changes}))


def mixtral(**changes) -> nn.Module:
    config = tf.MixtralConfig(**{**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, **changes})
    return _seeded(tf.MixtralForCausalLM, config)


def bert(**changes) -> nn.Module:
    return _seeded(tf.BertForMaskedLM, tf.BertConfig(**{**_BERT, **changes}))


def albert(**changes) -> nn.Module:
    return _seeded(tf.AlbertModel, tf.AlbertConfig(**{**_BERT, "embedding_size": 8, **changes}))


def t5(**changes) -> nn.Module:
    return _seeded(tf.T5ForConditionalGeneration, _t5_config(**changes))


def _t5_config(**changes):
    settings = {
        "vocab_size": VOCAB,
        "d_model": WIDTH,
        "d_kv": 4,
        "d_ff": 32,
        "num_layers": DEPTH,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 2,
    }
    return tf.T5Config(**{**settings, **changes})


def vit(**changes) -> nn.Module:
    settings = {
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "image_size": 8,
        "patch_size": 4,
        "num_labels": 5,
    }
    return _seeded(tf.ViTForImageClassification, tf.ViTConfig(**{**settings, **changes}))


def _image_gpt() -> nn.Module:
    config = tf.ImageGPTConfig(vocab_size=VOCAB, n_positions=64, n_embd=WIDTH, n_layer=DEPTH, n_head=4)
    return _seeded(tf.ImageGPTModel, config)


def _opt() -> nn.Module:
    config = tf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        ffn_dim=32,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=WIDTH,
    )
    return _seeded(tf.OPTForCausalLM, config)


def _bloom() -> nn.Module:
    return _seeded(
        tf.BloomForCausalLM, tf.BloomConfig(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=DEPTH, n_head=4)
    )


def _falcon() -> nn.Module:
    config = tf.FalconConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=4
    )
    return _seeded(tf.FalconForCausalLM, config)


def _distilbert() -> nn.Module:
    config = tf.DistilBertConfig(vocab_size=VOCAB, dim=WIDTH, hidden_dim=32, n_layers=DEPTH, n_heads=4)
    return _seeded(tf.DistilBertForMaskedLM, config)


# name -> builder of a model with DEPTH layers that takes input_ids and attention_mask
TEXT_MODELS = {
    "gpt2": gpt2,
    "gpt2_bare": lambda: gpt2().transformer,
    "gpt_neox": lambda: _seeded(tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig(**{**_BERT, "rotary_pct": 1.0})),
    "gpt_neox_sequential": lambda: _seeded(
        tf.GPTNeoXForCausalLM,
        tf.GPTNeoXConfig(**{**_BERT, "rotary_pct": 1.0, "use_parallel_residual": False}),
    ),
    "llama": llama,
    "llama_bare": lambda: llama().model,
    "qwen2": lambda: _seeded(tf.Qwen2ForCausalLM, tf.Qwen2Config(**_LLAMA)),
    "qwen3": lambda: _seeded(tf.Qwen3ForCausalLM, tf.Qwen3Config(**_GEMMA)),
    "gemma": lambda: _seeded(tf.GemmaForCausalLM, tf.GemmaConfig(**_GEMMA)),
    "gemma2": lambda: _seeded(tf.Gemma2ForCausalLM, tf.Gemma2Config(**_GEMMA)),
    "gemma3": lambda: _seeded(tf.Gemma3ForCausalLM, tf.Gemma3TextConfig(**_GEMMA)),
    "phi": lambda: _seeded(tf.PhiForCausalLM, tf.PhiConfig(**_LLAMA)),
    "granite": lambda: _seeded(tf.GraniteForCausalLM, tf.GraniteConfig(**_LLAMA, residual_multiplier=0.3)),
    "olmo2": lambda: _seeded(tf.Olmo2ForCausalLM, tf.Olmo2Config(**_LLAMA)),
    "mixtral": mixtral,
    "opt": _opt,
    "bloom": _bloom,
    "falcon": _falcon,
    "bert": bert,
    "roberta": lambda: _seeded(tf.RobertaForMaskedLM, tf.RobertaConfig(**{**_BERT, "pad_token_id": 1})),
    "esm": lambda: _seeded(tf.EsmForMaskedLM, tf.EsmConfig(**_BERT, mask_token_id=3)),
    "distilbert": _distilbert,
}
IMAGE_MODELS = {"vit": vit, "image_gpt": _image_gpt}


def text_batch(batch: int = 3, length: int = 7) -> dict[str, torch.Tensor]:
    """Token ids (none of them a special one) and a mask of ones."""
    ids = torch.randint(4, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def labelled_batches(count: int, rows: int = 8) -> list[dict[str, torch.Tensor]]:
    """Sequences of which those labelled 1 end in token 9, those labelled 0 in token 5; padded on the left and right."""
    made = []
    for seed in range(count):
        ids = torch.randint(10, VOCAB, (rows, 7), generator=torch.Generator().manual_seed(seed))
        label = torch.arange(rows) % 2
        ids[:, -1] = 5 + 4 * label
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        made.append({"input_ids": ids, "attention_mask": mask, "label": label})
    return made


def _seeded(kind, config) -> nn.Module:
    torch.manual_seed(0)
    model = kind(config).eval()
    # norms that start as ones would hide a norm left out or counted twice, small weights a branch left out
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() or "ln_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter.ndim >= 2:
                parameter.mul_(6.0)
    return model


def network(attention, scale=1.0):
    """A tiny model of token ids, whose blocks add ``scale`` times what their attention and MLP give."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.norm1, self.norm2 = attention(), nn.LayerNorm(8), nn.LayerNorm(8)
            self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
            self.factor = scale

        def forward(self, x):
            x = x + self.factor * self.attn(self.norm1(x))
            return x + self.factor * self.mlp(self.norm2(x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(20, 8)
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, input_ids):
            x = self.embed(input_ids)
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    return Net().eval()
