"""Where the structure misleads, the numbers of a tiny pass say so."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tensordict import TensorDict

import models
from tdgeom.hooks import Capture, Intervene
from tdgeom.hooks.verify import _DONE


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


def test_a_stream_that_is_not_where_it_seems():
    config = tf.FalconConfig(
        vocab_size=models.VOCAB, hidden_size=models.WIDTH, num_hidden_layers=2, num_attention_heads=4,
        multi_query=False, parallel_attn=False,
    )  # fmt: skip
    model = models._seeded(tf.FalconForCausalLM, config)
    with pytest.raises(
        RuntimeError, match="'residual_mid' of FalconForCausalLM.*residual_input \\+ attn_output"
    ):
        Capture(model, "residual_mid")
    Capture(model, ["v", "head_output"])


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
    Capture(model, ["residual_input", "attn_output", "z"])  # nothing in doubt
    assert len(calls) == 1
    assert ran == []  # the user's hooks see no call
    assert model.training
    assert "forward" not in model.transformer.h[0].attn.__dict__
    assert sum(len(m._forward_hooks) for m in model.modules()) == 1
    assert ("v" in {kind for _, kind in _DONE[model]}) and len(_DONE[model]) == 1
