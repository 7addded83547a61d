"""Attribution patching against the exact grid, and against gradients by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import models
import tdgeom as tg
from tdgeom.cli.demo import demo_model


def pair(batch=2, length=5, seed=1):
    ids = torch.randint(4, models.VOCAB, (2, batch, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids[0]}, {"input_ids": ids[1]}


class Sum(nn.Module):
    """A block that is linear: what came before, twice through a matrix."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.second(self.first(x)).cumsum(1)


class Linear(nn.Module):
    """A language model without a nonlinearity."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(Sum() for _ in range(3))
        self.head = nn.Linear(8, 20)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x)}


@pytest.mark.filterwarnings("ignore:attribution_patching of")
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_estimate_is_gradient_times_difference(direction):
    model, (clean, corrupted) = models.llama(), pair()
    base, other = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    found = tg.attribution_patching(
        model,
        clean,
        corrupted,
        ["residual_input", "z", "mlp_act"],
        answers=(5, 9),
        layers=1,
        direction=direction,
    )
    neurons = tg.attribution_patching(
        model, clean, corrupted, "mlp_act", answers=(5, 9), layers=1, direction=direction, by="neuron"
    )
    block = model.model.layers[1]
    held, given = {}, {}
    modules = {"residual_input": block, "z": block.self_attn.o_proj, "mlp_act": block.mlp.down_proj}
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda m, args, name=name: held.update({name: args[0]}))
    model(**other)
    theirs = {name: value.detach() for name, value in held.items()}
    logits = model(**base).logits[:, -1]
    metric = logits[:, 5] - logits[:, 9]
    for name, value in held.items():
        given[name] = torch.autograd.grad(metric.sum(), value, retain_graph=True)[0] * (theirs[name] - value)
    start = metric.detach().double()
    product = {name: value.detach().double() for name, value in given.items()}
    expected = {
        "residual_input": start + product["residual_input"].sum(-1).T,
        "z": start + product["z"].unflatten(-1, (4, 4)).sum((1, 3)).T,
        "mlp_act": start + product["mlp_act"].sum(-1).T,
    }
    for name, value in expected.items():
        torch.testing.assert_close(found["per_example", name][0], value, rtol=1e-4, atol=1e-6)
    each = start + product["mlp_act"].sum(1).T
    torch.testing.assert_close(neurons["per_example", "mlp_act"][0], each, rtol=1e-4, atol=1e-6)
    exact = tg.activation_patching(
        model,
        clean,
        corrupted,
        "residual_input",
        answers=(5, 9),
        layers=1,
        direction=direction,
        progress=False,
    )
    for root in ("clean", "corrupted"):
        torch.testing.assert_close(found[root], exact[root])
    torch.testing.assert_close(found["changed"]["residual_input"], exact["changed"]["residual_input"])
    torch.testing.assert_close(found["exact", "residual_input"], exact["grid", "residual_input"])


@pytest.mark.filterwarnings("ignore:attribution_patching of")
def test_the_error_is_that_of_the_cells_that_were_patched():
    model, runs = models.gpt2(), pair()
    settings = {"answers": (5, 9), "align": None}
    found = tg.attribution_patching(model, *runs, "residual_input", sample_size=6, seed=3, **settings)
    exact = tg.activation_patching(model, *runs, "residual_input", progress=False, **settings)[
        "grid", "residual_input"
    ]
    patched = found["exact", "residual_input"]
    known = ~patched.isnan()
    assert known.sum() == 6 == found["error", "residual_input", "cells"]
    torch.testing.assert_close(patched[known], exact[known])
    estimate = found["grid", "residual_input"][known]
    off, error = (estimate - exact[known]).abs(), found["error", "residual_input"]
    torch.testing.assert_close(error["mean"], off.mean())
    torch.testing.assert_close(error["largest"], off.max())
    both = torch.stack([estimate, exact[known]])
    torch.testing.assert_close(error["correlation"], torch.corrcoef(both)[0, 1])
    with torch.inference_mode():
        again = tg.attribution_patching(model, *runs, "residual_input", sample_size=6, seed=3, **settings)
    torch.testing.assert_close(again["grid", "residual_input"], found["grid", "residual_input"])
    other = tg.attribution_patching(model, *runs, "residual_input", sample_size=6, seed=4, **settings)
    assert not torch.equal(known, ~other["exact", "residual_input"].isnan())


def test_of_a_linear_model_it_is_exact_and_of_a_saturated_metric_it_says_so():
    ids = torch.randint(0, 20, (2, 3, 6), generator=torch.Generator().manual_seed(2))
    runs = {"input_ids": ids[0]}, {"input_ids": ids[1]}
    found = tg.attribution_patching(Linear(), *runs, answers=(3, 4))
    exact = tg.activation_patching(Linear(), *runs, answers=(3, 4), progress=False)
    torch.testing.assert_close(
        found["grid", "residual_input"], exact["grid", "residual_input"], rtol=1e-5, atol=1e-6
    )
    assert found["error", "residual_input", "correlation"] > 1 - 1e-6
    goal = exact["clean"].detach()
    largest_when_clean = lambda logits, example: -((logits[:, 3] - logits[:, 4] - goal[example]) ** 2)
    settings = {"metric": largest_when_clean, "direction": "noise"}
    with pytest.warns(
        UserWarning, match=r"attribution_patching of residual_input: on the 18 cells.*Remedy: steps="
    ):
        flat = tg.attribution_patching(Linear(), *runs, **settings)
    assert flat["error", "residual_input", "correlation"].isnan()
    with pytest.warns(UserWarning, match=r"correlates 0\.\d\d with the exact effect"):
        path = tg.attribution_patching(Linear(), *runs, steps=3, **settings)
    # gradients on the way from one run's embeddings to the other's add up to the whole difference
    effects = path["per_example", "residual_input"][0] - path["clean"]
    torch.testing.assert_close(
        effects.sum(0).float(), path["corrupted"] - path["clean"], rtol=1e-4, atol=1e-5
    )
    for given, match in (
        ({"metric": lambda x: x.argmax(-1).float()}, "has no gradient"),
        ({"metric": lambda x: x.detach()[:, 3]}, "has no gradient"),
        ({"sample_size": 1}, "at least 2, got 1"),
        ({"steps": 0}, "at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=match):
            tg.attribution_patching(
                Linear(), *runs, **{"answers": (3, 4) if "metric" not in given else None, **given}
            )


@pytest.mark.slow
def test_on_minilm_it_correlates_with_the_exact_grid():
    """A real encoder: how near each text is to what it is with its own last word."""
    model, tokenizer = demo_model()
    texts = ["The doctor gave the patient a new {}.", "A dog chased the ball across the {}."]
    clean, corrupted = (
        dict(
            tokenizer(
                [text.format(word) for text, word in zip(texts, words)], return_tensors="pt", padding=True
            )
        )
        for words in (("medicine", "park"), ("bicycle", "city"))
    )
    mask = clean["attention_mask"].unsqueeze(-1)
    pooled = lambda hidden, at: nn.functional.normalize((hidden * at).sum(1) / at.sum(1), dim=-1)
    with torch.no_grad():
        own = pooled(model(**clean).last_hidden_state, mask)
    near = lambda hidden, example: (pooled(hidden, mask[example]) * own[example]).sum(-1)
    settings = {"metric": near, "output": "last_hidden_state"}
    for kind, steps in (("z", 1), ("attn_output", 1), ("residual_input", 5)):
        found = tg.attribution_patching(model, clean, corrupted, kind, steps=steps, **settings)
        exact = tg.activation_patching(model, clean, corrupted, kind, progress=False, **settings)[
            "grid", kind
        ]
        both = torch.stack([found["grid", kind].flatten(), exact.flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.9, kind
        assert found["error", kind, "correlation"] > 0.9
