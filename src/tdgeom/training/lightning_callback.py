"""``lightning_callback``: geometry beside the loss of Lightning's Trainer, which is imported only here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from tdgeom.core.guessed_names import answer_guesses
from tdgeom.training.geometry_watch import GeometryWatch

__all__ = ["lightning_callback"]

LIBRARIES = ("lightning.pytorch", "pytorch_lightning")


@answer_guesses
def lightning_callback(watch: GeometryWatch, part: Callable[[Any], nn.Module] | None = None) -> Any:
    """A ``GeometryWatch`` as a callback of Lightning: ``Trainer(callbacks=[lightning_callback(GeometryWatch(probe))])``.

    Args:
        watch: what is measured, when and where it is logged. Without loggers of its own, values go to the trainer's.
        part: the module of the LightningModule that is measured, such as ``lambda module: module.net``; default all of it.

    Returns:
        A ``Callback`` of ``lightning.pytorch``, or of ``pytorch_lightning`` where that is what has been imported. Steps are the
        trainer's ``global_step``.

    Raises:
        ModuleNotFoundError: neither is installed.
    """
    base: Any = _library().Callback

    class LightningGeometry(base):
        """Measures a model between and during steps of Lightning's Trainer."""

        def __init__(self) -> None:
            super().__init__()
            self.watch, self.part = watch, part
            self.begun: int | None = None  # a step of the optimizer may take several batches

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            """Hooks of a training that an error ended are taken away."""
            self.watch.drop_reading()
            self.begun = None
            if not self.watch.loggers:
                self.watch.loggers = [_log_of(logger) for logger in trainer.loggers]

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            """The first batch of a step of the optimizer."""
            if self.begun != trainer.global_step:
                self.begun = trainer.global_step
                self.watch.begin_step(self._model(pl_module), trainer.global_step)

        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            """The last one: the step is done."""
            if trainer.global_step != self.begun:
                self.watch.end_step(self._model(pl_module), trainer.global_step)

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            """An error ends the training."""
            self.watch.drop_reading()

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            """The training is over."""
            self.watch.drop_reading()

        def _model(self, pl_module: Any) -> nn.Module:
            return pl_module if self.part is None else self.part(pl_module)

    return LightningGeometry()


def _log_of(logger: Any) -> Callable[[Any, int], Any]:
    return lambda values, step: logger.log_metrics(dict(values), step)


def _library() -> Any:
    """The library whose Trainer will call: the one that has been imported, else the one that is installed."""
    for name in LIBRARIES:
        if name in sys.modules:
            return sys.modules[name]
    for name in LIBRARIES:
        if find_spec(name.partition(".")[0]) is not None:
            return import_module(name)
    raise ModuleNotFoundError(
        "lightning_callback is for Lightning's Trainer: python -m pip install lightning."
    )
