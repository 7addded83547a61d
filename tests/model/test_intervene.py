"""Edits take effect, see each other, and leave nothing behind."""

from __future__ import annotations

import contextlib
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

import models
import tdgeom as tg
from editing import ALL, batch_for, hook_count, logits, other_for, plain_hook, sites_of
from tdgeom.model.capture import Capture
from tdgeom.model.intervene import Intervene
from tdgeom.model.structure.blocks import find_stacks


def test_an_edit_of_every_site_reaches_the_output(listed):
    _, model, batch = listed
    base = logits(model, batch)
    for kind in sites_of(model):
        tilt = lambda x: (
            x * torch.linspace(0.5, 1.5, x.shape[-1])
        )  # some models normalise a common factor away
        with Intervene(model, {f"{kind}.1": tilt}):
            assert (logits(model, batch) - base).abs().max() > 1e-4, kind
    torch.testing.assert_close(logits(model, batch), base, rtol=0, atol=0)


def test_ablating_a_head_removes_exactly_its_share(listed):
    name, model, batch = listed
    acts = Capture(model, ["head_output", "attn_output"])(TensorDict(batch))["acts"]
    with (
        torch.no_grad(),
        Intervene(model, {"head_output.1": tg.Ablate(heads=2)}),
        Capture(model, "attn_output.1") as one,
    ):
        model(**batch)
    expected = acts["attn_output.1"] - acts["head_output.1"][:, :, 2]
    torch.testing.assert_close(one[0]["acts", "attn_output.1"], expected, rtol=1e-4, atol=1e-5)
    with (
        torch.no_grad(),
        Intervene(model, {"z.1": tg.Ablate(heads=[2])}),
        Capture(model, "attn_output.1") as two,
    ):
        model(**batch)
    if name in ("gemma2", "gemma3"):  # the norm behind the heads takes its statistics anew
        assert not torch.allclose(two[0]["acts", "attn_output.1"], expected, atol=1e-3)
    else:
        torch.testing.assert_close(two[0]["acts", "attn_output.1"], expected, rtol=1e-4, atol=1e-5)
    assert hook_count(model) == 0


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "gemma2", "olmo2", "vit", "bert", "gpt_neox_sequential", "t5"]
)
def test_an_edit_in_the_middle_reaches_the_stream_and_the_mlp(name):
    """The stream goes around the module where it is read: what comes out is middle + MLP(middle)."""
    model = models.t5() if name == "t5" else ALL[name]()
    stack = "encoder." if name == "t5" else ""
    reads = Capture(model, [f"{stack}{kind}.1" for kind in ("residual_mid", "mlp_output", "residual_output")])
    shift = torch.linspace(-1, 1, models.WIDTH)
    edits = {f"{stack}residual_mid.1": [lambda x: x + shift, lambda x: 2 * x]}
    batch = {
        **batch_for(name),
        **({"decoder_input_ids": models.text_batch()["input_ids"]} if name == "t5" else {}),
    }
    before = reads(TensorDict(batch))["acts"]
    with (
        torch.no_grad(),
        reads as outside,
        Intervene(model, edits),
        reads.__class__(model, reads.sites) as calls,
    ):
        model(**batch)
    acts, outer = calls[0]["acts"], outside[0]["acts"]
    middle, mlp, after = (acts[site] for site in reads.sites)
    torch.testing.assert_close(middle, 2 * (before[reads.sites[0]] + shift))
    torch.testing.assert_close(outer[reads.sites[0]], before[reads.sites[0]])
    torch.testing.assert_close(outer[reads.sites[2]], after)
    if name == "bert":  # normalises last
        block = find_stacks(model)[0].blocks[1].module
        after_attention = block.attention.output.LayerNorm(middle).detach()
        torch.testing.assert_close(after, block.output.LayerNorm(after_attention + mlp).detach())
    else:
        torch.testing.assert_close(after, middle + mlp, rtol=1e-4, atol=1e-5)
    assert hook_count(model) == 0


def test_edits_see_earlier_edits(llama):
    batch = models.text_batch()
    plus, twice = (lambda x: x + 1), (lambda x: x * 2)
    with plain_hook(llama.model.layers[0], lambda x: (x + 1) * 2):
        expected = logits(llama, batch)
    site = "residual_output.0"
    for context in (
        [Intervene(llama, {site: [plus, twice]})],
        [Intervene(llama, {site: plus}), Intervene(llama, {site: twice})],
    ):
        with contextlib.ExitStack() as stack:
            for one in context:
                stack.enter_context(one)
            torch.testing.assert_close(logits(llama, batch), expected, rtol=0, atol=0)
        assert hook_count(llama) == 0


@pytest.mark.parametrize(
    "kind", ["residual_input", "z", "head_output", "attn_scores", "attn_pattern", "mlp_output"]
)
def test_captures_inside_see_the_edits_and_those_outside_do_not(llama, kind):
    batch, site = models.text_batch(), f"{kind}.1"
    before = Capture(llama, site)(TensorDict(batch))["acts", site]
    outer, inner = Capture(llama, site), Capture(llama, site)
    with torch.no_grad(), outer as one, Intervene(llama, {site: tg.Scale(0.5)}), inner as two:
        llama(**batch)
    torch.testing.assert_close(one[0]["acts", site], before)
    torch.testing.assert_close(two[0]["acts", site], before * 0.5)
    with Intervene(llama, {site: tg.Scale(0.5)}):  # the module form too
        torch.testing.assert_close(Capture(llama, site)(TensorDict(batch))["acts", site], before * 0.5)


def test_stages_of_one_s_own_and_their_keys(llama):
    batch = models.text_batch()
    seen = []

    def mask_out(x, mask):
        seen.append(mask.shape)
        return x * mask.unsqueeze(-1)

    stage = TensorDictModule(mask_out, ["activation", "attention_mask"], ["activation"])
    with Intervene(llama, {"mlp_output": [stage, nn.Identity()]}, layers=[0, 2]):
        logits(llama, batch)
    assert seen == [(3, 7), (3, 7)]


def test_routers_keep_their_shape():
    model, batch = models.mixtral(), models.text_batch()
    shapes = []
    with Intervene(model, {"router_logits.1": lambda x: shapes.append(x.shape) or x + 1}):
        logits(model, batch)
    assert shapes == [(3, 7, 4)]


def test_shared_blocks_are_edited_one_layer_at_a_time():
    model, batch = models.albert(num_hidden_layers=3), models.text_batch()
    seen = Capture(model, "residual_output")
    base = seen(TensorDict(batch))["acts"]
    with torch.no_grad(), Intervene(model, {"residual_output.1": tg.Scale(2.0)}), seen as calls:
        model(**batch)
        model(**batch)
    for call in calls:
        torch.testing.assert_close(call["acts", "residual_output.0"], base["residual_output.0"])
        torch.testing.assert_close(call["acts", "residual_output.1"], 2 * base["residual_output.1"])
        assert not torch.allclose(call["acts", "residual_output.2"], base["residual_output.2"])


class Failing(nn.Module):
    """An edit that fails at its n-th call."""

    def __init__(self, error, at=1):
        super().__init__()
        self.error, self.left = error, at

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return x + 1


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["edit", "pattern edit", "model", "generate", "source run", "module form"])
def test_everything_is_restored_after_any_exception(llama, error, where):
    batch = models.text_batch()
    base = logits(llama, batch)
    before = [m.config._attn_implementation for m in llama.modules() if hasattr(m, "config")]
    site = "attn_pattern.1" if where == "pattern edit" else "residual_output.1"
    patch = tg.Patch(inputs=other_for("llama"))
    context = Intervene(
        llama,
        {
            "attn_scores": tg.Scale(0.9),
            "residual_input": patch,
            site: Failing(error, 3 if where == "generate" else 1),
        },
    )
    broken = llama.model.layers[2].mlp
    with pytest.raises(type(error)):
        if where in ("model", "source run"):
            context.plan[-1][1][0].left = 99
            handle = broken.register_forward_hook(lambda *_: (_ for _ in ()).throw(error))
        if where == "source run":
            context = Intervene(llama, {"residual_output.2": patch, "attn_scores": tg.Scale(0.9)})
        if where == "module form":
            context(TensorDict(batch))
        else:
            with context, Capture(llama, ["attn_pattern", "z"]):
                if where == "generate":
                    llama.generate(
                        **batch, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0
                    )
                else:
                    llama(**batch)
    if where in ("model", "source run"):
        handle.remove()
    assert hook_count(llama) == 0
    assert [m.config._attn_implementation for m in llama.modules() if hasattr(m, "config")] == before
    assert patch._runs == {}
    assert torch.equal(logits(llama, batch), base)
    with Intervene(llama, {"z": tg.Scale(1.0)}):  # and the next context works
        torch.testing.assert_close(logits(llama, batch), base)


def test_an_exception_caught_inside_the_block_leaves_the_next_call_alone(llama):
    batch = models.text_batch()
    base = Capture(llama, "attn_pattern")(TensorDict(batch))["acts"]
    edit = Failing(ValueError("no"))
    with Intervene(llama, {"z.1": edit}), Capture(llama, "attn_pattern") as calls:
        with pytest.raises(ValueError, match="no"):
            llama(**batch)
        llama(**batch)
    assert len(calls) == 1
    torch.testing.assert_close(calls[0]["acts", "attn_pattern.0"], base["attn_pattern.0"])


def test_errors_say_what_was_expected(llama):
    batch = models.text_batch()
    for edits, match in (
        (
            {"residual_output.1": lambda x: x[:, :2]},
            r"expected to give a tensor \(3, 7, 16\), gave \(3, 2, 16\)",
        ),
        ({"residual_output.1": lambda x: None}, "gave NoneType"),
        ({"residual_output.1": tg.Ablate(heads=0)}, "needs a site with heads"),
    ):
        with pytest.raises(ValueError, match=match), Intervene(llama, edits):
            llama(**batch)
    with pytest.raises(IndexError, match="4 query heads"), Intervene(llama, {"k.0": tg.Ablate(heads=4)}):
        llama(**batch)
    with pytest.raises(ValueError, match="Kinds"):
        Intervene(llama, {"residul": tg.Ablate()})
    with pytest.raises(TypeError, match="no module or function"):
        Intervene(llama, {"residual_output": 3})
    with pytest.raises(ValueError, match="mapping from sites to edits"):
        Intervene(llama, [])
    context = Intervene(llama, {"z": tg.Scale(1.0)}, missing="ignore")
    with context, pytest.raises(RuntimeError, match="already in use"):
        context.__enter__()
    twin = pickle.loads(pickle.dumps(context))
    with pytest.raises(RuntimeError, match="without its model"):
        twin.__enter__()
    with pytest.raises(RuntimeError, match="compiled"):
        Intervene(torch.compile(llama, backend="eager"), {"z": tg.Scale(1.0)})


def test_plain_modules():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    context = Intervene(model, {"module_output:0": tg.Scale(2.0)}, model_outputs="y", in_keys=["x"])
    torch.testing.assert_close(context(TensorDict({"x": x}))["y"], model[1](2 * model[0](x)).detach())
    assert find_stacks(model)
    with pytest.raises(ValueError, match="has no positions"):
        Intervene(model, {"module_output:0": tg.Scale(2.0, positions="last")}, in_keys=["x"])(
            TensorDict({"x": x})
        )


def test_no_edits_are_a_baseline():
    """Nothing changes, and the context gives what one with edits gives."""
    model, batch = models.gpt2(), models.text_batch()
    plain = model(**batch).logits
    baseline = tg.Intervene(model, {})
    assert baseline.sites == []
    with baseline, tg.Capture(model, "residual_output") as calls:
        assert torch.equal(model(**batch).logits, plain)
    assert len(calls) == 1
    assert torch.equal(baseline(TensorDict(batch))["logits"], plain)
    for edits in ({}, {"residual_output.1": tg.Scale(factor=1.0)}):
        written = tg.Intervene(model, edits, model_outputs=["logits"])(TensorDict(batch))
        torch.testing.assert_close(written["logits"], plain)
    with pytest.raises(ValueError, match="mapping from sites to edits"):
        tg.Intervene(model, [("residual_output.1", tg.Scale(factor=1.0))])
    with pytest.raises(TypeError, match=r"got the class Scale\. Write tg\.Scale\("):
        tg.Intervene(model, {"residual_output.1": tg.Scale})
