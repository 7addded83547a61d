"""One pass is one outermost call: parts called in the model's place, modules that run several times, passes run again."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

import models
import tdgeom as tg
from tdgeom.model.calls.verified import verified
from tdgeom.model.capture import Capture
from tdgeom.model.intervene import Intervene


class Twice(nn.Module):
    """A residual block whose one activation runs ``times`` times in a pass."""

    def __init__(self, width=8, times=2):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(width, width) for _ in range(times))
        self.relu = nn.ReLU()

    def forward(self, x):
        for linear in self.linears:
            x = x + self.relu(linear(x))
        return x


def net(times=2):
    torch.manual_seed(0)
    return nn.Sequential(*[Twice(times=times) for _ in range(3)]).eval()


def own_hook(module, run):
    """What a module gives at each of its calls, by a plain hook."""
    seen = []
    handle = module.register_forward_hook(lambda m, a, o: seen.append(o.detach().clone()))
    run()
    handle.remove()
    return seen


SITE = "module_output:1.relu"
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("times", [2, 3])
def test_a_module_that_runs_several_times_is_refused_in_every_form(times):
    model = net(times)
    said = r"'module_output:1\.relu' fired 2 times.*calls='first', 'last', 'all' or a number.*skip_classes="
    forms = {
        "module": lambda: Capture(model, SITE, in_keys=["x"])(TensorDict({"x": X})),
        "again": lambda: Capture(model, SITE, in_keys=["x"])(TensorDict({"x": X})),
        "with outputs": lambda: Capture(model, SITE, in_keys=["x"], model_outputs="y")(TensorDict({"x": X})),
        "edit": lambda: Intervene(model, {SITE: tg.Scale(2.0)}, in_keys=["x"], model_outputs="y")(TensorDict({"x": X})),
        "analysis": lambda: tg.analyze_model(model, [{"input": torch.randn(64, 8)}], sites=SITE, progress=False),
        "probe": lambda: tg.Probing(model, SITE, tg.LinearProbe()).run([{"input": X, "label": torch.arange(5) % 2}]),
    }  # fmt: skip
    for form, use in forms.items():
        with pytest.raises(RuntimeError, match=said):
            use()
            pytest.fail(form)
    for context in (Capture(model, SITE), Intervene(model, {SITE: tg.Scale(2.0)})):
        with pytest.raises(RuntimeError, match=said), context:
            model(X)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_call_that_is_meant():
    model = net(3)
    seen = own_hook(model[1].relu, lambda: model(X))
    wanted = {"first": seen[0], "last": seen[2], -1: seen[2], 0: seen[0], 1: seen[1], 2: seen[2]}
    for calls, right in wanted.items():
        capture = Capture(model, SITE, in_keys=["x"], calls=calls)
        assert torch.equal(capture(TensorDict({"x": X}))["acts", SITE], right)
        assert torch.equal(capture(TensorDict({"x": X}))["acts", SITE], right)
        with torch.no_grad(), Capture(model, SITE, calls=calls) as recorded:
            model(X)
        assert torch.equal(recorded[0]["acts", SITE], right)
    every = Capture(model, SITE, in_keys=["x"], calls="all")(TensorDict({"x": X}))["acts", SITE]
    assert torch.equal(every, torch.stack(seen, 1)) and every.shape == (5, 3, 8)
    with pytest.raises(RuntimeError, match=r"calls=3 means the call after 3 others.*fired \[3\] times"):
        Capture(model, SITE, in_keys=["x"], calls=3)(TensorDict({"x": X}))
    for wrong in ("second", -2, 1.0, True):
        with pytest.raises(ValueError, match="calls= expects 'first', 'last', 'all' or the number"):
            Capture(model, SITE, calls=wrong)


def test_the_call_that_is_edited():
    model = net(3)

    def by_own_hook(which):
        count = 0

        def edit(module, args, output):
            nonlocal count
            count += 1
            return output * 3 if count - 1 in which else output

        handle = model[1].relu.register_forward_hook(edit)
        out = model(X)
        handle.remove()
        return out

    with pytest.raises(RuntimeError, match="calls='last' needs to know how often '1.relu' runs"):
        Intervene(model, {SITE: tg.Scale(3.0)}, calls="last").__enter__()
    Capture(model, SITE, in_keys=["x"], calls="last")(TensorDict({"x": X}))
    for calls, which in (("first", [0]), (1, [1]), ("last", [2]), ("all", [0, 1, 2])):
        right = by_own_hook(which)
        with Intervene(model, {SITE: tg.Scale(3.0)}, calls=calls):
            for _ in range(2):
                assert torch.equal(model(X), right)
    never = pytest.warns(UserWarning, match="'module_output:1.relu' never fired")
    with never, Intervene(model, {SITE: tg.Scale(3.0)}, calls=3):
        model(X)


def test_globs_leave_such_modules_out():
    model = net()
    skip = {"skip_classes": [nn.ReLU, nn.ModuleList]}
    capture = Capture(model, "module_output:1.**", in_keys=["x"], **skip)
    assert sorted(capture.sites) == [
        "module_output:1",
        "module_output:1.linears.0",
        "module_output:1.linears.1",
    ]
    capture(TensorDict({"x": X}))
    with Intervene(model, {"module_output:1.**": tg.Scale(0.0)}, **skip):
        assert torch.equal(model(X), torch.zeros_like(X) + model[2](torch.zeros_like(X)))


def test_specs_and_analyses_pass_it_on():
    model = net()
    spec = tg.CaptureSpec([SITE], calls="last")
    assert tg.CaptureSpec.from_json(spec.to_json()) == spec
    seen = own_hook(model[1].relu, lambda: model(X))
    assert torch.equal(spec.build(model, in_keys=["x"])(TensorDict({"x": X}))["acts", SITE], seen[1])
    assert tg.CaptureSpec.of(spec.build(model, in_keys=["x"])[0]).calls == "last"
    rows = torch.randn(64, 8)
    norm = TensorDictModule(lambda x: x.norm(dim=1).mean(), ["sample"], [("spectrum", "norm")])
    results = {
        calls: tg.analyze_model(
            model, [{"input": rows}], sites=SITE, calls=calls, metrics=[norm], progress=False
        )
        for calls in ("first", "last")
    }
    first, last = (results[calls].metrics["norm"].item() for calls in ("first", "last"))
    by_hook = own_hook(model[1].relu, lambda: model(rows))
    for found, right in ((first, by_hook[0]), (last, by_hook[1])):
        assert found == pytest.approx(float(right.double().norm(dim=1).mean()), rel=1e-5)
    assert results["last"].metadata["settings"]["calls"] == "last"
    with pytest.raises(ValueError, match="calls='all' has several values for one row"):
        tg.analyze_model(model, [{"x": rows}], sites=SITE, calls="all")


class Loop(nn.Module):
    """One block, run as often as the input says."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), nn.Linear(4, 2)

    def forward(self, x):
        x = self.blocks[1](self.blocks[0](x))
        y = self.head(x)
        return y + self.blocks[0](x).sum() * 0  # runs again behind the last site


def test_what_runs_again_behind_the_last_site_is_counted_in_the_first_pass():
    model = Loop()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"'module_output:blocks\.0' fired 2 times"):
            Capture(model, "module_output:blocks.0")(TensorDict({"x": torch.ones(2, 4)}))
    Capture(model, "module_output:blocks.1")(TensorDict({"x": torch.ones(2, 4)}))
    counts = {place: count for (place, _), count in verified(model)["firings"].items()}
    assert counts == {("blocks.1", "output"): 1}


def test_the_counting_pass_gives_what_the_stopping_one_gives():
    class InPlace(nn.Module):
        def forward(self, x):
            return x.mul_(3.0)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), InPlace(), nn.Linear(4, 4))
    site, right = "module_output:1", model[1](model[0](X[:, :4])).detach()
    for mode in (torch.no_grad(), torch.inference_mode()):
        fresh = nn.Sequential(*model)  # nothing is known of it
        for _ in range(2):
            with mode:
                found = Capture(fresh, site)(TensorDict({"input": X[:, :4].clone()}))["acts", site]
            torch.testing.assert_close(found, right)


def test_an_encoder_needs_no_decoder_in_the_counting_pass():
    model, ids = models.t5(), models.text_batch()
    for _ in range(2):
        td = Capture(model, "encoder.residual_output")(TensorDict(ids))
        assert td["acts", "encoder.residual_output.0"].shape == (3, 7, models.WIDTH)


def test_parts_called_instead_of_the_model():
    model, batch = models.t5(), models.text_batch()
    capture = Capture(model, ["encoder.residual_output.0", "decoder.residual_output.0"])
    other = {**batch, "input_ids": batch["input_ids"].flip(0)}
    with torch.no_grad(), capture as calls:
        model.encoder(**batch)
        model.encoder(**other)
        model(**batch, decoder_input_ids=batch["input_ids"])
        hidden = model.encoder(**other)
        model(encoder_outputs=hidden, decoder_input_ids=batch["input_ids"])
    assert [sorted(call["acts"].keys()) for call in calls] == [
        ["encoder.residual_output.0"],
        ["encoder.residual_output.0"],
        ["decoder.residual_output.0", "encoder.residual_output.0"],
        ["decoder.residual_output.0", "encoder.residual_output.0"],
    ]
    key = ("acts", "encoder.residual_output.0")
    assert torch.equal(calls[0][key], calls[2][key]) and torch.equal(calls[1][key], calls[3][key])
    assert torch.equal(calls[1]["input_ids"], other["input_ids"])  # what each call was given
    assert torch.equal(calls[3]["input_ids"], other["input_ids"])
    assert torch.equal(calls[3]["decoder_input_ids"], batch["input_ids"])


def test_blocks_called_one_by_one():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
    inputs, right = [torch.randn(2, 4) for _ in range(2)], []
    with torch.no_grad(), Capture(model, "residual_output") as calls:
        for x in inputs:
            for block in model:
                x = block(x)
            right.append(x)
    assert len(calls) == 2
    for call, x in zip(calls, right, strict=True):
        assert torch.equal(call["acts", "residual_output.2"], x)
    with torch.no_grad(), Intervene(model, {"residual_output.1": tg.Scale(0.0)}):
        assert [float(model[1](x).abs().max()) for x in inputs] == [0.0, 0.0]


class Inner(nn.Module):
    """A wrapper that is called for training, and hands everything else to the model inside."""

    def __init__(self, model):
        super().__init__()
        self.net = model

    def forward(self, *args, **kwargs):
        return self.net(*args, **kwargs)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_wrapper_s_inner_model_generates(depth):
    model, batch = models.llama(), models.text_batch()
    wrapper = model
    for _ in range(depth):
        wrapper = Inner(wrapper)
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    batch["attention_mask"][0, :2] = 0
    edit, sites = (
        {"residual_output.1": tg.Steer(torch.ones(models.WIDTH), positions="last")},
        ["z.0", "residual_output"],
    )
    with torch.no_grad(), Intervene(model, edit), Capture(model, sites, model_outputs="logits") as plain:
        right = model.generate(**batch, **settings)
    with (
        torch.no_grad(),
        Intervene(wrapper, edit, in_keys={"input_ids": "input_ids"}),
        Capture(wrapper, sites, model_outputs="logits", in_keys={"input_ids": "input_ids"}) as calls,
    ):
        assert torch.equal(model.generate(**batch, **settings), right)
    assert len(calls) == len(plain) == 3
    for call, other in zip(calls, plain, strict=True):
        assert set(call.keys(True, True)) == set(other.keys(True, True))
        for key in call.keys(True, True):
            assert torch.equal(call[key], other[key])
    with torch.no_grad(), Capture(wrapper, sites, in_keys={"input_ids": "input_ids"}) as calls:
        wrapper(**batch)
    assert len(calls) == 1


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_blocks_run_again_inside_the_block(use_reentrant):
    def gradient(checkpointed, backward):
        model, batch = models.llama(), models.text_batch()
        model.train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        with Intervene(model, {"mlp_output.1": tg.Scale(0.5)}), Capture(model, "residual_output") as calls:
            loss = model(**batch, labels=batch["input_ids"]).loss
            if backward:
                loss.backward()
        if not backward:
            loss.backward()
        assert len(calls) == 1  # what is run again is no call
        return model.model.layers[0].mlp.down_proj.weight.grad

    right = gradient(False, False)
    torch.testing.assert_close(gradient(True, True), right)
    with pytest.raises(RuntimeError, match="checkpoint.*Intervene.*inside the with block"):
        gradient(True, False)
