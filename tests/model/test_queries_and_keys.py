"""``q``, ``k`` and ``v`` are what projections give; ``q_rotary`` and ``k_rotary`` are what the scores are made of."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn

import models
import tdgeom as tg

KINDS = ["q", "k", "q_rotary", "k_rotary", "attn_scores"]
PRODUCT = ["q_rotary", "k_rotary", "attn_scores", "attn_pattern"]
# their queries are scaled before, or by a number of their own
SCALED = ("gemma", "gemma2", "gemma3", "granite", "opt", "esm")
ROTARY = [name for name in models.TEXT_MODELS if name not in ("falcon",)]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ROTARY)
def test_their_product_is_the_scores(name, implementation):
    model, batch = models.TEXT_MODELS[name](), models.text_batch()
    model.set_attn_implementation(implementation if getattr(model, "_supports_sdpa", False) else "eager")
    acts = tg.Capture(model, ["q_rotary", "k_rotary", "attn_scores", "attn_pattern"])(TensorDict(batch))[
        "acts"
    ]
    for layer in range(models.DEPTH):
        q, k, scores, pattern = (
            acts[f"{kind}.{layer}"].double()
            for kind in ("q_rotary", "k_rotary", "attn_scores", "attn_pattern")
        )
        assert q.shape == k.shape and q.shape[2] == 4
        raw = torch.einsum("bqhd,bkhd->bhqk", q, k)
        open_ = pattern > 0
        scale = q.shape[-1] ** -0.5
        if name == "bloom":  # a bias of positions is added: what two texts differ by
            raw, scores, open_ = raw[0] - raw[1], scores[0] - scores[1], open_[0] & open_[1]
        if name in SCALED:
            scale = float((raw[open_] @ scores[open_]) / (raw[open_] @ raw[open_]))
        torch.testing.assert_close(raw[open_] * scale, scores[open_], rtol=2e-3, atol=2e-3)


def test_grouped_queries_and_rotation():
    """Llama's own arithmetic, from its projections."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

    model, batch = models.llama(), models.text_batch()
    capture = tg.Capture(model, KINDS)
    acts = capture(TensorDict(batch))["acts"]
    assert acts["q.1"].shape[2] == 4 and acts["k.1"].shape[2] == 2
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    for layer, block in enumerate(model.model.layers):
        hidden = tg.Capture(model, f"attn_input.{layer}")(TensorDict(batch))["acts", f"attn_input.{layer}"]
        q = block.self_attn.q_proj(hidden).unflatten(-1, (4, -1))
        k = block.self_attn.k_proj(hidden).unflatten(-1, (2, -1))
        torch.testing.assert_close(acts[f"q.{layer}"], q.detach())
        torch.testing.assert_close(acts[f"k.{layer}"], k.detach())
        seen = []
        handle = model.model.rotary_emb.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
        with torch.no_grad():
            model(**batch, position_ids=positions)
        handle.remove()
        q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *seen[0])
        mask = batch["attention_mask"].bool()
        torch.testing.assert_close(acts[f"q_rotary.{layer}"][mask], q.transpose(1, 2)[mask].detach())
        torch.testing.assert_close(
            acts[f"k_rotary.{layer}"][mask], repeat_kv(k, 2).transpose(1, 2)[mask].detach()
        )


@pytest.mark.parametrize("kind", ["q_rotary", "k_rotary"])
def test_an_edit_reaches_the_scores(kind):
    model, batch = models.llama(), models.text_batch()
    capture = tg.Capture(model, ["attn_scores.1", "attn_pattern.1"])
    plain = capture(TensorDict(batch))["acts"]
    with torch.no_grad(), tg.Intervene(model, {f"{kind}.1": tg.Scale(0.5, heads=[1])}), capture as calls:
        model(**batch)
    edited, open_ = calls[0]["acts", "attn_scores.1"], plain["attn_pattern.1"] > 0
    expected = plain["attn_scores.1"].clone()
    expected[:, 1] *= 0.5
    torch.testing.assert_close(edited[open_], expected[open_])


def test_a_norm_of_values_is_seen():
    """What is projected is not what the pattern weighs: v is refused, and pattern and z stay."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
            self.num_heads = 2

        def forward(self, x):
            q, k, v = (
                p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
            )
            v = v / v.norm(dim=-1, keepdim=True)
            return self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model = models.network(Attention)
    assert {"q", "k", "z", "head_output", "attn_pattern"} <= {e.site.kind for e in tg.available_sites(model)}
    with pytest.raises(
        RuntimeError, match="'v' of .*'blocks.0.attn.v_proj' gives is not what the pattern weighs"
    ):
        tg.Capture(model, "v")
