"""Gradients of sites: those of autograd, and what a small edit at the site does to the target."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

import models
import tdgeom as tg
from editing import ALL, batch_for
from tdgeom.model.capture import Capture
from tdgeom.model.intervene import Intervene


def target(output):
    logits = output.logits
    return (logits if logits.ndim == 2 else logits[:, -1])[:, 1].sum()


@pytest.mark.parametrize(
    "name", ["gpt2", "bert", "gpt_neox", "gpt_neox_sequential", "olmo2", "gemma2", "vit"]
)
def test_every_gradient_is_the_slope_of_an_edit(name):
    """Of this site alone: where attention receives the stream itself, one tensor in autograd, the stream has its own."""
    model = ALL[name]().double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch_for(name).items()}
    sites = [
        str(e.site) for e in tg.available_sites(model) if e.site.layer == 1 and e.site.kind != "router_logits"
    ]
    grads = Capture(model, sites, direction="backward", target=target)(TensorDict(dict(batch)))["grads"]
    acts = Capture(model, sites)(TensorDict(dict(batch)))["acts"]
    for site in sites:
        noise = torch.randn(acts[site].shape, generator=torch.Generator().manual_seed(3)).double()
        noise = noise.masked_fill(acts[site] < -1e30, 0)  # masked scores
        slopes = []
        for step in (1e-3, -1e-3):
            with (
                torch.no_grad(),
                Intervene(model, {site: lambda x, step=step, noise=noise: x + step * noise}),
            ):
                slopes.append(target(model(**batch)))
        expected = (slopes[0] - slopes[1]) / 2e-3
        # norms and softmaxes of some models round to float32
        torch.testing.assert_close((grads[site] * noise).sum(), expected, rtol=2e-2, atol=1e-3, msg=site)
    together = Capture(model, sites, direction="backward", target=target)
    for site in sites[::5]:  # sites asked for together do not take each other's gradient
        alone = Capture(model, site, direction="backward", target=target)(TensorDict(dict(batch)))[
            "grads", site
        ]
        torch.testing.assert_close(grads[site], alone)
    with together as calls:
        target(model(**batch)).backward()
    for site in sites:
        torch.testing.assert_close(calls[0]["grads", site], grads[site])


def test_gradients_are_those_of_autograd():
    model, batch = models.llama(), models.text_batch()
    kinds = [
        "residual_input",
        "residual_mid",
        "attn_output",
        "v",
        "z",
        "head_output",
        "attn_pattern",
        "mlp_act",
    ]
    target = lambda out: out.logits[:, -1, 3].sum()
    frozen = models.llama().requires_grad_(False)
    for net in (model, frozen):
        grads = Capture(net, kinds, direction="backward", target=target)(TensorDict(batch))["grads"]
        acts = Capture(net, kinds)(TensorDict(batch))["acts"]
        assert all(p.grad is None for p in net.parameters())
        assert not any(p.requires_grad for p in frozen.parameters())
        for site in ("residual_mid.1", "z.1", "attn_pattern.1", "mlp_act.1", "v.1"):
            assert grads[site].shape == acts[site].shape
    # the reference: perturb a value with a hook of our own and watch the target
    model = model.double()
    grads = Capture(model, kinds, direction="backward", target=target)(TensorDict(batch))["grads"]
    layer = model.model.layers[1]
    noise = torch.randn(3, 7, models.WIDTH, generator=torch.Generator().manual_seed(5)).double()
    with torch.no_grad():
        values = []
        for eps in (1e-3, -1e-3):
            handle = layer.self_attn.register_forward_hook(
                lambda m, a, o, eps=eps: (o[0] + eps * noise, *o[1:])
            )
            values.append(target(model(**batch)))
            handle.remove()
    slope = (values[0] - values[1]) / 2e-3
    for site in ("residual_mid.1", "attn_output.1"):
        torch.testing.assert_close((grads[site] * noise).sum(), slope, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(grads["head_output.1"][:, :, 2], grads["attn_output.1"])


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_heads_behind_a_norm_have_the_gradient_of_their_sum(name):
    model, batch = models.TEXT_MODELS[name](), models.text_batch()
    target = lambda out: out.logits[:, -1, 3].sum()
    capture = Capture(model, ["head_output", "attn_output"], direction="backward", target=target)
    for grads in (capture(TensorDict(batch))["grads"], _around(model, capture, batch, target)):
        for layer in range(models.DEPTH):
            heads, whole = grads[f"head_output.{layer}"], grads[f"attn_output.{layer}"]
            assert whole.abs().max() > 0
            torch.testing.assert_close(heads, whole[:, :, None].expand_as(heads))
    assert not any(module._forward_hooks for module in model.modules())


def _around(model, capture, batch, target):
    with capture as calls:
        target(model(**batch)).backward()
    return calls[0]["grads"]


def test_gradients_around_the_user_s_own_backward():
    model, batch = models.gpt2(), models.text_batch()
    target = lambda out: out.logits[:, -1, 3].sum()
    capture = Capture(model, ["residual_output", "z"], direction="backward", target=target)
    expected = capture(TensorDict(batch))["grads"]
    with capture as calls:
        target(model(**batch)).backward()
    for site in capture.sites:
        torch.testing.assert_close(calls[0]["grads", site], expected[site])
    with pytest.raises(RuntimeError, match="has no gradient"), torch.no_grad(), capture:
        model(**batch)
    with pytest.raises(ValueError, match="needs target="):
        Capture(model, "z", direction="backward")(TensorDict(batch))
