"""Routers: logits are edited before the choice, and loads count the experts that ran."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torch import nn

import mixtures
import models
import tdgeom as tg
from tdgeom.model.calls.router_kernel import expert_indices

NAMES = list(mixtures.BUILDERS)


def batch_for(name):
    batch = models.text_batch()
    return {**batch, "decoder_input_ids": batch["input_ids"]} if name.startswith("switch") else batch


def site_of(model, kind="router_logits"):
    """The last router of the first stack that has one."""
    found = [str(s) for s in tg.Capture(model, kind).sites]
    return [s for s in found if s.partition(".")[0] == found[0].partition(".")[0]][-1]


def ran(model, site, batch):
    """What an own hook sees: the experts, row by row, that the module of experts was given (a mask or indices)."""
    path = tg.Capture(model, site).module_paths[site]
    owner = model.get_submodule(path.rpartition(".")[0])
    seen = []

    def note(module, args, kwargs):
        seen.append(
            next(
                v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.dtype == torch.int64
            )
        )

    handle = owner.experts.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**batch)
    handle.remove()
    count = tg.Capture(model, site)(TensorDict(batch))["acts", site].shape[-1]
    told = seen[0].reshape(-1, seen[0].shape[-1])
    if seen[0].shape[-1] == count and int(told.max()) <= 1:
        return [set(row.nonzero().flatten().tolist()) for row in told], count
    return [set(row.tolist()) for row in told], count


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_comes_before_the_choice(name):
    """The logits negated are a router with its weights negated; a raised expert is chosen everywhere it can be."""
    model, batch = mixtures.build(name), batch_for(name)
    sites = [str(s) for s in tg.Capture(model, "router_logits").sites]
    with torch.no_grad():
        plain = model(**batch).logits
        weights = []
        paths = tg.Capture(model, "router_logits").module_paths
        for path in (paths[site] for site in sites):
            module = model.get_submodule(path)
            weights += [p for p in module.parameters() if p.ndim == 2]
            weights += [p for n, p in module.named_parameters() if n.endswith("bias")]
        for weight in weights:
            weight.neg_()
        expected = model(**batch).logits
        for weight in weights:
            weight.neg_()
        with tg.Intervene(model, {site: torch.neg for site in sites}):
            found = model(**batch).logits
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    last = sites[-1]
    target = 0  # of the largest correction, where there is one: raised scores saturate
    more = lambda x: x + 1e4 * nn.functional.one_hot(torch.tensor(target), x.shape[-1])
    choice = last.replace("logits", "choice")
    with torch.no_grad(), tg.Intervene(model, {last: more}), tg.Capture(model, choice) as calls:
        model(**batch)
    chosen = (calls[0]["acts", choice] == target).any(-1)
    if name == "switch, one a sequence":
        assert torch.equal(chosen.sum(1), torch.ones(len(chosen), dtype=torch.int64))
    else:
        assert chosen.all()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("jetmoe", "llama4")])
def test_the_choice_is_what_the_experts_were_given(name):
    model, batch = mixtures.build(name), batch_for(name)
    site = site_of(model)
    expected, count = ran(model, site, batch)
    choice = site.replace("logits", "choice")
    acts = tg.Capture(model, site)(TensorDict(batch))["acts"]
    assert acts[choice].dtype == torch.int64 and acts[choice].shape[:2] == acts[site].shape[:2]
    rows = acts[choice].flatten(0, 1)
    assert [set(row[row >= 0].tolist()) for row in rows] == expected
    mask = batch["attention_mask"].flatten().bool()
    load = torch.zeros(count, dtype=torch.float64)
    for attended, row in zip(mask, expected, strict=True):
        for expert in row if attended else ():
            load[expert] += 1
    pipeline = TensorDictSequential(
        tg.Capture(model, site), tg.SelectTokens([site]), tg.ForEach(tg.RouterLoad(), [site])
    )
    result = tg.run(pipeline, [batch], progress=False)["router", site]
    assert int(result["routed_assignments"]) == int(load.sum())
    torch.testing.assert_close(result["load"], load / load.sum())
    logits = acts[site].flatten(0, 1)[mask].double()
    torch.testing.assert_close(result["mean_probability"], logits.softmax(-1).mean(0))


@pytest.mark.parametrize("name", ["jetmoe", "llama4"])
def test_routers_that_give_no_indices_are_told_by_what_they_selected(name):
    model, batch = mixtures.build(name), batch_for(name)
    site = site_of(model)
    acts = tg.Capture(model, site)(TensorDict(batch))["acts"]
    k = acts[site.replace("logits", "choice")].shape[-1]
    assert k == model.config.num_experts_per_tok
    expected = acts[site].topk(k, -1).indices.sort(-1).values
    assert torch.equal(acts[site.replace("logits", "choice")].sort(-1).values, expected)


def test_the_bias_decides_and_the_logits_do_not():
    """DeepSeek-V3 adds a correction before it chooses: counting the largest logits counts other experts."""
    model, batch = mixtures.build("deepseek_v3"), models.text_batch()
    table = tg.analyze_model(model, [batch], metrics=["spectrum", "router"], progress=False).router
    site = "router_logits.1"
    assert table["site"].tolist() == [site]
    expected, count = ran(model, site, batch)
    rows = [row for row, on in zip(expected, batch["attention_mask"].flatten().bool(), strict=True) if on]
    load = torch.tensor([sum(e in row for row in rows) for e in range(count)]).double() / (2 * len(rows))
    torch.testing.assert_close(torch.as_tensor(table["load"][0]), load)
    logits = tg.Capture(model, site)(TensorDict(batch))["acts", site][batch["attention_mask"].bool()]
    naive = torch.bincount(logits.topk(2).indices.flatten(), minlength=count) / logits.shape[0] / 2
    assert (naive - load).abs().max() > 0.05


def test_a_choice_is_read_and_not_edited():
    model = mixtures.build("mixtral")
    with pytest.raises(ValueError, match="is what a router has chosen.*edit 'router_logits'"):
        tg.Intervene(model, {"router_choice.0": torch.neg})
    assert not any(e.site.kind == "router_choice" for e in tg.available_sites(model))
    capture = tg.Capture(model, ["router_logits", "residual_output"])
    assert {s.kind for s in capture.sites} == {"router_logits", "residual_output"}
    assert ("acts", "router_choice.1") in capture.out_keys
    listed = tg.Capture(model, "router_logits", out_keys=["a", "b"])
    assert listed.out_keys == ["a", "b"]


class Reports(nn.Module):
    """Chooses by something else than the logits that it makes."""

    def __init__(self):
        super().__init__()
        self.gate, self.other = nn.Linear(8, 4), nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        self.gate(x)
        best = self.other(x).argmax(-1)
        return sum((best == i).unsqueeze(-1) * expert(x) for i, expert in enumerate(self.experts))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), Reports()

    def forward(self, hidden_states):
        return hidden_states + self.mlp(self.norm(hidden_states))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


def test_edits_without_effect_are_refused():
    model = Net().eval()
    with pytest.raises(
        RuntimeError,
        match="cannot be shown to change which experts are chosen.*'module_output:blocks.0.mlp.gate'",
    ):
        tg.Intervene(model, {"router_logits": torch.neg})
    tg.Intervene(model, {"module_output:blocks.*.mlp.gate": torch.neg})


@pytest.mark.parametrize(
    ("told", "indices"),
    [
        ([[0, 3], [2, 1]], [[0, 3], [2, 1]]),
        ([[0, 1, 0, 0], [0, 0, 0, 0]], [[1], [-1]]),
        ([[1, 0, 1, 0], [0, 1, 0, 0]], [[0, 2], [1, -1]]),
        ([[5, 0]], None),
        ([1, 2], None),
    ],
)
def test_indices_and_masks(told, indices):
    found = expert_indices(torch.tensor(told), 4)
    if indices is None:
        assert found is None
    else:
        assert [sorted(row) for row in found.tolist()] == [sorted(row) for row in indices]
