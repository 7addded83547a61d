"""Linear layers that are wrapped, packed or parametrised are linear layers: neurons, heads and their shares are the model's."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import models
import tdgeom as tg
from tdgeom.model.structure.linears import features, is_linear, linears, shares

KINDS = ["q", "k", "v", "z", "head_output", "attn_output", "attn_pattern", "mlp_act", "mlp_output"]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted(model, dora=False):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=list(PROJECTIONS), use_dora=dora, lora_alpha=8)
    torch.manual_seed(0)
    net = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return net


class Packed(nn.Module):
    """As AWQ and GPTQ keep theirs: whole numbers in buffers, no parameter, no weight."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scales", scale)

    def forward(self, x):
        return x @ (self.qweight.to(x.dtype) * self.scales).T


class FourBits(nn.Linear):
    """As bitsandbytes keeps its: a weight of another shape, unpacked on the way."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.shape = linear.weight.shape
        self.weight = nn.Parameter(linear.weight.detach().reshape(-1, 1).clone(), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.reshape(self.shape))


class Adapted(nn.Module):
    """An adapter of nobody's library: it has the layer as base_layer and says no width."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down, self.up = (
            nn.Linear(base.in_features, 2, bias=False),
            nn.Linear(2, base.out_features, bias=False),
        )

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def replaced(make):
    def build(model):
        torch.manual_seed(0)
        for layer in model.model.layers:
            for owner in (layer.self_attn, layer.mlp):
                for name, child in list(owner.named_children()):
                    if name in PROJECTIONS:
                        setattr(owner, name, make(child))
        return model.eval()

    return build


def parametrised(linear):
    parametrizations.weight_norm(linear)
    return linear


def dynamic(model):
    with pytest.warns(match="deprecated"):
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


WRAPPERS = {
    "LoRA": adapted,
    "DoRA": lambda model: adapted(model, dora=True),
    "packed": replaced(Packed),
    "four bits": replaced(FourBits),
    "an adapter": replaced(Adapted),
    "weight norm": replaced(parametrised),
}


@pytest.fixture(params=WRAPPERS)
def wrapped(request):
    model = WRAPPERS[request.param](models.llama())
    return model, getattr(model, "base_model", model)


def hooked(model, path, side):
    """What an own hook sees at a module of the plain name."""
    module = next(m for name, m in model.named_modules() if name.endswith(path))
    seen = []
    if side == "input":
        handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    else:
        handle = module.register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    with torch.no_grad():
        model(**models.text_batch())
    handle.remove()
    return seen[0]


def test_sites_are_those_of_the_plain_model(wrapped):
    model, _ = wrapped
    capture = tg.Capture(model, KINDS)
    acts = capture(TensorDict(models.text_batch()))["acts"]
    for kind, path, side in (
        ("mlp_act", "layers.1.mlp.down_proj", "input"), ("z", "layers.1.self_attn.o_proj", "input"),
        ("q", "layers.1.self_attn.q_proj", "output"), ("k", "layers.1.self_attn.k_proj", "output"),
        ("v", "layers.1.self_attn.v_proj", "output"), ("mlp_output", "layers.1.mlp", "output"),
    ):  # fmt: skip
        torch.testing.assert_close(acts[f"{kind}.1"].reshape(3, 7, -1), hooked(model, path, side))
    assert acts["mlp_act.1"].shape == (3, 7, 32)
    torch.testing.assert_close(acts["head_output.1"].sum(2), acts["attn_output.1"], rtol=1e-4, atol=1e-5)
    values = acts["v.1"].repeat_interleave(2, 2)
    torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", acts["attn_pattern.1"], values), acts["z.1"])


def test_each_share_is_what_the_projection_makes_of_one_head(wrapped):
    model, _ = wrapped
    acts = tg.Capture(model, ["z.1", "head_output.1"])(TensorDict(models.text_batch()))["acts"]
    projection = next(m for name, m in model.named_modules() if name.endswith("layers.1.self_attn.o_proj"))
    for head in range(4):
        alone = torch.zeros_like(acts["z.1"])
        alone[:, :, head] = acts["z.1"][:, :, head]
        torch.testing.assert_close(
            acts["head_output.1"][:, :, head], projection(alone.flatten(2)).detach(), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("site", "path"), [("mlp_act.1", "layers.1.mlp.down_proj"), ("z.1", "layers.1.self_attn.o_proj")]
)
def test_edits_act_as_an_own_hook_does(wrapped, site, path):
    model, _ = wrapped
    module = next(m for name, m in model.named_modules() if name.endswith(path))
    batch = models.text_batch()
    with torch.no_grad():
        plain = model(**batch).logits
        handle = module.register_forward_pre_hook(lambda m, args: (args[0] * 0.5, *args[1:]))
        expected = model(**batch).logits
        handle.remove()
        with tg.Intervene(model, {site: tg.Scale(0.5)}):
            found = model(**batch).logits
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(found, expected)


def test_an_edit_of_shares_is_one_of_heads(wrapped):
    model, _ = wrapped
    batch = models.text_batch()
    with torch.no_grad():
        with tg.Intervene(model, {"z.1": tg.Scale(0.0, heads=2)}):
            expected = model(**batch).logits
        with tg.Intervene(model, {"head_output.1": tg.Scale(0.0, heads=2)}):
            found = model(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_layers_quantised_as_they_run():
    """int8 with scales taken from each input: what is read is exact, shares of heads are to the rounding of eight bits."""
    plain = models.llama()
    model = dynamic(copy.deepcopy(plain))
    acts = tg.Capture(model, ["q", "z", "mlp_act", "attn_pattern"])(TensorDict(models.text_batch()))["acts"]
    torch.testing.assert_close(acts["mlp_act.1"], hooked(model, "layers.1.mlp.down_proj", "input"))
    torch.testing.assert_close(acts["z.1"].flatten(2), hooked(model, "layers.1.self_attn.o_proj", "input"))
    assert acts["attn_pattern.1"].shape == (3, 4, 7, 7)
    shares_of = tg.Capture(model, ["head_output.1", "attn_output.1"])(TensorDict(models.text_batch()))["acts"]
    far = (shares_of["head_output.1"].sum(2) - shares_of["attn_output.1"]).abs().max()
    assert far < 0.05 * shares_of["attn_output.1"].abs().max()


def test_what_is_a_linear_layer():
    layer = nn.Linear(4, 6)
    for module in (layer, Packed(layer), FourBits(layer), Adapted(layer)):
        assert is_linear(module) and features(module) == (4, 6)
    assert [path for path, _ in linears(nn.Sequential(Adapted(layer), nn.Sequential(layer)))] == ["0", "1.0"]
    for module in (nn.LayerNorm(4), nn.Embedding(4, 6), nn.Sequential(layer), nn.Conv1d(4, 6, 1)):
        assert not is_linear(module)
    with pytest.raises(TypeError, match="LayerNorm is no linear layer"):
        features(nn.LayerNorm(4))
    parametrised(twin := nn.Linear(4, 6))
    assert parametrize.is_parametrized(twin) and is_linear(twin)
    x = torch.randn(2, 3, 4)
    for module in (layer, Adapted(layer)):
        whole = shares(module, x, 2).sum(-2)
        torch.testing.assert_close(whole, module(x) - module(torch.zeros_like(x)))
