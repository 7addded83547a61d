"""``transformers.Trainer`` with and without its geometry: the same losses, weights and random numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

import models
import tdgeom as tg

CHEAP = {"metrics": "spectrum", "budget": None}


class Broken(torch.utils.data.Dataset):
    """Token ids, of which one sequence is too long for the model."""

    def __init__(self, broken=None):
        self.broken = broken

    def __len__(self):
        return 24

    def __getitem__(self, index):
        ids = torch.from_numpy(np.random.default_rng(index).integers(3, models.VOCAB, 12))
        if index == self.broken:
            ids = ids + models.VOCAB
        return {"input_ids": ids, "labels": ids}


def trained(folder, callback=None, data=None, **arguments):
    torch.manual_seed(7)
    model = models.gpt2(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    asked = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
        **arguments,
    }
    trainer = Trainer(
        model,
        TrainingArguments(**asked),
        train_dataset=data or Broken(),
        callbacks=[] if callback is None else [callback],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(losses) == asked["max_steps"]
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    return (
        losses,
        norms,
        {name: p.detach().clone() for name, p in model.named_parameters()},
        torch.rand(2),
        hooks,
    )


def same(one, other):
    assert one[0] == other[0] and one[1] == other[1] and one[4] == other[4] and torch.equal(one[3], other[3])
    assert all(torch.equal(value, other[2][name]) for name, value in one[2].items())


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_accumulation_steps": 2},
        pytest.param({"bf16": True, "activation_checkpointing": True}, marks=pytest.mark.slow),
    ],
    ids=["accumulated", "mixed precision, checkpointed"],
)
def test_losses_are_bit_identical(tmp_path, arguments):
    probe = [
        {
            "input_ids": torch.randint(3, models.VOCAB, (6, 10)),
            "attention_mask": torch.ones(6, 10, dtype=torch.long),
        }
    ]
    plain = trained(tmp_path, **arguments)
    watch = tg.GeometryCallback(probe, every=2, **CHEAP)
    same(plain, trained(tmp_path, watch, **arguments))
    assert watch.frame()["step"].unique().tolist() == [0, 2, 4]
    own = tg.GeometryCallback(schedule=[0, 3], **CHEAP)
    same(plain, trained(tmp_path, own, **arguments))
    assert own.frame()["step"].unique().tolist() == [0, 3]
    passes = arguments.get("gradient_accumulation_steps", 1)
    assert own.last.metadata["rows_observed"] == passes * 4 * 12
    assert "training" in own.last.metadata["rows_of"] and "probe" in watch.last.metadata["rows_of"]


def test_a_traced_graph_cannot_be_read(tmp_path):
    callback = tg.GeometryCallback()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    arguments.torch_compile = True
    with pytest.raises(ValueError, match="torch_compile=True.*probe loader"):
        callback.on_train_begin(arguments, None, None)


def test_an_error_in_the_training_leaves_no_hook(tmp_path):
    callback = tg.GeometryCallback(every=1, **CHEAP)
    seen = []

    class Watched(tg.GeometryCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(kwargs["model"])
            super().on_step_begin(args, state, control, **kwargs)

    callback = Watched(every=1, **CHEAP)
    with pytest.raises(IndexError):
        trained(tmp_path, callback, Broken(broken=9))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in seen[0].modules())
