"""What a call gave stays what it was: whatever the model, or the caller, writes to the same memory later."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn

import models
from tdgeom.model.capture import Capture
from tdgeom.model.intervene import Intervene


class Static(nn.Module):
    """A block that writes what it gives into one buffer, as a CUDA graph does, or into one for every shape of input."""

    def __init__(self, by_shape=False):
        super().__init__()
        self.linear, self.by_shape, self.buffers_of = nn.Linear(4, 4), by_shape, {}

    @torch.no_grad()
    def forward(self, x):
        shape = x.shape if self.by_shape else (8, 9, 4)
        buffer = self.buffers_of.setdefault(shape, torch.zeros(shape))
        out = buffer[: x.shape[0], : x.shape[1]]
        out.copy_(x + self.linear(x))
        return out


def stack(**settings):
    torch.manual_seed(0)
    return nn.Sequential(Static(**settings), Static(**settings), Static(**settings))


def fresh(model, x):
    """What each block gives, in memory of its own."""
    found = []
    for block in model:
        x = (x + block.linear(x)).detach()
        found.append(x)
    return found


LENGTHS = {
    "one shape": [5, 5, 5],
    "a prompt and its steps": [5, 1, 1, 1],
    "growing": [3, 4, 5],
    "back": [5, 3, 5, 3],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("by_shape", [False, True])
@pytest.mark.parametrize("form", ["context", "module"])
def test_a_model_that_gives_the_same_memory_again(form, by_shape, lengths):
    model = stack(by_shape=by_shape)
    inputs = [torch.randn(2, n, 4) for n in lengths]
    capture = Capture(model, "residual_output", model_outputs="y")
    if form == "context":
        with capture as calls:
            for x in inputs:
                model(x)
    else:
        calls = [capture(TensorDict({"input": x})) for x in inputs]
    model(torch.zeros(2, 5, 4))  # outside of any context
    expected = [fresh(model, x) for x in inputs]
    certain = len(calls) if form == "module" else len(calls) - by_shape
    for call, values in list(zip(calls, expected, strict=True))[:certain]:
        for layer, value in enumerate(values):
            assert torch.equal(call["acts", f"residual_output.{layer}"], value)
        assert torch.equal(call["y"], values[-1])


def test_inputs_that_the_caller_fills_again():
    model, x = stack(), torch.zeros(2, 3, 4)
    with Capture(model, "residual_output") as calls:
        for value in (1.0, 2.0, 3.0):
            model(x.fill_(value))
    assert [float(call["input"].mean()) for call in calls] == [1.0, 2.0, 3.0]


def test_records_of_several_contexts_and_edits():
    model = stack()
    capture = Capture(model, ["residual_input", "residual_output"])
    inputs, kept = [torch.randn(2, 3, 4) for _ in range(4)], []
    for x in inputs:
        with Intervene(model, {"residual_output.0": lambda value: 2 * value}), capture as calls:
            model(x)
        kept.append(calls[0]["acts"])
    for x, acts in zip(inputs, kept, strict=True):
        assert torch.equal(acts["residual_input.0"], x)
        first = 2 * fresh(model, x)[0]
        assert torch.equal(acts["residual_output.0"], first) and torch.equal(acts["residual_input.1"], first)
        assert torch.equal(acts["residual_output.2"], fresh(model, x)[0] * 0 + fresh(model[1:], first)[1])


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_models_that_give_new_memory_are_copied_nowhere(name, monkeypatch):
    model, batch, copied = models.TEXT_MODELS[name](), models.text_batch(), []
    own = torch.Tensor.clone
    sites = ["residual_input", "attn_output", "residual_output", "final_norm"]
    capture = Capture(model, sites[: 3 if name == "bert" else 4])
    capture(TensorDict(batch))
    monkeypatch.setattr(
        torch.Tensor, "clone", lambda t, **settings: (copied.append(t), own(t, **settings))[1]
    )
    with torch.no_grad(), capture as calls:
        for _ in range(3):
            model(**batch)
    capture(TensorDict(batch))
    assert len(calls) == 3
    assert not any(t.is_floating_point() for t in copied)
    del calls
    if name != "bert":
        with torch.no_grad(), capture as calls:
            model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
        assert len(calls) == 4 and not any(t.is_floating_point() and t.ndim == 3 for t in copied)
