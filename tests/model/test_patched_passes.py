"""Many cells in one pass, from the block on that is patched: the numbers of one pass each, or a refusal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import models
import tdgeom as tg
from tdgeom.model.patching.patched_passes import PatchedPasses


class Noise(nn.Module):
    """Blocks of a small language model; ``mix`` and what a block leaves for a later one make it unlike others."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(Block(kind, self) for _ in range(3))
        self.head = nn.Linear(8, 20)
        self.left: list[torch.Tensor] = []
        self.calls = [0, 0, 0]

    def forward(self, input_ids):
        self.left.clear()
        x = self.embed(input_ids)
        for index, block in enumerate(self.blocks):
            x = block(x, index)
        return {"logits": self.head(x)}


class Block(nn.Module):
    def __init__(self, kind, owner):
        super().__init__()
        self.linear, self.mlp = nn.Linear(8, 8), nn.Linear(8, 8)
        self.kind = kind
        self.__dict__["owner"] = owner

    def forward(self, x, index):
        self.owner.calls[index] += 1
        x = x + torch.tanh(self.mlp(torch.tanh(self.linear(x.cumsum(1)))))
        if self.kind == "rows":
            x = x + 0.1 * x.mean(0, keepdim=True)
        if self.kind == "noise":
            x = x + torch.randn_like(x)
        if self.kind == "left":  # the last block reads what the first has left
            self.owner.left.append(x)
            x = x + (self.owner.left[0] if index == 2 else 0)
        return x


def runs(batch=2, length=5):
    ids = torch.randint(0, 20, (2, batch, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids[0]}, {"input_ids": ids[1]}


def one_by_one(model, clean, corrupted, kind="residual_input"):
    """A pass for every cell, through a hook of its own."""
    found = torch.zeros(3, 5, 2, dtype=torch.float64)
    for layer, block in enumerate(model.blocks):
        seen = {}
        handle = block.register_forward_pre_hook(lambda m, args, seen=seen: seen.update(x=args[0]))
        with torch.no_grad():
            model(**clean)
            handle.remove()
            for position in range(5):

                def put(module, args, seen=seen, position=position):
                    x = args[0].clone()
                    x[:, position] = seen["x"][:, position]
                    return (x, *args[1:])

                handle = block.register_forward_pre_hook(put)
                logits = model(**corrupted)["logits"][:, -1].double()
                handle.remove()
                found[layer, position] = logits[:, 3] - logits[:, 4]
    return found


SETTINGS = {"answers": (3, 4), "progress": False}


@pytest.mark.parametrize("kind", ["plain", "left"])
@pytest.mark.parametrize("rows", [1, 2, 3, 64])
def test_however_many_rows_a_pass_has_cells_are_what_they_are_alone(kind, rows):
    model, (clean, corrupted) = Noise(kind), runs()
    expected = one_by_one(model, clean, corrupted)
    got = tg.activation_patching(model, clean, corrupted, rows=rows, **SETTINGS)[
        "per_example", "residual_input"
    ]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_blocks_before_the_patched_one_are_not_run_where_nothing_else_of_them_is_used():
    for kind, late in (("plain", 5), ("left", 1)):  # five cells, of two examples each; one try
        model, (clean, corrupted) = Noise(kind), runs()
        tg.activation_patching(model, clean, corrupted, layers=2, rows=2, **SETTINGS)
        assert [now - model.calls[0] for now in model.calls] == [0, 0, late]
        assert "forward" not in model.blocks[0].__dict__


@pytest.mark.parametrize("kind", ["rows", "noise"])
def test_rows_that_act_on_each_other_and_noise_are_refused(kind):
    model, (clean, corrupted) = Noise(kind), runs()
    with pytest.raises(ValueError, match="with nothing patched.*Remedy: rows=2"):
        tg.activation_patching(model, clean, corrupted, **SETTINGS)
    if kind == "rows":  # one cell a pass is a pass of the batch itself
        got = tg.activation_patching(model, clean, corrupted, layers=0, rows=2, **SETTINGS)
        expected = one_by_one(model, clean, corrupted)[:1]
        torch.testing.assert_close(got["per_example", "residual_input"], expected, rtol=1e-5, atol=1e-6)


def test_a_metric_that_looks_at_other_rows_is_refused():
    model, pair = models.gpt2(), runs()
    for function in (lambda x: x[:, 3] - x[:, 3].mean(), lambda x: x.softmax(0)[:, 4]):
        with pytest.raises(ValueError, match="a metric of each row for itself"):
            tg.activation_patching(model, *pair, metric=function, progress=False)


def test_cells_at_which_both_runs_hold_the_same_are_not_run(monkeypatch):
    model = models.gpt2()
    clean, _ = runs()
    corrupted = {"input_ids": clean["input_ids"].clone()}
    corrupted["input_ids"][:, 3] += 1
    passes = []
    inside = PatchedPasses._pass
    monkeypatch.setattr(
        PatchedPasses,
        "_pass",
        lambda self, edit, cell, *a: passes.append(cell) or inside(self, edit, cell, *a),
    )
    out = tg.activation_patching(model, clean, corrupted, **SETTINGS)
    changed = out["changed", "residual_input"]
    assert changed[0].any(1).tolist() == [False, False, False, True, False]  # the embedding
    assert changed[1].any(1).tolist() == [False, False, False, True, True]  # a causal model's later positions
    assert sum(int((cell >= 0).sum()) for cell in passes) == int(changed.sum()) == 2 * 5
    grid = out["per_example", "residual_input"]
    assert torch.equal(grid[:, 0], out["corrupted"].double().expand(3, 2))
    with pytest.warns(UserWarning, match="both runs hold the same at every cell of residual_input"):
        tg.activation_patching(model, clean, corrupted, positions=[0, 1], **SETTINGS)


def test_a_batch_whose_tensors_are_no_rows_is_repeated_whole():
    """Two images for two texts, their patches one after the other: three rows of pixels and one."""

    class Looking(Noise):
        def forward(self, input_ids, pixels, counts):
            texts = len(counts)
            owner = torch.arange(texts).repeat_interleave(counts)
            image = torch.zeros(texts, 8).index_add(0, owner, pixels)
            self.left.clear()
            x = self.embed(input_ids) + image[:, None]
            for index, block in enumerate(self.blocks):
                x = block(x, index)
            return {"logits": self.head(x)}

    model, pair = Looking(), runs()
    for number, batch in enumerate(pair):
        batch["pixels"] = torch.randn(4, 8, generator=torch.Generator().manual_seed(number))
        batch["counts"] = torch.tensor([3, 1])
    got = tg.activation_patching(model, *pair, rows=64, **SETTINGS)["per_example", "residual_input"]
    torch.testing.assert_close(got, one_by_one(model, *pair), rtol=1e-5, atol=1e-6)


def test_inside_an_intervene_the_edited_passes_are_patched():
    model, (clean, corrupted) = Noise(), runs()
    shift = torch.linspace(-1, 1, 8)
    plain = one_by_one(model, clean, corrupted)
    with tg.Intervene(model, {"residual_output.0": tg.Steer(shift)}):
        expected = one_by_one(model, clean, corrupted)
        got = tg.activation_patching(model, clean, corrupted, **SETTINGS)["per_example", "residual_input"]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(plain, expected, atol=1e-2)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
