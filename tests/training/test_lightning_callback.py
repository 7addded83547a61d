"""The callback for Lightning's Trainer, driven by a stand-in that calls its hooks in Lightning's order with its signatures."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

import models
import tdgeom as tg
from tdgeom.training import lightning_callback as file


class Callback:
    """Hooks of ``lightning.pytorch.Callback`` that are called here."""

    def on_fit_start(self, trainer, pl_module): ...
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx): ...
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx): ...
    def on_fit_end(self, trainer, pl_module): ...
    def on_exception(self, trainer, pl_module, exception): ...


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.net = models.gpt2(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)

    def training_step(self, ids):
        return self.net(input_ids=ids, labels=ids).loss


class Log:
    def __init__(self):
        self.seen = {}

    def log_metrics(self, metrics, step=None):
        self.seen[step] = metrics


class FakeTrainer:
    def __init__(self, callback, accumulated):
        self.callback, self.accumulated, self.global_step, self.loggers = callback, accumulated, 0, [Log()]

    def fit(self, module, batches, fails_at=None):
        call = (lambda name, *args: None) if self.callback is None else (
            lambda name, *args: getattr(self.callback, name)(self, module, *args)
        )  # fmt: skip
        optimizer, losses = torch.optim.AdamW(module.net.parameters(), 1e-2), []
        module.train()
        call("on_fit_start")
        try:
            for number, batch in enumerate(batches):
                call("on_train_batch_start", batch, number)
                loss = module.training_step(batch)
                loss.backward()
                if number == fails_at:
                    raise ArithmeticError("diverged")
                losses.append(loss.item())
                if (number + 1) % self.accumulated == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                    self.global_step += 1
                call("on_train_batch_end", {"loss": loss}, batch, number)
        except BaseException as error:
            call("on_exception", error)
            raise
        call("on_fit_end")
        return losses


@pytest.fixture
def library(monkeypatch):
    made = ModuleType("pytorch_lightning")
    made.Callback = Callback
    for name in file.LIBRARIES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", made)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("probed", [True, False])
def test_losses_are_the_same_and_steps_are_the_optimizers(library, accumulated, probed):
    torch.manual_seed(0)
    batches = [torch.randint(3, models.VOCAB, (4, 8)) for _ in range(6)]
    probe = [{"input_ids": torch.randint(3, models.VOCAB, (6, 8))}] if probed else None

    def losses(callback):
        torch.manual_seed(1)
        trainer, module = FakeTrainer(callback, accumulated), Module()
        found = trainer.fit(module, batches)
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
        return found, trainer

    watch = tg.GeometryWatch(probe, every=2, metrics="spectrum", budget=None)
    watched, trainer = losses(tg.lightning_callback(watch, part=lambda module: module.net))
    assert watched == losses(None)[0]
    done = 6 // accumulated
    steps = [step for step in range(done + probed) if step % 2 == 0]
    assert watch.frame()["step"].unique().tolist() == steps == list(trainer.loggers[0].seen)
    if not probed:
        assert watch.last.metadata["rows_observed"] == 4 * 8 * accumulated


def test_an_error_takes_the_hooks_away(library):
    watch, module = tg.GeometryWatch(every=1, metrics="spectrum", budget=None), Module()
    trainer = FakeTrainer(tg.lightning_callback(watch, part=lambda module: module.net), 1)
    with pytest.raises(ArithmeticError):
        trainer.fit(module, [torch.randint(3, models.VOCAB, (4, 8))], fails_at=0)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_without_lightning_it_says_what_to_install(monkeypatch):
    for name in file.LIBRARIES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(file, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install lightning"):
        tg.lightning_callback(tg.GeometryWatch())
