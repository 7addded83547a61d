"""What the tests of edits share: models, their batches, counts of hooks, and the plain hook they are compared with."""

from __future__ import annotations

import contextlib

import torch

import models
import tdgeom as tg

ALL = {**models.TEXT_MODELS, **models.IMAGE_MODELS}
LISTED = [
    "gpt2", "llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gpt_neox", "phi", "opt", "mixtral", "bert", "vit",
]  # fmt: skip
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))
EVERY = [
    "residual_input", "q", "k", "v", "attn_scores", "attn_pattern", "z", "head_output", "attn_output", "residual_mid",
    "mlp_act", "mlp_output", "residual_output",
]  # fmt: skip


def hook_count(model):
    own = sum("forward" in m.__dict__ for m in model.modules())
    return own + sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    )


def batch_for(name):
    return {"pixel_values": IMAGES} if name == "vit" else models.text_batch()


def other_for(name):
    given = batch_for(name)
    return {k: v if k == "attention_mask" else v.flip(0).contiguous() for k, v in given.items()}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@contextlib.contextmanager
def plain_hook(module, fn):
    """The reference: a torch hook that changes a module's output (its first item where it is a tuple)."""
    handle = module.register_forward_hook(
        lambda m, a, o: (fn(o[0]), *o[1:]) if isinstance(o, tuple) else fn(o)
    )
    try:
        yield
    finally:
        handle.remove()


def sites_of(model, kinds=EVERY):
    has = {entry.site.kind for entry in tg.available_sites(model)}
    return [kind for kind in kinds if kind in has]
