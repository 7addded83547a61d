"""The grid of path patching against single path patches, and on a circuit whose weights are written by hand."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tests.model.test_path_patch import induction_toy, prompts

import models
import tdgeom as tg

ANSWERS = (5, 7)


def difference(logits, last=-1):
    return (logits[:, last, ANSWERS[0]] - logits[:, last, ANSWERS[1]]).double()


def one_by_one(model, sender, receiver, heads, base, other, through="residual"):
    donor = tg.Capture(model, sender[0])(TensorDict(other))
    edit = tg.Patch(donor, heads=None if sender[1] is None else [sender[1]])
    path = tg.PathPatch({sender[0]: edit}, heads=heads, through=through)
    return difference(tg.Intervene(model, {receiver: path})(TensorDict(base))["logits"])


@pytest.mark.parametrize(
    "name, direction", [("gpt2", "denoise"), ("llama", "noise"), ("gpt_neox", "noise"), ("gemma2", "noise")]
)
def test_every_cell_is_a_path_patch_of_its_own(name, direction):
    model = models.TEXT_MODELS[name]().double()
    clean, other = ({"input_ids": ids} for ids in prompts())
    found = tg.path_patching(
        model, clean, other, ["z", "mlp_output", "embed"], {"k.2": [0, 3], "mlp_input.1": None, "final_norm": None},
        answers=ANSWERS, direction=direction, rows=5, progress=False,
    )  # fmt: skip
    base, donor = (clean, other) if direction == "noise" else (other, clean)
    cells = [
        ("z->k.2[3]", ("z.1", 2), "k.2", [3], (1, 2)),
        ("z->k.2[0]", ("z.0", 1), "k.2", [0], (0, 1)),
        ("z->mlp_input.1", ("z.0", 3), "mlp_input.1", None, (0, 3)),
        ("mlp_output->k.2[0]", ("mlp_output.0", None), "k.2", [0], (0, 0)),
        ("z->final_norm", ("z.2", 0), "final_norm", None, (2, 0)),
        ("embed->k.2[3]", ("embed", None), "k.2", [3], (0, 0)),
    ]
    for kind, sender, receiver, heads, at in cells:
        expected = one_by_one(model, sender, receiver, heads, base, donor)
        torch.testing.assert_close(found["per_example", kind][at], expected, rtol=1e-9, atol=1e-11)
        assert bool(found["changed", kind][at].all())
    grid = found["grid", "z->k.2[0]"]
    assert grid.shape == (3, 4) and bool(grid[2].isnan().all()) and not bool(grid[:2].isnan().any())
    beside = name == "gpt_neox"
    assert bool(found["grid", "z->mlp_input.1"][1].isnan().all()) == beside
    ends = [
        found[end].double().mean()
        for end in (("clean", "corrupted") if direction == "noise" else ("corrupted", "clean"))
    ]
    share = (grid[:2] - ends[0]) / (ends[1] - ends[0])
    torch.testing.assert_close(found["recovered", "z->k.2[0]"][:2], share)


def test_the_logits_alone_are_reached_by_what_is_added_to_them():
    model = models.gpt2().double()
    clean, other = ({"input_ids": ids} for ids in prompts())
    found = tg.path_patching(model, clean, other, answers=ANSWERS, progress=False)
    expected = one_by_one(model, ("z.1", 2), "final_norm", None, clean, other)
    torch.testing.assert_close(found["per_example", "z->logits"][1, 2], expected, rtol=1e-9, atol=1e-11)
    together = tg.path_patching(
        model,
        clean,
        other,
        receivers={"q.2": [0, 1], "v.2": 3},
        together=True,
        through="mlp",
        answers=ANSWERS,
        progress=False,
    )
    donor = tg.Capture(model, "z.0")(TensorDict(other))
    path = {"z.0": tg.Patch(donor, heads=[2])}
    edits = {
        "q.2": tg.PathPatch(path, heads=[0, 1], through="mlp"),
        "v.2": tg.PathPatch(path, heads=[3], through="mlp"),
    }
    logits = tg.Intervene(model, edits)(TensorDict(clean))["logits"]
    kind = "z->q.2[0]+q.2[1]+v.2[3]"
    torch.testing.assert_close(together["per_example", kind][0, 2], difference(logits), rtol=1e-9, atol=1e-11)


def test_padding_and_positions_are_those_of_activation_patching():
    model = models.llama().double()
    ids, changed = prompts()
    alone = tg.path_patching(
        model,
        {"input_ids": ids},
        {"input_ids": changed},
        receivers={"k.2": [0]},
        positions=1,
        answers=ANSWERS,
        progress=False,
    )
    wide = [torch.nn.functional.pad(one, (2, 0)) for one in (ids, changed)]
    padded = [{"input_ids": one, "attention_mask": (one > 0).long()} for one in wide]
    found = tg.path_patching(
        model, *padded, receivers={"k.2": [0]}, positions=1, answers=ANSWERS, progress=False
    )
    torch.testing.assert_close(
        found["grid", "z->k.2[0]"], alone["grid", "z->k.2[0]"], rtol=1e-7, atol=1e-9, equal_nan=True
    )


def test_a_hand_written_induction_circuit_has_one_path():
    model = induction_toy()
    clean, other = ({"input_ids": torch.tensor([[0, first, 2, 3, 4, 1]])} for first in (1, 5))
    found = tg.path_patching(
        model,
        clean,
        other,
        receivers={"q.1": [0, 1], "k.1": [0, 1], "v.1": [0, 1]},
        answers=(2, 4),
        progress=False,
    )
    lost = {kind: found["recovered", kind][0].tolist() for kind in found["recovered"].keys()}
    assert lost["z->k.1[1]"][0] > 0.9
    rest = [value for kind, row in lost.items() for value in (row[1:] if kind == "z->k.1[1]" else row)]
    assert max(map(abs, rest)) < 0.05


def test_what_is_asked_wrongly_is_said():
    model = models.gpt2()
    clean, other = ({"input_ids": ids} for ids in prompts())
    ask = lambda **settings: tg.path_patching(
        model, clean, other, answers=ANSWERS, progress=False, **settings
    )
    for settings, said in (
        ({"receivers": ()}, "receivers= names none"),
        ({"receivers": ["q.1", "q.1"]}, "names one twice"),
        ({"receivers": ["q.1", "logits"], "together": True}, "a call of its own"),
        ({"senders": "q"}, "a sender is what a part gives"),
        ({"through": "all"}, "through= expects"),
        ({"output": None}, "output= names an output"),
    ):
        with pytest.raises(ValueError, match=said):
            ask(**settings)


def test_receivers_together_are_the_same_in_any_order():
    """All heads of a site and one of them are all heads."""
    model = models.gpt2()
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 6 if weight.ndim == 2 else 1
    clean = {"input_ids": torch.randint(1, models.VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))}
    corrupted = {"input_ids": clean["input_ids"].clone()}
    corrupted["input_ids"][:, 2] = torch.tensor([5, 6])

    def grid(receivers):
        found = tg.path_patching(
            model, clean, corrupted, receivers=receivers, together=True, answers=(10, 12), progress=False
        )["grid"]
        return next(iter(found.values()))

    whole = grid({"k": None})
    assert whole.abs().nansum() > 0
    for receivers in ({"k": None, "k.1": [0]}, {"k.1": [0], "k": None}):
        torch.testing.assert_close(grid(receivers), whole, equal_nan=True)
