"""Tensors inside tuples, mappings and dataclasses: read, named and put back, at any module and at the model itself."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tensordict import TensorDict
from torch import nn

import models
import tdgeom as tg
from tdgeom.model.sites import Site, split_element
from tdgeom.model.structure.readers import read_input, read_output, write_input, write_output

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Out:
    hidden: torch.Tensor
    weights: torch.Tensor | None = None


class Block(nn.Module):
    """Takes and gives a dataclass, or a tuple, or a mapping."""

    def __init__(self, form):
        super().__init__()
        self.lin, self.form = nn.Linear(8, 8), form

    def forward(self, given):
        x = given if isinstance(given, torch.Tensor) else read_output((), {}, given)
        y = x + self.lin(x)
        pair = y.mean(-1, keepdim=True)
        return {
            "record": lambda: Out(y), "nested": lambda: ([None, Out(y)], pair), "mapping": lambda: {"a": y, "b": pair}
        }[self.form]()  # fmt: skip


class Net(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.blocks = nn.ModuleList(Block(form) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def run_by_hand(model, change):
    """The model's last stream with what the second block gives changed."""
    with torch.no_grad():
        stream = X
        for i, block in enumerate(model.blocks):
            stream = stream + block.lin(stream)
            stream = change(stream) if i == 1 else stream
    return stream


@pytest.mark.parametrize("form", ["record", "nested", "mapping"])
def test_blocks_that_hand_on_containers(form):
    model = Net(form)
    acts = tg.Capture(model, ["residual_input", "residual_output"])(TensorDict({"x": X}))["acts"]
    expected = X
    for layer, block in enumerate(model.blocks):
        torch.testing.assert_close(acts[f"residual_input.{layer}"], expected)
        expected = (expected + block.lin(expected)).detach()
        torch.testing.assert_close(acts[f"residual_output.{layer}"], expected)
    for site, change in (("residual_output.1", lambda x: 2 * x), ("residual_input.2", lambda x: 2 * x)):
        with torch.no_grad(), tg.Intervene(model, {site: tg.Scale(2.0)}):
            torch.testing.assert_close(read_output((), {}, model(X)), run_by_hand(model, change))


@dataclass
class Two:
    first: torch.Tensor
    second: torch.Tensor


def test_a_record_of_several_tensors():
    out = Two(X, 2 * X)
    with pytest.raises(ValueError, match=r"Two holds several tensors.*\['first'\], \['second'\].*Remedy"):
        read_output((), {}, out)
    assert read_output((), {}, out, ("second",)) is out.second
    assert read_output((X[:, :1],), {}, Two(X, X[:, :1])).shape == (2, 1, 8)  # the one of the input's shape
    changed = write_output((), {}, out, X + 1, ("second",))
    assert torch.equal(changed.second, X + 1)
    assert changed.first is X and torch.equal(out.second, 2 * X)
    given = write_input((None, Out(X)), {"scale": 2}, None, X + 1)
    assert torch.equal(read_input(*given), X + 1) and given[1] == {"scale": 2}


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("h.0.attn[1]", ("h.0.attn", (1,))),
        ("h.0.attn[-1][0]", ("h.0.attn", (-1, 0))),
        ("head['logits']", ("head", ("logits",))),
        ("h.[0-3]", ("h.[0-3]", None)),
        ("h.[1]", ("h.[1]", None)),
        ("h.*.attn", ("h.*.attn", None)),
        ("<root>[1]", ("<root>", (1,))),
    ],
)
def test_elements_of_paths(path, parts):
    assert split_element(path) == parts
    site = Site(f"module_output:{path}")
    assert site.path == path and Site(site) == site


def test_the_second_element_of_a_tuple():
    model, batch = models.gpt2(attn_implementation="eager"), models.text_batch()
    capture = tg.Capture(model, ["module_output:transformer.h.*.attn[1]", "attn_pattern"])
    acts = capture(TensorDict(batch))["acts"]
    for layer in range(models.DEPTH):
        torch.testing.assert_close(
            acts[f"module_output:transformer.h.{layer}.attn[1]"], acts[f"attn_pattern.{layer}"]
        )
    with pytest.raises(RuntimeError, match=r"attn\[7\]' expected a tensor"):
        tg.Capture(model, "module_output:transformer.h.0.attn[7]")(TensorDict(batch))
    nested = tg.Capture(model, "module_output:transformer.h.0.attn[1]", nested=True)(TensorDict(batch))
    assert nested["acts", "transformer", "h", "0", "attn", "1"].shape == (3, 4, 7, 7)


def test_an_edit_of_one_element_leaves_the_others():
    model = Net("nested")
    with torch.no_grad(), tg.Intervene(model, {"module_output:blocks.2[1]": tg.Scale(0.0)}):
        (_, out), pair = model(X)
    torch.testing.assert_close(out.hidden, run_by_hand(model, lambda x: x))
    assert float(pair.abs().max()) == 0
    with torch.no_grad(), tg.Intervene(model, {"module_output:blocks.2[0][1]['hidden']": tg.Scale(0.0)}):
        (_, out), pair = model(X)
    assert float(out.hidden.abs().max()) == 0 < float(pair.abs().max())


def test_the_model_s_own_output_is_a_site():
    model, batch = models.gpt2(), models.text_batch()
    site = "module_output:<root>['logits']"
    with torch.no_grad():
        expected = model(**batch).logits
    capture = tg.Capture(model, ["residual_output.-1", site])
    assert capture.sites == ["residual_output.2", site]
    assert tg.Capture(model, "module_output:").sites == ["module_output:<root>"]
    for name in (site, "module_output:<root>"):
        torch.testing.assert_close(tg.Capture(model, name)(TensorDict(batch))["acts", name], expected)
    with tg.Capture(model, site) as calls, torch.no_grad():
        model(**batch)
    torch.testing.assert_close(calls[0]["acts", site], expected)
    with tg.Intervene(model, {site: tg.Scale(2.0)}), torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, 2 * expected)
