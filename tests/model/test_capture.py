"""Capture as a module and as a context: what it gives, and what it leaves behind (nothing)."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

import models
from tdgeom.model.capture import Capture


def hook_count(model):
    return sum(
        len(m._forward_hooks)
        + len(m._forward_pre_hooks)
        + len(m._backward_hooks)
        + len(m._forward_hooks_with_kwargs)
        for m in model.modules()
    )


def batch():
    return TensorDict(models.text_batch())


@pytest.fixture
def gpt2():
    return models.gpt2()


class Block(nn.Module):
    """A residual block that counts its calls and can be told to fail or to write in place."""

    def __init__(self, error=None, in_place=False):
        super().__init__()
        self.linear, self.error, self.in_place, self.calls = nn.Linear(4, 4), error, in_place, 0

    def forward(self, x):
        self.calls += 1
        if self.error is not None:
            raise self.error
        return x.add_(self.linear(x)) if self.in_place else x + self.linear(x)


def stack(*blocks):
    return nn.Sequential(*(blocks or (Block(), Block(), Block())))


# --------------------------------------------------------------------------------------- module form


def test_keys_and_names(gpt2):
    capture = Capture(gpt2, ["residual_input", "final_norm"], layers=[0, -1], prefix="b/")
    optional = ["attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "encoder_hidden_states"]
    assert capture.in_keys[:6] == ["input_ids", *optional]
    assert capture.optional_in_keys == capture.in_keys[1:]
    assert capture.out_keys == [
        ("acts", f"b/{name}") for name in ("residual_input.0", "residual_input.2", "final_norm")
    ]
    assert capture.sites[1] == "b/residual_input.2"
    assert (capture.sites[1].kind, capture.sites[1].layer, capture.sites[1].prefix) == (
        "residual_input",
        2,
        "b/",
    )
    assert capture.module_paths["b/residual_input.2"] == "transformer.h.2"
    td = capture(batch())
    assert set(td.keys(True, True)) == {"input_ids", "attention_mask", *capture.out_keys}
    assert td["acts", "b/final_norm"].shape == (3, 7, models.WIDTH)
    assert not td["acts", "b/final_norm"].requires_grad


def test_the_pass_stops_right_after_the_last_site():
    for sites, expected in (
        ("residual_input", [1, 1, 0]),
        ("residual_output.1", [1, 1, 0]),
        ("embed", [0, 0, 0]),
    ):
        model = stack()
        x = TensorDict({"input": torch.randn(2, 4)})
        first = Capture(model, sites)(x.clone())["acts"]
        assert [block.calls for block in model] == [
            1,
            1,
            1,
        ]  # once a model: how often every site fires in a whole pass
        second = Capture(model, sites)(x.clone())["acts"]
        assert [block.calls - 1 for block in model] == expected
        assert all(torch.equal(first[site], second[site]) for site in first.keys())


def test_early_stop_skips_the_last_block_of_a_language_model(gpt2):
    ran = []
    for index, block in enumerate(gpt2.transformer.h):
        block.attn.register_forward_hook(lambda *_, index=index: ran.append(index))
    gpt2.lm_head.register_forward_hook(lambda *_: ran.append("head"))
    Capture(gpt2, "residual_input")(batch())
    assert ran == [0, 1, 2, "head"]
    ran.clear()
    Capture(gpt2, "residual_input")(batch())
    assert ran == [0, 1]


@pytest.mark.parametrize("kind", ["offload", "sharded"])
def test_offloaded_and_sharded_models_run_to_the_end(kind):
    model = stack()
    if kind == "offload":
        model[1]._hf_hook = object()
    else:
        model[1].__class__ = type("FSDPModule", (Block,), {})
    Capture(model, "residual_input")(TensorDict({"input": torch.randn(2, 4)}))
    assert [block.calls for block in model] == [1, 1, 1]


def test_model_outputs_are_kept_and_the_pass_goes_on(gpt2):
    td = Capture(gpt2, "residual_input", layers=0, model_outputs=["logits"], prefix="b/")(batch())
    assert set(td.keys()) == {"input_ids", "attention_mask", "acts", "b/logits"}
    torch.testing.assert_close(td["b/logits"], gpt2(**models.text_batch()).logits)
    with pytest.raises(ValueError, match="'nothing'.*'logits'"):
        Capture(gpt2, model_outputs="nothing")(batch())
    plain = stack()
    td = Capture(plain, "embed", model_outputs="y", in_keys=["x"])(TensorDict({"x": torch.ones(2, 4)}))
    torch.testing.assert_close(td["y"], plain(torch.ones(2, 4)).detach())


@pytest.mark.parametrize("build", [models.gpt2, models.llama])
def test_padding_changes_nothing_at_attended_positions(build):
    model, ids = build(), models.text_batch()["input_ids"]
    capture = Capture(model, ["residual_input", "residual_output"])
    plain = capture(TensorDict({"input_ids": ids}))["acts"]
    pad, ones = torch.zeros(3, 4, dtype=torch.long), torch.ones_like(ids)
    for order, where in ((1, slice(4, None)), (-1, slice(0, 7))):
        padded = TensorDict(
            {
                "input_ids": torch.cat([pad, ids][::order], 1),
                "attention_mask": torch.cat([pad, ones][::order], 1),
            }
        )
        acts = capture(padded)["acts"]
        for site in capture.sites:
            torch.testing.assert_close(acts[site][:, where], plain[site], rtol=1e-4, atol=1e-4)
        assert "position_ids" not in padded.keys()


@pytest.mark.parametrize("name", ["roberta", "esm", "gpt2"])
def test_a_batch_without_padding_is_given_as_it_is(name):
    model, given = models.TEXT_MODELS[name](), models.text_batch()
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    Capture(model)(TensorDict(given))
    assert set(seen[0]) == {"input_ids", "attention_mask"} | (set(seen[0]) & {"use_cache"})
    assert seen[0].get("use_cache", False) is False and len(seen) == 1


def test_what_the_model_is_called_with():
    seen = {}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, x, y=None, labels=None, row_id=None, hint=None, absent="default"):
            seen.update(x=x, y=y, labels=labels, row_id=row_id, hint=hint, absent=absent)
            for layer in self.layers:
                x = layer(x)
            return x

    entries = {name: torch.ones(2, 4) for name in ("x", "y", "labels", "row_id", "hint", "other")}
    Capture(Model(), withhold=["hint"])(TensorDict(entries))
    assert {name for name, value in seen.items() if isinstance(value, torch.Tensor)} == {"x", "y"}
    assert seen["absent"] == "default"
    nested = TensorDict({("data", "first"): torch.zeros(2, 4)})
    for in_keys in ([("data", "first")], {"x": ("data", "first")}):
        capture = Capture(Model(), in_keys=in_keys)
        assert capture.in_keys == [("data", "first"), "y", "hint", "absent"]
        assert capture.optional_in_keys == ["y", "hint", "absent"]
        assert capture(nested)["acts", "residual_input.0"].sum() == 0
    with pytest.raises(KeyError, match=r"expected the model's input 'x'.*in_keys=\{'x': <key>\}"):
        Capture(Model())(TensorDict({"z": torch.ones(2)}))


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_more_tokens_than_learned_positions_are_refused(name):
    model = getattr(models, name)()
    limit = model.config.max_position_embeddings
    ids = torch.ones(2, limit + 1, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=rf"{limit + 1} tokens, {type(model).__name__} takes {limit}. Cut them: max_length"
    ):
        Capture(model)(TensorDict(input_ids=ids))
    acts = Capture(model)(TensorDict(input_ids=ids[:, :limit]))["acts", "residual_input.0"]
    assert acts.shape[1] == limit


@pytest.mark.parametrize("wrong", [models.VOCAB, -100])
def test_token_ids_beyond_the_embedding_are_refused(gpt2, wrong):
    ids = torch.tensor([[5, wrong, 7]])
    least, most = sorted((5, wrong))[0], max(7, wrong)
    match = rf"embeddings for token ids 0 to {models.VOCAB - 1}, the batch holds {least} to {most}\. Remedy: the tokenizer"
    with pytest.raises(ValueError, match=match):
        Capture(gpt2, "residual_input")(input_ids=ids)


def test_padding_beyond_the_learned_positions_and_rotary_positions_are_no_matter(gpt2):
    ids = torch.ones(1, gpt2.config.n_positions + 6, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[:, :6] = 0
    padded = Capture(gpt2)(TensorDict(input_ids=ids, attention_mask=mask))["acts", "residual_input.0"]
    plain = Capture(gpt2)(TensorDict(input_ids=ids[:, 6:]))["acts", "residual_input.0"]
    torch.testing.assert_close(padded[:, 6:], plain)
    llama = models.llama(max_position_embeddings=16)
    assert Capture(llama)(TensorDict(input_ids=ids))["acts", "residual_input.0"].shape[1] == ids.shape[1]


def test_every_training_flag_is_restored(gpt2):
    gpt2.train()
    gpt2.transformer.h[1].eval()
    before = [module.training for module in gpt2.modules()]
    seen = []
    gpt2.transformer.h[0].register_forward_hook(lambda module, *_: seen.append(module.training))
    Capture(gpt2)(batch())
    assert [module.training for module in gpt2.modules()] == before
    assert seen == [False]


def test_gradients_on_request(gpt2):
    td = Capture(gpt2, "residual_output.1", keep_graph=True)(batch())
    td["acts", "residual_output.1"].sum().backward()
    assert gpt2.transformer.h[1].mlp.c_fc.weight.grad is not None
    assert gpt2.transformer.h[2].mlp.c_fc.weight.grad is None


def test_dispatch_and_pipelines(gpt2):
    capture = Capture(gpt2, "residual_input", layers=[0, 1])
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[:, :3] = 0
    ids = models.text_batch()["input_ids"]
    first, second = capture(input_ids=ids, attention_mask=mask)
    expected = capture(TensorDict({"input_ids": ids, "attention_mask": mask}))["acts"]
    torch.testing.assert_close(second, expected["residual_input.1"])
    mean = TensorDictModule(lambda x: x.mean(), [("acts", "residual_input.1")], ["mean"])
    pipeline = TensorDictSequential(capture, mean)
    assert pipeline.in_keys == capture.in_keys
    assert pipeline(batch())["mean"].shape == ()
    assert list(pipeline.select_subsequence(out_keys=["mean"])) == [capture, mean]
    picked = copy.deepcopy(capture).select_out_keys(("acts", "residual_input.1"))
    torch.testing.assert_close(picked(input_ids=ids, attention_mask=mask), second)
    assert first.shape == second.shape


def test_a_clashing_batch_size_is_refused_and_a_matching_one_is_not(gpt2):
    assert Capture(gpt2)(TensorDict(models.text_batch(), batch_size=[3]))["acts"].batch_size == (3,)

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            return self.layers[1](self.layers[0](x.mean(0)))

    with pytest.raises(ValueError, match=r"batch_size \[\]"):
        Capture(Pooled())(TensorDict({"x": torch.ones(3, 4)}, batch_size=[3]))


# -------------------------------------------------------------------------------------- context form


def test_context_around_one_call(gpt2):
    module = Capture(gpt2, ["residual_input", "final_norm"])(batch())
    gpt2.train()
    capture = Capture(gpt2, ["residual_input", "final_norm"], model_outputs=["logits"])
    with capture as calls:
        out = gpt2.eval()(**models.text_batch())
    assert out.logits is not None
    assert len(calls) == 1
    assert calls[0].batch_size == ()
    assert set(calls[0].keys()) == {"input_ids", "attention_mask", "acts", "logits"}
    for site in capture.sites:
        torch.testing.assert_close(calls[0]["acts", site], module["acts", site])
    torch.testing.assert_close(calls[0]["logits"], out.logits.detach())


def test_context_changes_no_flag_and_no_gradient():
    model = stack().train()
    with Capture(model, "residual_output") as calls:
        out = model(torch.randn(2, 4))
        assert all(module.training for module in model.modules())
    assert out.requires_grad
    assert not calls[0]["acts", "residual_output.0"].requires_grad
    assert calls[0]["input"].shape == (2, 4)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_gives_one_tensordict_a_model_call(use_cache):
    model, given = models.llama(), models.text_batch()
    capture = Capture(model, ["residual_input", "residual_output"])
    with capture as calls:
        tokens = model.generate(
            **given, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=use_cache, pad_token_id=0
        )
    assert len(calls) == 4
    lengths = [7, 1, 1, 1] if use_cache else [7, 8, 9, 10]
    assert [call["acts", "residual_input.0"].shape[1] for call in calls] == lengths
    assert [call["input_ids"].shape[1] for call in calls] == lengths
    full = capture(TensorDict({"input_ids": tokens}))["acts"]
    for site in capture.sites:
        parts = [c["acts", site] for c in calls] if use_cache else [calls[-1]["acts", site]]
        torch.testing.assert_close(torch.cat(parts, 1), full[site][:, :10], rtol=1e-4, atol=1e-4)


def test_generate_with_two_stacks():
    model = models.t5()
    with Capture(model, "residual_output") as calls:
        model.generate(**models.text_batch(), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert len(calls) == 3
    assert calls[0]["acts", "encoder.residual_output.0"].shape == (3, 7, models.WIDTH)
    assert "encoder.residual_output.0" not in calls[1]["acts"].keys()
    assert calls[1]["acts", "decoder.residual_output.0"].shape == (3, 1, models.WIDTH)


def test_a_call_that_fails_leaves_the_next_one_alone():
    model = stack()
    model[2].error = ValueError("broken")
    with Capture(model, "residual_output", layers=[0, 1]) as calls:
        with pytest.raises(ValueError, match="broken"):
            model(torch.zeros(2, 4))
        model[2].error = None
        model(torch.ones(3, 4))
    assert [call["acts", "residual_output.0"].shape for call in calls] == [(3, 4)]


def test_entering_twice_is_an_error_and_two_captures_are_not():
    model = stack()
    first, second = Capture(model, "residual_input"), Capture(model, "residual_output")
    with first as one, second as two:
        with pytest.raises(RuntimeError, match="already in use.*second Capture"):
            first.__enter__()
        with pytest.raises(RuntimeError, match="already in use"):
            first(TensorDict({"input": torch.ones(2, 4)}))
        model(torch.ones(2, 4))
    assert len(one) == len(two) == 1
    with first as one:
        model(torch.ones(2, 4))
    assert len(one) == 1
    assert hook_count(model) == 0


def test_a_part_called_instead_of_the_model_is_a_call(gpt2):
    with Capture(gpt2) as calls:
        gpt2.transformer(**models.text_batch())
    whole = Capture(gpt2)(batch())
    assert len(calls) == 1 and set(calls[0].keys()) == {"input_ids", "attention_mask", "acts"}
    for site in whole["acts"].keys():
        torch.testing.assert_close(calls[0]["acts", site], whole["acts", site])
    assert hook_count(gpt2) == 0


# ------------------------------------------------------------------------------ nothing stays behind


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("form", ["module", "context"])
def test_hooks_go_whatever_happens_and_others_stay(error, form):
    model = stack(Block(), Block(error), Block())
    model.train()
    model[0].register_forward_hook(lambda *_: None)
    before = hook_count(model)
    capture = Capture(model, ["residual_input", "residual_output"])
    with pytest.raises(type(error)):
        if form == "module":
            capture(TensorDict({"input": torch.ones(2, 4)}))
        else:
            with capture:
                assert hook_count(model) > before
                model(torch.ones(2, 4))
    assert hook_count(model) == before
    assert all(module.training for module in model.modules())
    model[1].error = None
    assert len(capture(TensorDict({"input": torch.ones(2, 4)}))["acts"].keys()) == 6


def test_hooks_do_not_pile_up(gpt2):
    capture = Capture(gpt2)
    before = hook_count(gpt2)
    for _ in range(3):
        capture(batch())
        with capture:
            gpt2(**models.text_batch())
    assert hook_count(gpt2) == before


def test_no_activation_outlives_its_tensordict(gpt2):
    capture = Capture(gpt2, ["residual_input", "attn_output", "final_norm"])
    td = capture(batch())
    with capture as calls:
        gpt2(**models.text_batch())
    kept = [weakref.ref(value) for d in (td, calls[0]) for value in d["acts"].values()]
    storages = [weakref.ref(value.untyped_storage()) for d in (td, calls[0]) for value in d["acts"].values()]
    assert len(kept) == 14
    del td, calls
    gc.collect()
    assert [ref for ref in (*kept, *storages) if ref() is not None] == []


def test_a_tensor_modified_later_in_the_pass():
    model = stack(Block(), Block(in_place=True), Block())
    given = torch.randn(2, 4)
    with pytest.raises(RuntimeError, match=r"'residual_output\.0' was modified in place.*clone=True"):
        Capture(model, "residual_output")(TensorDict({"input": given.clone()}))
    with torch.no_grad(), pytest.raises(RuntimeError, match="clone=True"), Capture(model, "residual_output"):
        model(given.clone())
    acts = Capture(model, "residual_output", clone=True)(TensorDict({"input": given.clone()}))["acts"]
    torch.testing.assert_close(acts["residual_output.0"], model[0](given).detach())
    # nothing runs after the last site, so nothing can modify it
    Capture(model, "residual_output.0")(TensorDict({"input": given}))


def test_the_model_stays_the_user_s(gpt2):
    capture = Capture(gpt2)
    pipeline = TensorDictSequential(capture)
    assert capture.state_dict() == {}
    assert list(pipeline.parameters()) == []
    assert [m for m in pipeline.modules() if m is gpt2] == []
    pipeline.to(torch.float64)
    pipeline.train()
    assert gpt2.dtype == torch.float32
    assert not gpt2.training
    twin = copy.deepcopy(pipeline)
    assert twin[0].model is gpt2
    assert twin[0].sites == capture.sites
    torch.testing.assert_close(twin(batch())["acts"], capture(batch())["acts"])


def test_pickling_drops_the_model(gpt2):
    capture = Capture(gpt2, layers=[1])
    expected = capture(batch())["acts"]
    with capture:
        data = pickle.dumps(capture)
        gpt2(**models.text_batch())
    assert len(data) < 4000
    twin = pickle.loads(data)
    assert twin.sites == ["residual_input.1"]
    assert twin.sites[0].layer == 1
    for use in (lambda: twin(batch()), twin.__enter__, lambda: twin.model):
        with pytest.raises(RuntimeError, match=r"unpickled without its model \(a GPT2LMHeadModel\).*bind"):
            use()
    torch.testing.assert_close(twin.bind(gpt2)(batch())["acts"], expected)


# -------------------------------------------------------------------------------------------- errors


def test_compiled_models_are_refused():
    for compiled in (torch.compile(stack(), backend="eager"), stack()):
        if not hasattr(compiled, "_orig_mod"):
            compiled.compile(backend="eager")
        with pytest.raises(RuntimeError, match="compiled.*Remedy"):
            Capture(compiled)
    model = models.gpt2()
    model.transformer.h[1].compile(backend="eager")
    with pytest.raises(RuntimeError, match=r"submodule 'transformer\.h\.1' is compiled"):
        Capture(model)
    late = stack()
    capture = Capture(late)
    late[0].compile(backend="eager")
    with pytest.raises(RuntimeError, match="compiled"):
        capture(TensorDict({"input": torch.ones(2, 4)}))
    with pytest.raises(RuntimeError, match="compiled"):
        capture.__enter__()


class Loop(nn.Module):
    """Runs its blocks in an order and a number given from outside."""

    def __init__(self, order):
        super().__init__()
        self.layers, self.order = nn.ModuleList([Block(), Block()]), order

    def forward(self, x):
        for index in self.order:
            x = self.layers[index](x)
        return x


def test_a_site_that_never_fires():
    model = Loop([0])
    match = r"1 never did: residual_output\.1 \(layers\.1\)"
    with pytest.raises(RuntimeError, match=match):
        Capture(model, "residual_output")(TensorDict({"x": torch.ones(2, 4)}))
    with pytest.raises(RuntimeError, match=match), Capture(model, "residual_output"):
        model(torch.ones(2, 4))
    assert hook_count(model) == 0


def test_a_site_that_fires_too_often():
    with pytest.raises(RuntimeError, match=r"'residual_output\.0' fired 2 times.*expected 1"):
        Capture(Loop([0, 0, 1]), "residual_output")(TensorDict({"x": torch.ones(2, 4)}))


def test_a_module_without_a_tensor():
    class Nothing(Block):
        def forward(self, x):
            return {"x": "text"}

    model = stack(Nothing(), Nothing())
    with pytest.raises(RuntimeError, match="expected a tensor at the output of '0', got dict"):
        Capture(model, "residual_output")(TensorDict({"input": torch.ones(2, 4)}))
    with pytest.raises(TypeError, match=r"nn\.Module, got str"):
        Capture("gpt2")
