"""What is set around a context changes nothing about it: default dtype and device, autocast, inference mode."""

from __future__ import annotations

import contextlib

import pytest
import torch
from tensordict import TensorDict

import models
import tdgeom as tg
from editing import batch_for, hook_count, plain_hook, sites_of
from tdgeom.model.capture import Capture
from tdgeom.model.intervene import Intervene


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "device": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
}
PROMPT = torch.tensor([[5, 6, 7], [8, 9, 10]])


def edits():
    basis = torch.linspace(-1, 1, models.WIDTH, dtype=torch.float32, device="cpu")
    return {
        "residual_output.0": [
            tg.Steer(basis, positions="random-2"),
            tg.ProjectOut(basis, features=slice(0, 9)),
        ],
        "z.1": tg.Ablate("resample", positions=slice(1, None)),
        "attn_pattern.1": tg.BlockAttention(queries="last", keys=[0, 2], renormalise=True),
        "mlp_output.1": tg.ActivationAddition({"input_ids": PROMPT}, {"input_ids": PROMPT + 1}),
        "residual_mid.2": tg.Patch(inputs={"input_ids": PROMPT[:1].repeat(3, 1)}, positions="first"),
        "head_output.2": tg.Ablate(heads=1),
    }


def everything(name):
    """All that is made and read, from scratch."""
    model, batch = models.TEXT_MODELS[name](), batch_for(name)

    def measure():
        capture = Capture(model, sites_of(model), model_outputs="logits")
        found = capture(TensorDict(dict(batch)))
        with Intervene(model, edits()), Capture(model, ["residual_output", "head_output"]) as calls:
            output = model(**batch).logits
        lens = tg.LogitLens(model, outputs=["logits"])(found["acts", "residual_output.0"])
        sites = list(found["acts"].keys())
        means = tg.AggregateActs(sites, reduce="mean")(found.copy())["acts"]
        grid = tg.activation_patching(
            model, batch, {**batch, "input_ids": batch["input_ids"].roll(1, 1)}, "residual_output", answers=(5, 7),
            layers=1, progress=False,
        )  # fmt: skip
        parts = [found["acts"], calls[0]["acts"], means, grid["grid"]]
        return [output, lens, *(value for part in parts for value in part.values())]

    return measure


@pytest.mark.parametrize(
    ("name", "surroundings"),
    # Gemma's own forward makes tensors on the default device
    [(n, s) for n in ("gpt2", "llama", "gemma2") for s in SURROUNDINGS if (n, s) != ("gemma2", "device")],
)
def test_the_same_numbers_in_any_surroundings(name, surroundings):
    measure = everything(name)
    expected = measure()
    with SURROUNDINGS[surroundings]():
        found = measure()
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=0)


def test_images_under_another_default_dtype():
    model, batch = models.vit(), batch_for("vit")
    expected = Capture(model, ["v", "head_output", "residual_mid"])(TensorDict(dict(batch)))["acts"]
    with default_dtype(torch.float64):
        found = Capture(model, ["v", "head_output", "residual_mid"])(TensorDict(dict(batch)))["acts"]
    for site in expected.keys():
        torch.testing.assert_close(found[site], expected[site], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_under_autocast_is_read_and_edited_as_by_a_plain_hook(name):
    """The model keeps the caller's autocast; what is computed for an edit does not come under it."""
    model, batch = models.TEXT_MODELS[name](), batch_for(name)
    block = tg.available_sites(model)[0].block_path.rpartition(".")[0] + ".1"
    layer, seen = model.get_submodule(block), []
    basis = torch.randn(models.WIDTH, 3, generator=torch.Generator().manual_seed(0))
    onto = torch.linalg.qr(basis.double())[0].float()
    remove = lambda x: seen.append(x) or (x - (x.float() @ onto) @ onto.T).to(x.dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with plain_hook(layer, lambda x: torch.autocast("cpu", enabled=False).__call__(remove)(x)):
            expected = model(**batch).logits
        with (
            Intervene(model, {"residual_output.1": tg.ProjectOut(basis)}),
            Capture(model, "mlp_output.1") as calls,
        ):
            found = model(**batch).logits
        assert (
            Capture(model, "mlp_output.1")(TensorDict(dict(batch)))["acts", "mlp_output.1"].dtype
            == torch.bfloat16
        )
        acts = Capture(model, ["head_output.1", "attn_output.1"])(TensorDict(dict(batch)))["acts"]
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert calls[0]["acts", "mlp_output.1"].dtype == torch.bfloat16
    projection = next(e for e in tg.available_sites(model) if e.site == "head_output.1").view.projection
    bias = 0 if getattr(projection, "bias", None) is None else projection.bias
    shares = acts["head_output.1"].float().sum(-2) + bias
    torch.testing.assert_close(shares.detach(), acts["attn_output.1"].float(), rtol=3e-2, atol=3e-2)
    assert hook_count(model) == 0


def test_structure_is_checked_alike_under_autocast():
    for name in ("gpt2", "gpt_neox_sequential", "gemma2", "bert"):
        model = models.TEXT_MODELS[name]()
        plain = Capture(models.TEXT_MODELS[name](), sites_of(model)).sites
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert Capture(model, sites_of(model)).sites == plain and plain


def test_a_lens_under_autocast_is_the_lens():
    model, batch = models.llama(), batch_for("llama")
    acts = Capture(model, "residual_output.1")(TensorDict(batch))["acts", "residual_output.1"]
    lens = tg.LogitLens(model, outputs=["logits"])
    tuned = tg.TunedLens(model, ["residual_output.1"], outputs=["logits"])
    expected, same = lens(acts), tuned(acts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lens(acts), expected) and torch.equal(tuned(acts), same)
        assert torch.equal(tg.LogitLens(model, outputs=["logits"])(acts), expected)
        tuned.fit([batch], steps=1)
