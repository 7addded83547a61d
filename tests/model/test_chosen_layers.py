"""``layers=``, ``classes=`` and ``heads=`` act on whatever they stand beside, or are refused."""

from __future__ import annotations

import re

import pytest
import torch
from tensordict import TensorDict
from torch import nn

import models
import tdgeom as tg

GLOB = "module_output:transformer.h.*.mlp"
EXPRESSION = re.compile(r"transformer\.h\.\d+\.mlp")


@pytest.mark.parametrize(
    "sites", [GLOB, EXPRESSION, "module_output:transformer.h.2.mlp", "module_input:**.mlp"]
)
def test_layers_of_globs_and_expressions(sites):
    model = models.gpt2()
    found = tg.Capture(model, sites, layers=[-1])
    assert list(found.module_paths.values()) == ["transformer.h.2.mlp"]
    with pytest.raises(IndexError, match="layer 9 is out of range"):
        tg.Capture(model, sites, layers=[9])
    assert len(tg.Capture(model, [sites, "residual_output"], layers=[1, 2]).sites) > 2


def test_layers_that_leave_nothing():
    model = models.gpt2()
    for sites in (
        "module_output:transformer.wte",
        "module_output:transformer.h.2.mlp",
        "module_output:<root>",
    ):
        with pytest.raises(ValueError, match=r"layers=\[0\] leaves nothing of"):
            tg.Capture(model, sites, layers=[0])
    with pytest.raises(ValueError, match="needs repeated blocks"):
        tg.Capture(nn.Sequential(nn.Linear(2, 3), nn.Conv1d(1, 1, 1)), "module_output:0", layers=0)


@pytest.mark.parametrize(
    "form", [tg.Capture, lambda model, site, **k: tg.Intervene(model, {site: tg.Scale(1.0)}, **k)]
)
def test_layers_beside_concrete_names(form):
    model = models.gpt2()
    with pytest.raises(ValueError, match="exclude each other"):
        form(model, "residual_output.0", layers=[1])
    with pytest.raises(ValueError, match="has no layers"):
        form(model, "final_norm", layers=[1])
    form(model, "residual_output.-1", layers=[2])


def test_two_stacks_have_layers_of_their_own():
    model = models.t5()
    found = tg.Capture(model, "module_output:**.SelfAttention", layers=[1])
    assert sorted(found.module_paths.values()) == [
        f"{s}.block.1.layer.0.SelfAttention" for s in ("decoder", "encoder")
    ]


def test_classes_of_kinds():
    model = models.gpt2()
    for sites in ("mlp_output", "mlp_output.0", GLOB):
        with pytest.raises(ValueError, match="leave none of the modules matched, which are GPT2MLP"):
            tg.Capture(model, sites, classes=[nn.Linear])
        assert tg.Capture(model, sites, skip_classes=[nn.Linear]).sites
    assert {s.kind for s in tg.Capture(model, ["attn_norm", "mlp_norm"], classes=[nn.LayerNorm]).sites} == {
        "attn_norm", "mlp_norm"
    }  # fmt: skip


def test_heads_by_layer():
    model, batch = models.llama(), models.text_batch()
    kinds = ["z", "k", "attn_pattern", "residual_output"]
    heads = {0: 3, 1: [0, 2], -1: [1]}
    whole = tg.Capture(model, kinds)(TensorDict(batch))["acts"]
    some = tg.Capture(model, kinds, heads=heads)(TensorDict(batch))["acts"]
    for layer, own in ((0, [3]), (1, [0, 2]), (2, [1])):
        assert torch.equal(some[f"z.{layer}"], whole[f"z.{layer}"][:, :, own])
        assert torch.equal(some[f"k.{layer}"], whole[f"k.{layer}"][:, :, [h // 2 for h in own]])
        assert torch.equal(some[f"attn_pattern.{layer}"], whole[f"attn_pattern.{layer}"][:, own])
    spec = tg.CaptureSpec.from_json(tg.CaptureSpec(kinds, heads={0: 3, 1: [0, 2], 2: 1}).to_json())
    again = spec.build(model)(TensorDict(batch))["acts"]
    assert all(torch.equal(again[name], some[name]) for name in some.keys())


@pytest.mark.parametrize(
    ("heads", "error", "text"),
    [
        ({0: [1]}, ValueError, r"says nothing of the layers \[1, 2\]"),
        ({0: 1, 1: 1, 2: 1, 5: 1}, IndexError, r"names the layers \[5\]"),
        ({0: 1, 1: 9, 2: 1}, IndexError, "head 9 is out of range"),
        ({"0": 1}, TypeError, "from layers"),
        ({}, TypeError, "from layers"),
        ("1", TypeError, "takes an int"),
        ([], TypeError, "takes an int"),
        (True, TypeError, "takes an int"),
    ],
)
def test_heads_that_say_nothing(heads, error, text):
    with pytest.raises(error, match=text):
        tg.Capture(models.gpt2(), "z", heads=heads)


def test_edits_of_heads_by_layer():
    model, batch = models.llama(), models.text_batch()
    edit = tg.Scale(0.0, heads={0: [3], 1: [0, 2]})
    with torch.no_grad(), tg.Intervene(model, {"z": edit}), tg.Capture(model, "z") as calls:
        model(**batch)
    with torch.no_grad(), tg.Capture(model, "z.0") as plain:
        model(**batch)
    acts = calls[0]["acts"]
    assert torch.equal(acts["z.0"][:, :, :3], plain[0]["acts", "z.0"][:, :, :3])
    zero = {
        layer: [h for h in range(4) if float(acts[f"z.{layer}"][:, :, h].abs().max()) == 0]
        for layer in range(3)
    }
    assert zero == {0: [3], 1: [0, 2], 2: []}


def test_a_factor_before_the_softmax_is_that_of_the_weights():
    model, batch = models.gpt2(), models.text_batch()

    def pattern(edit=None):
        edits = tg.Intervene(model, {"attn_scores.1": edit}) if edit else torch.no_grad()
        with torch.no_grad(), edits, tg.Capture(model, "attn_pattern.1") as calls:
            model(**batch)
        return calls[0]["acts", "attn_pattern.1"].double()

    plain = pattern()
    expected = plain.clone()
    expected[:, :, 4, 1] *= 0.25
    expected[:, :, 4] /= expected[:, :, 4].sum(-1, keepdim=True)
    for settings in ({}, {"renormalise": True}):
        found = pattern(tg.BlockAttention(queries=slice(4, 5), keys=1, factor=0.25, **settings))
        whole = batch["attention_mask"].bool().all(1)
        torch.testing.assert_close(found[whole], expected[whole], rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="a factor of 0 or more"):
        pattern(tg.BlockAttention(keys=1, factor=-1.0))


def test_zeros_have_no_reference():
    with pytest.raises(ValueError, match="takes no reference="):
        tg.Ablate("zero", reference=torch.zeros(1, 1, 1))
