"""``GeometryCallback``: geometry beside the loss of ``transformers.Trainer``."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tdgeom.training.geometry_watch import GeometryWatch

__all__ = ["GeometryCallback"]


class GeometryCallback(GeometryWatch, TrainerCallback):
    """``GeometryWatch`` as a callback: ``transformers.Trainer(..., callbacks=[GeometryCallback(probe, every=100)])``.

    Settings and attributes are those of ``GeometryWatch``; steps are the trainer's ``global_step``, of a training that is
    resumed too. Gradient accumulation, checkpointing, mixed precision, DDP and FSDP need nothing. With ``torch_compile=True``
    give a probe loader.

        >>> GeometryCallback(every=50).due(100)
        True
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A training begins: hooks of one that an error ended are taken away."""
        self.drop_reading()
        if self.dataloader is None and args.torch_compile:
            raise ValueError(
                f"{self.owner}: torch_compile=True trains a traced graph, in which no training batch can be read. "
                f"Give a probe loader as dataloader=."
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A step of the optimizer begins."""
        self.begin_step(kwargs["model"], state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """It has ended, gradients are zeroed."""
        self.end_step(kwargs["model"], state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The training is over."""
        self.drop_reading()
