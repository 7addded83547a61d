"""What contexts, edits and lenses were made with: shown where it differs from the defaults, stored as plain data, made again."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from tensordict import TensorDict

import models
import tdgeom as tg
from tdgeom.model.capture import Capture
from tdgeom.model.intervene import Intervene

VECTOR = torch.linspace(-1, 1, models.WIDTH)
PROMPTS = {"input_ids": torch.tensor([[5, 6]])}, {"input_ids": torch.tensor([[7, 8]])}
SHOWN = {
    "Steer(vector=tensor of shape (16,), coefficient=2.0, positions='last')": lambda: tg.Steer(
        VECTOR, coefficient=2.0, positions="last"
    ),
    "Scale(factor=0.5, heads=1, features=slice(0, 3, None))": lambda: tg.Scale(
        0.5, heads=1, features=slice(0, 3)
    ),
    "Ablate()": tg.Ablate,
    "Ablate(how='resample', seed=3)": lambda: tg.Ablate("resample", seed=3),
    "ProjectOut(basis=tensor of shape (16,))": lambda: tg.ProjectOut(VECTOR),
    "ProjectOnto(basis=tensor of shape (16, 2), positions=[0, 2])": lambda: tg.ProjectOnto(
        torch.eye(16)[:, :2], positions=[0, 2]
    ),
    "BlockAttention(queries='last', keys=[1])": lambda: tg.BlockAttention(queries="last", keys=[1]),
    "Patch(source=tensor of shape (1, 7, 16))": lambda: tg.Patch(torch.zeros(1, 7, models.WIDTH)),
    "ActivationAddition(positive={'input_ids': tensor of shape (1, 2)}, negative={'input_ids': tensor of shape (1, 2)})":
        lambda: tg.ActivationAddition(*PROMPTS),
}  # fmt: skip


@pytest.mark.parametrize("shown", SHOWN)
def test_an_edit_shows_and_stores_its_settings(shown):
    edit = SHOWN[shown]()
    assert repr(edit) == shown
    plain = json.loads(json.dumps(edit.settings()))
    again = type(edit).from_settings(plain)
    assert repr(again) == shown and json.loads(json.dumps(again.settings())) == plain
    assert repr(pickle.loads(pickle.dumps(edit))) == shown
    x = torch.randn(2, 7, 2, models.WIDTH) if edit.heads else torch.randn(2, 7, models.WIDTH)
    if not isinstance(edit, tg.ActivationAddition | tg.Patch | tg.BlockAttention):
        torch.testing.assert_close(again(activation=x), edit(activation=x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "positions",
    [tg.Between(7, [8, 9], inclusive=True), tg.SpecialTokens((3, 4)), tg.RandomPositions(2, 5), slice(1, None), range(3)],
)  # fmt: skip
def test_positions_come_back(positions):
    for stage in (tg.Scale(2.0, positions=positions), tg.AggregateActs(["x"], positions=positions)):
        again = type(stage).from_settings(json.loads(json.dumps(stage.settings())))
        assert again.positions == positions and repr(again) == repr(stage)


def test_contexts_show_and_store_theirs():
    model, batch = models.gpt2(), TensorDict(models.text_batch())
    capture = Capture(model, "residual_output", layers=[0, -1], prefix="b/")
    assert repr(capture) == (
        "Capture(model=GPT2LMHeadModel, sites='residual_output', layers=[0, -1], prefix='b/')"
    )
    again = Capture.from_settings(json.loads(json.dumps(capture.settings())), model=model)
    assert again.sites == capture.sites and again.out_keys == capture.out_keys
    steer = tg.Steer(VECTOR)
    context = Intervene(model, {"residual_output.1": steer, "z": [tg.Ablate(heads=1), torch.tanh]}, layers=0)
    told = json.loads(json.dumps(context.settings()))
    assert told["edits"]["residual_output.1"]["made"] == "Steer"
    assert told["edits"]["z"][1] == {"function": "torch._VariableFunctionsClass.tanh"}
    steer.coefficient = 3.0  # what is set later counts
    assert context.settings()["edits"]["residual_output.1"]["settings"]["coefficient"] == 3.0
    assert "Steer(vector=tensor of shape (16,), coefficient=3.0)" in repr(context)
    without = Intervene(model, {"residual_output.1": steer, "z.0": tg.Ablate(heads=1)})
    twin = Intervene.from_settings(json.loads(json.dumps(without.settings())), model=model)
    torch.testing.assert_close(twin(batch.copy())["logits"], without(batch.copy())["logits"], rtol=0, atol=0)


def test_lenses_show_theirs():
    model = models.llama()
    assert repr(tg.LogitLens(model, top=3)) == "LogitLens(model=LlamaForCausalLM, top=3)"
    lens = tg.TunedLens(model, ["residual_output.0"], outputs=["entropy"])
    assert repr(lens) == "TunedLens(model=LlamaForCausalLM, sites=['residual_output.0'], outputs=['entropy'])"
    assert json.dumps(lens.settings())


def test_who_lost_the_model_says_so_by_name():
    model, batch = models.gpt2(), TensorDict(models.text_batch())
    edits = {"residual_output.1": tg.Scale(0.5), "head_output.0": tg.Ablate(heads=1)}
    context = Intervene(model, edits, missing="ignore")
    expected = context(batch.copy())["logits"]
    data = pickle.dumps(context)
    assert len(data) < 20_000  # no part of the model is in it
    twin = pickle.loads(data)
    for use in (lambda: twin(batch), twin.__enter__, lambda: twin.model):
        with pytest.raises(RuntimeError, match=r"this Intervene was unpickled .*intervene\.bind\(model\)"):
            use()
    torch.testing.assert_close(twin.bind(model)(batch.copy())["logits"], expected)
    with pytest.raises(ValueError, match="has others"):
        Intervene(model, {"residual_output": tg.Scale(0.5)}).bind(
            torch.nn.Sequential(*model.transformer.h[:2])
        )
    lens = pickle.loads(pickle.dumps(tg.LogitLens(model)))
    with pytest.raises(RuntimeError, match=r"this LogitLens was unpickled .*Remedy: a new LogitLens"):
        lens(acts=torch.zeros(2, models.WIDTH))
    with pytest.raises(
        KeyError, match="Intervene expected the model's input 'input_ids'.*Intervene\\(..., in_keys="
    ):
        context(TensorDict({"x": torch.ones(1)}))
    with context, pytest.raises(RuntimeError, match="this Intervene is already in use"):
        context.bind(model)
    with pytest.raises(
        TypeError, match="Intervene takes a TensorDict, or the model's inputs by keyword.*'nonsense'"
    ):
        context(**models.text_batch(), nonsense=torch.ones(1))
