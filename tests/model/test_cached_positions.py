"""Positions count over the whole sequence in steps with a cache, whatever the cache is called and whatever it tells."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tensordict.nn import TensorDictSequential

import models
import tdgeom as tg
from tdgeom.model.calls.cached_tokens import CachedTokens, told_length
from tdgeom.model.calls.model_inputs import position_ids

_HYBRID = {**models._LLAMA, "num_hidden_layers": 4}
MODELS = {
    "llama": models.llama,
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**{**models._LLAMA, "sliding_window": 4})),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**{**models._GEMMA, "sliding_window": 4})),
    "mamba": lambda: tf.MambaForCausalLM(
        tf.MambaConfig(vocab_size=models.VOCAB, hidden_size=16, num_hidden_layers=3, state_size=4, initializer_range=0.3)
    ),
    "recurrent_gemma": lambda: tf.RecurrentGemmaForCausalLM(
        tf.RecurrentGemmaConfig(**{**models._LLAMA, "lru_width": 16, "attention_window_size": 6})
    ),
    "lfm2": lambda: tf.Lfm2ForCausalLM(tf.Lfm2Config(**models._LLAMA, full_attn_idxs=[1])),
    "jamba": lambda: tf.JambaForCausalLM(
        tf.JambaConfig(
            **_HYBRID, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=4, mamba_dt_rank=4,
            use_mamba_kernels=False,
        )
    ),
}  # fmt: skip
IDS = torch.randint(4, models.VOCAB, (2, 7), generator=torch.Generator().manual_seed(2))
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0


def build(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.generation_config.eos_token_id = None
    return model


def generate(model, **options):
    given = {
        "input_ids": IDS,
        "attention_mask": MASK,
        "do_sample": False,
        "pad_token_id": 0,
        "max_new_tokens": 4,
    }
    return model.generate(**{**given, **options})


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", list(MODELS))
def test_an_edit_by_number_is_the_same_with_and_without_a_cache(name, cache):
    model = build(name)
    kept = {} if cache == "dynamic" else {"cache_implementation": "static"}
    for position in (2, "first", 8, slice(5, 8)):
        edits = {"residual_output.1": tg.Steer(torch.full((16,), 0.7), positions=position)}
        with torch.no_grad(), tg.Intervene(model, edits):
            out = [
                torch.stack(generate(model, return_dict_in_generate=True, output_logits=True, **how).logits)
                for how in ({"use_cache": False}, kept)
            ]
        assert float((out[0] - out[1]).norm() / out[0].norm()) < 1e-4, position


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", list(MODELS))
def test_rows_of_recorded_steps_have_their_places(name, cache):
    model = build(name)
    kept = {} if cache == "dynamic" else {"cache_implementation": "static"}
    with torch.no_grad(), tg.Capture(model, "residual_output.1") as calls:
        generate(model, **kept)
    rows = [tg.SelectTokens(calls[0]["acts"].keys())(call)["row_id"] & (2**20 - 1) for call in calls]
    assert rows[0].tolist() == [*range(7), *range(4)]
    assert [step.tolist() for step in rows[1:]] == [[7 + n, 4 + n] for n in range(3)]
    read = TensorDictSequential(tg.SelectTokens(["residual_output.1"]), tg.Collect(["residual_output.1"]))
    found = tg.run(read, calls, progress=False)["collected", "residual_output.1"]
    whole = generate(model)[:, :-1]
    mask = torch.cat([MASK, MASK.new_ones(2, 3)], 1)
    with torch.no_grad(), tg.Capture(model, "residual_output.1") as once:
        numbers = {} if name == "mamba" else {"position_ids": position_ids(mask)}
        model(input_ids=whole, attention_mask=mask, use_cache=False, **numbers)
    right = once[0]["acts", "residual_output.1"]
    right = torch.cat([right[:, :7][MASK.bool()], right[:, 7:].transpose(0, 1).flatten(0, 1)])
    assert float((found - right).norm() / right.norm()) < 1e-4


@pytest.mark.parametrize("name", ["llama", "mamba", "jamba"])
def test_a_loop_of_ones_own_without_a_mask(name):
    model, which = build(name), "cache_params" if name == "mamba" else "past_key_values"
    edits = {"residual_output.1": tg.Steer(torch.full((16,), 0.7), positions=8)}
    text = torch.cat([IDS, IDS[:, :3]], 1)
    with torch.no_grad(), tg.Intervene(model, edits):
        right = model(input_ids=text, use_cache=False).logits[:, 7:]
        found, kept = [], None
        for part in (text[:, :7], *text[:, 7:].split(1, 1)):
            out = model(input_ids=part, use_cache=True, **({} if kept is None else {which: kept}))
            kept = out[which]
            found.append(out.logits[:, -1:])
    assert float((torch.cat(found[1:], 1) - right).norm() / right.norm()) < 1e-4


def test_a_cache_that_tells_nothing_is_refused_but_for_the_newest_token():
    model = build("mamba")
    with torch.no_grad():
        kept = model(input_ids=IDS, use_cache=True).cache_params  # filled where nobody counted
    for position in (8, "first", slice(0, 2)):
        steer = tg.Steer(torch.ones(16), positions=position)
        with (
            pytest.raises(
                ValueError, match="how many tokens the cache of the model's call holds is not known"
            ),
            tg.Intervene(model, {"residual_output.1": steer}),
        ):
            model(input_ids=IDS[:, :1], cache_params=kept, use_cache=True)
    steer = tg.Steer(torch.ones(16), positions="last")
    with torch.no_grad(), tg.Intervene(model, {"residual_output.1": steer}):
        model(input_ids=IDS[:, :1], cache_params=kept, use_cache=True)
    with torch.no_grad(), tg.Capture(model, "residual_output.1") as calls:
        model(input_ids=IDS[:, :1], cache_params=kept, use_cache=True)
    with pytest.raises(ValueError, match="how many tokens the cache"):
        tg.SelectTokens(["residual_output.1"])(calls[0])


def test_xlnets_memories_are_no_count_of_tokens():
    """It reads its last tokens again at every step."""
    torch.manual_seed(0)
    config = tf.XLNetConfig(vocab_size=models.VOCAB, d_model=16, n_layer=2, n_head=4, d_inner=32)
    model = tf.XLNetLMHeadModel(config).eval()
    with (
        pytest.raises(ValueError, match="how many tokens the cache"),
        tg.Intervene(model, {"residual_output.1": tg.Steer(torch.ones(16), positions=2)}),
    ):
        generate(model, attention_mask=torch.ones_like(IDS))


def test_what_caches_tell_and_what_was_counted():
    class Silent:
        pass

    counted, cache = CachedTokens(), Silent()
    assert told_length(cache) is None and counted.past(cache, None, 1, None, None) is None
    assert counted.past(cache, None, 1, 8, None) == 7  # a mask of eight columns beside one token
    counted.holds(cache, 7)
    assert counted.past(cache, None, 1, None, None) == 7
    assert counted.past(cache, None, 1, 9, None) is None  # the mask says otherwise
    assert counted.past(cache, 0, 1, 8, None) == 7  # its first layer has no keys to count
    assert counted.past(cache, 0, 5, None, None) == 0  # begun anew
    assert counted.past(cache, 5, 1, None, None) == 5 and counted.past(cache, None, 1, None, 3) == 3
    assert counted.past(None, 0, 4, None, None) == 0
