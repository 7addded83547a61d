"""Edits land on the same tokens in padded batches and in every step of generate."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

import models
import tdgeom as tg
from editing import ALL, hook_count, other_for
from tdgeom.model.capture import Capture
from tdgeom.model.intervene import Intervene


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "gemma", "phi"])
@pytest.mark.parametrize("positions", ["last", "first", "last-1", 2, slice(1, 3), "random-2"])
def test_a_padded_batch_equals_the_prompts_one_by_one(name, positions):
    model, ids, lengths = ALL[name](), models.text_batch()["input_ids"], [7, 4, 5]
    torch.manual_seed(1)
    steer = tg.Steer(torch.randn(models.WIDTH), positions=positions)
    context = Intervene(model, {"residual_output.0": steer, "z.1": tg.Ablate(heads=1, positions=positions)})
    alone = [
        context(TensorDict({"input_ids": ids[i : i + 1, :n]}))["logits"][0] for i, n in enumerate(lengths)
    ]
    for side in ("left", "right"):
        padded, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
        spans = [slice(9 - n, 9) if side == "left" else slice(0, n) for n in lengths]
        for row, (span, n) in enumerate(zip(spans, lengths)):
            padded[row, span], mask[row, span] = ids[row, :n], 1
        together = context(TensorDict({"input_ids": padded, "attention_mask": mask}))["logits"]
        for row, span in enumerate(spans):
            torch.testing.assert_close(together[row, span], alone[row], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("positions", ["last", 2, 8, slice(5, 9), "all"])
def test_positions_of_cached_steps_count_the_whole_sequence(llama, positions):
    """With a cache each token is computed once; without one the same edits are made again every step."""
    given = models.text_batch()
    settings = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    torch.manual_seed(1)
    edit = tg.Steer(3 * torch.randn(models.WIDTH), positions=positions)
    with Intervene(llama, {"residual_output.0": edit}), Capture(llama, "residual_output.0") as calls:
        tokens = llama.generate(**given, **settings, use_cache=True)
    base = llama.generate(**given, **settings)
    seen = torch.cat([call["acts", "residual_output.0"] for call in calls], 1)
    plain = Capture(llama, "residual_output.0")(TensorDict({"input_ids": tokens[:, :10]}))[
        "acts", "residual_output.0"
    ]
    changed = ((seen - plain).norm(dim=-1) > 1e-2)[0].nonzero().flatten().tolist()
    expected = {"last": [6, 7, 8, 9], "all": list(range(10))}
    wanted = expected.get(positions) if isinstance(positions, str) else None
    wanted = wanted or ([positions] if isinstance(positions, int) else list(range(10))[positions])
    assert changed == wanted
    if positions != "last":  # "last" of an uncached step is another token than that of the step before
        with Intervene(llama, {"residual_output.0": edit}):
            assert torch.equal(tokens, llama.generate(**given, **settings, use_cache=False))
    assert torch.equal(base, llama.generate(**given, **settings))
    assert hook_count(llama) == 0


def test_a_mask_of_the_prompt_selects_nothing_in_later_steps(llama):
    given = models.text_batch()
    settings = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    chosen = torch.zeros(3, 7, dtype=torch.bool)
    chosen[:, [1, 4]] = True
    vector = 9 * torch.randn(models.WIDTH, generator=torch.Generator().manual_seed(1))
    tokens = []
    for positions in (chosen, [1, 4]):
        with Intervene(llama, {"residual_output.0": tg.Steer(vector, positions=positions)}):
            tokens.append(llama.generate(**given, **settings))
    assert torch.equal(*tokens)
    assert not torch.equal(tokens[0], llama.generate(**given, **settings))
    with (
        pytest.raises(ValueError, match=r"boolean mask of shape \(3, 7\)"),
        Intervene(llama, {"residual_output.0": tg.Steer(vector, positions=chosen[:, :5])}),
    ):
        llama(**given)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_caches_of_fixed_size_change_nothing(name):
    """Generate then makes the whole attention bias itself: what is padding is read from it."""
    model = models.TEXT_MODELS[name]() if name != "gemma3" else sliding()
    given = models.text_batch()
    given["attention_mask"][0, :3] = 0
    settings = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    for edits in (
        {"z.1": tg.Scale(0.0, heads=1, positions=slice(3, None))},
        {"attn_pattern.1": tg.BlockAttention(queries="last", keys=slice(0, 2), renormalise=True)},
        {"attn_scores.1": tg.BlockAttention(queries=[5, 8], keys=1)},
    ):
        with Intervene(model, edits), Capture(model, "residual_output.2") as calls:
            expected = model.generate(**given, **settings)
        with Intervene(model, edits), Capture(model, "residual_output.2") as fixed:
            found = model.generate(**given, **settings, cache_implementation="static")
        assert torch.equal(found, expected)
        for one, other in zip(calls, fixed, strict=True):
            one, other = (call["acts", "residual_output.2"][:, -1] for call in (one, other))
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def sliding():
    import transformers as tf

    return models._seeded(tf.Gemma3ForCausalLM, tf.Gemma3TextConfig(**models._GEMMA, sliding_window=4))


def test_generation_with_two_stacks():
    model = models.t5()
    torch.manual_seed(1)
    edits = {
        "encoder.residual_output.0": tg.Steer(torch.randn(16), positions="last"),
        "decoder.z.1": tg.Ablate(heads=1),
    }
    settings = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False)
    mask = models.text_batch()["attention_mask"].clone()
    mask[0, 4:] = 0
    given = {**models.text_batch(), "attention_mask": mask}
    encoder, decoder = Capture(model, "encoder.residual_output.0"), Capture(model, "decoder.z.1")
    with encoder as plain:
        model.generate(**given, **settings)
    with Intervene(model, edits), encoder as one, decoder as two:
        model.generate(**given, **settings)
    key = ("acts", "encoder.residual_output.0")
    moved = (one[0][key] - plain[0][key]).norm(dim=-1) > 1e-3
    assert moved.nonzero().tolist() == [[0, 3], [1, 6], [2, 6]]
    assert all(call["acts", "decoder.z.1"][:, :, 1].abs().sum() == 0 for call in two)
    assert hook_count(model) == 0


def test_patching_a_prompt_and_generating_on(llama):
    given, other = models.text_batch(), other_for("llama")
    settings = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    with Intervene(llama, {"residual_input": tg.Patch(inputs=other)}):
        tokens = llama.generate(**given, **settings)
    assert torch.equal(tokens[:, 7:], llama.generate(**other, **settings)[:, 7:])
