"""Edits act, and come first: compiled code, hooks of others, places that never run, positions that nobody has."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tensordict import TensorDict
from torch import nn

import models
import tdgeom as tg
from editing import hook_count, logits
from tdgeom.model.capture import Capture
from tdgeom.model.intervene import Intervene

SCALE = {"residual_output.1": tg.Scale(0.0)}


def test_an_edit_is_in_the_hidden_states_whatever_was_called_before():
    batch = models.text_batch()
    for before in (False, True):
        model = models.llama()
        if before:
            model(**batch, output_hidden_states=True)
        with Intervene(model, SCALE):
            for _ in range(2):
                assert (
                    float(model(**batch, output_hidden_states=True).hidden_states[2].detach().abs().max())
                    == 0
                )
        assert float(model(**batch, output_hidden_states=True).hidden_states[2].detach().abs().max()) > 0


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("when", ["before", "inside", "inside, in front", "between calls"])
def test_hooks_of_others_see_what_an_edit_left(when, side):
    model, x, seen = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.ones(2, 4), []

    def look(*args):
        seen.append(args[-1][0] if isinstance(args[-1], tuple) else args[-1])

    def register(**options):
        module = model[1]
        if side == "output":
            return module.register_forward_hook(look, **options)
        return module.register_forward_pre_hook(look, **options)

    handle = register() if when == "before" else None
    context = Intervene(model, {f"module_{side}:1": tg.Scale(0.0)})
    with torch.no_grad(), context:
        if when == "inside":
            handle = register()
        if when == "inside, in front":
            handle = register(prepend=True)
        model(x)
        if when == "between calls":
            handle = register(prepend=True)
        model(x)
    assert len(seen) == (1 if when == "between calls" else 2)
    assert all(float(value.abs().max()) == 0 for value in seen)
    with torch.no_grad():
        model(x)
    assert float(seen[-1].abs().max()) > 0  # and what others have hung stays, where it was
    handle.remove()
    assert hook_count(model) == 0


def test_the_order_among_contexts_is_that_of_entering_beside_hooks_of_others():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.ones(2, 4)
    site, others = "module_output:0", []
    plain = model[0](x).detach()
    model[0].register_forward_hook(lambda m, a, o: others.append(o.detach()))
    outer, middle, inner = (Capture(model, site) for _ in range(3))
    with (
        torch.no_grad(),
        outer as one,
        Intervene(model, {site: tg.Scale(2.0)}),
        middle as two,
        Intervene(model, {site: lambda value: value + 1.0}),
        inner as three,
    ):
        model[0].register_forward_hook(lambda m, a, o: others.append(o.detach()), prepend=True)
        for _ in range(2):
            model(x)
    for calls, right in ((one, plain), (two, 2 * plain), (three, 2 * plain + 1)):
        assert [torch.equal(call["acts", site], right) for call in calls] == [True, True]
    assert len(others) == 4 and all(torch.equal(value, 2 * plain + 1) for value in others)


def test_a_capture_reads_what_hooks_of_others_have_made_of_it():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.ones(2, 4)
    model[0].register_forward_hook(lambda m, a, o: o * 0)
    with torch.no_grad(), Capture(model, "module_output:0") as calls:
        model(x)
    assert float(calls[0]["acts", "module_output:0"].abs().max()) == 0


def test_a_place_that_never_runs_is_said():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x, every=False):
            x = self.layers[0](x)
            return self.layers[1](x) if every else nn.functional.linear(x, self.layers[1].weight)

    model, x = Skips(), torch.ones(2, 4)
    edits = {"residual_output": tg.Scale(0.0)}
    said = r"edits of Skips had no effect in this block: 'residual_output\.1' never fired"
    with pytest.warns(UserWarning, match=said), Intervene(model, edits):
        model(x)
    with pytest.raises(RuntimeError, match=said), Intervene(model, edits, missing="raise"):
        model(x)
    with Intervene(model, edits, missing="ignore"):
        model(x)
    with Intervene(model, edits, missing="raise"):  # once in a block is enough
        model(x)
        model(x, every=True)
    with pytest.raises(RuntimeError, match=said):
        Intervene(model, edits, missing="raise", in_keys=["x"], model_outputs="y")(TensorDict({"x": x}))
    with pytest.warns(UserWarning, match="no call of Skips was seen"), Intervene(model, edits):
        pass
    with pytest.raises(KeyError, match="mine"), Intervene(model, edits, missing="raise"):
        raise KeyError("mine")
    with pytest.raises(ValueError, match="missing= expects 'warn', 'raise' or 'ignore'"):
        Intervene(model, edits, missing="say")
    assert hook_count(model) == 0


def test_an_edit_that_finds_none_of_its_positions_is_said():
    model, batch = models.llama(), models.text_batch()
    batch["attention_mask"][:, :4] = 0  # three tokens each
    said = r"Steer at 'residual_output\.1' found no position positions=5 in any sequence"
    vector = torch.ones(models.WIDTH)
    with (
        pytest.warns(UserWarning, match=said),
        Intervene(model, {"residual_output.1": tg.Steer(vector, positions=5)}),
    ):
        model(**batch)
    with Intervene(model, {"residual_output.1": tg.Steer(vector, positions=5)}, missing="raise"):
        model(**batch)
        model(**models.text_batch())  # in one call of the block is enough
    with Intervene(model, {"residual_output.1": tg.Steer(vector, positions=4)}, missing="raise"):
        settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        model.generate(**batch, **settings)  # a position of a generated token
    match = r"BlockAttention at 'attn_pattern\.1' found no position queries='all', keys=5"
    cut = Intervene(model, {"attn_pattern.1": tg.BlockAttention(keys=5)}, missing="raise")
    with pytest.raises(RuntimeError, match=match), cut:
        model(**batch)
    edit = tg.Scale(0.5, positions=5)
    with pytest.warns(UserWarning, match=r"'mlp_output\.0' found no position"):
        Intervene(model, {"mlp_output.0": edit, "mlp_output.1": tg.Scale(0.5)})(TensorDict(batch))


def compiled_models():
    def forward_of_the_model(model):
        model.forward = torch.compile(model.forward, backend="eager")

    def forward_of_a_layer(model):
        model.model.layers[1].forward = torch.compile(model.model.layers[1].forward, backend="eager")

    def forward_in_the_class(model):
        kind = type(model.model)
        model.model.__class__ = type(
            kind.__name__, (kind,), {"forward": torch.compile(kind.forward, backend="eager")}
        )

    def wrapped_forward(model):
        import functools

        inner = torch.compile(model.model.forward, backend="eager")
        model.model.forward = functools.partial(inner)

    def layer_itself(model):
        model.model.layers[1].compile(backend="eager")

    return [forward_of_the_model, forward_of_a_layer, forward_in_the_class, wrapped_forward, layer_itself]


@pytest.mark.parametrize("compiled", compiled_models(), ids=lambda f: f.__name__)
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_code_on_the_way_is_refused(compiled, warm):
    torch._dynamo.reset()
    model, batch = models.llama(), models.text_batch()
    early = [Capture(model, "mlp_output.1"), Intervene(model, {"mlp_output.1": tg.Scale(0.0)})]
    compiled(model)
    if warm:
        logits(model, batch)
    refused = pytest.raises(RuntimeError, match=r"expected a model whose hooks fire.*compiled.*Remedy")
    for make in (
        lambda: Capture(model, "mlp_output.1"),
        lambda: Intervene(model, {"mlp_output.1": tg.Scale(0.0)}),
        lambda: early[0].__enter__(),
        lambda: early[1].__enter__(),
        lambda: early[0](TensorDict(batch)),
        lambda: early[1](TensorDict(batch)),
    ):
        with refused:
            make()
    assert hook_count(model) <= 1  # the compiled forward


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_layer_s_compiled_forward_is_its_own_output_all_the_same():
    torch._dynamo.reset()
    model, batch = models.llama(), models.text_batch()
    with torch.no_grad(), Intervene(models.llama(), SCALE) as plain:
        right = plain.model(**batch).logits
    layer = model.model.layers[1]
    layer.forward = torch.compile(layer.forward, backend="eager")
    logits(model, batch)
    with torch.no_grad(), Intervene(model, SCALE), Capture(model, "residual_output.1") as calls:
        torch.testing.assert_close(model(**batch).logits, right)
    assert float(calls[0]["acts", "residual_output.1"].abs().max()) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_wrapper_around_the_model_is_seen_by_what_does_not_fire():
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.ones(2, 4)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    with pytest.warns(UserWarning, match="no call of Sequential was seen.*compiled"), Intervene(model, SCALE):
        compiled(x)
    with pytest.raises(RuntimeError, match="compiled"), Intervene(model, SCALE, missing="raise"):
        compiled(x)
    with (
        pytest.warns(UserWarning, match=r"no call of Sequential was seen.*[Cc]ompiled"),
        Capture(model, "residual_output"),
    ):
        compiled(x)


def test_patterns_leave_the_user_s_call_what_it_is():
    """Falcon's kernels scale the bias of alibi in two ways; padding attends to nothing in one, to everything in the other."""
    torch.manual_seed(0)
    falcon = tf.FalconConfig(
        vocab_size=models.VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, alibi=True,
        parallel_attn=False, multi_query=False, initializer_range=0.3,
    )  # fmt: skip
    padded = models.text_batch()
    padded["attention_mask"][0, :3] = 0
    for model, batch in (
        (tf.FalconForCausalLM(falcon).eval(), models.text_batch()),
        (models.llama(), padded),
        (models.gpt2(), padded),
        (models.bert(), padded),
    ):
        assert model.config._attn_implementation == "sdpa"
        base = logits(model, batch)
        with torch.no_grad(), Capture(model, ["attn_scores", "attn_pattern"]) as calls:
            torch.testing.assert_close(model(**batch).logits, base, rtol=1e-4, atol=1e-4)
        for layer in range(model.config.num_hidden_layers):
            scores, pattern = (
                calls[0]["acts", f"{kind}.{layer}"] for kind in ("attn_scores", "attn_pattern")
            )
            torch.testing.assert_close(pattern, scores.softmax(-1))
        settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        if model.can_generate():
            right = model.generate(**batch, **settings)
            with Capture(model, "attn_pattern") as calls:
                assert torch.equal(model.generate(**batch, **settings), right)
            heads = model.config.num_attention_heads
            assert [call["acts", "attn_pattern.0"].shape[1:] for call in calls] == [
                (heads, 7, 7),
                (heads, 1, 8),
                (heads, 1, 9),
            ]


def test_a_kernel_that_nobody_can_look_into_is_said_once():
    model, batch = models.llama(attn_implementation="eager"), models.text_batch()
    right = Capture(model, "attn_pattern")(TensorDict(batch))["acts"]
    other = models.llama()
    other.config._attn_implementation_internal = "flex_attention"
    with pytest.warns(
        UserWarning, match="attention kernel 'flex_attention' of LlamaForCausalLM.*eager kernel"
    ):
        found = Capture(other, "attn_pattern")(TensorDict(batch))["acts"]
    Capture(other, "attn_pattern.1")(TensorDict(batch))
    assert other.config._attn_implementation_internal == "flex_attention"
    for site, value in right.items():
        torch.testing.assert_close(found[site], value)
