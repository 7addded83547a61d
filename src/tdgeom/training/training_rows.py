"""Rows of the training batches themselves: what a model's forward passes compute anyway, read while one step of training runs."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import nn

from tdgeom.core.keys import key_tuple
from tdgeom.model.capture import Capture
from tdgeom.run.plan import stages
from tdgeom.training.untouched import bare_model, is_compiled

__all__ = ["Replayed", "StepReading", "captured_by", "refuse_compiled_step", "replaying"]


class Replayed(TensorDictModuleBase):
    """Stands where a Capture stood in a pipeline whose batches hold already what it read, and leaves them as they are."""

    def __init__(self, capture: Capture) -> None:
        super().__init__()
        self.in_keys, self.out_keys = list(capture.in_keys[:1]), list(capture.out_keys)
        self.sites, self.device = capture.sites, capture.device
        self.pad_token_id = getattr(capture, "pad_token_id", None)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The batch."""
        return tensordict


def captured_by(pipeline: TensorDictModuleBase) -> Capture:
    """The one Capture of a pipeline.

    Raises:
        ValueError: none, or several.
    """
    found = [unit for unit in stages(pipeline) if isinstance(unit, Capture)]
    if len(found) != 1:
        raise ValueError(
            f"rows of training batches are read by the pipeline's Capture, of which there should be one, got {len(found)}. "
            f"Give a probe loader as dataloader=, or a pipeline with one Capture."
        )
    return found[0]


def replaying(pipeline: TensorDictModuleBase) -> TensorDictSequential:
    """The pipeline over batches that hold what its Capture read."""
    units = stages(pipeline)
    return TensorDictSequential(*(Replayed(unit) if isinstance(unit, Capture) else unit for unit in units))


def refuse_compiled_step(model: nn.Module) -> None:
    """Raise where no hook would see the training step.

    Raises:
        ValueError: the model, or a part of it, is compiled.
    """
    if is_compiled(model):
        raise ValueError(
            f"the training step of a compiled {type(bare_model(model)).__name__} runs a traced graph, in which nothing can be "
            f"read. Give a probe loader as dataloader=: it is measured on the same weights, run eagerly."
        )


class StepReading:
    """One step of training, read: hooks from ``open`` to ``close``, on the passes that the training makes.

    Passes that a backward runs again (gradient checkpointing) are not read, nor are those that come once ``max_rows`` positions
    have been read. A forward that fails takes the hooks away, so that none outlives a training that an error ends there.

    Args:
        capture: what is read of the model. max_rows: positions after which nothing more is read; None: all of the step.
    """

    def __init__(self, capture: Capture, max_rows: int | None) -> None:
        self.capture, self.max_rows = capture, max_rows
        self._stack = ExitStack()
        self._calls: list[TensorDictBase] = []
        self._full = self._open = False

    def open(self) -> None:
        """Begin to read."""
        self._stack = ExitStack()
        self._full, self._open = False, True
        own = self.capture.model
        self._calls = self._stack.enter_context(self.capture)
        self._stack.callback(own.register_forward_pre_hook(self._before).remove)
        self._stack.callback(own.register_forward_hook(self._after, always_call=True).remove)

    def _before(self, *_: Any) -> None:
        if not self._full and self.max_rows is not None and self._rows() >= self.max_rows:
            self._full = True
            self._stack.enter_context(self.capture.disable_hooks())

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if output is None:  # the forward has failed
            self.drop()

    def _rows(self) -> int:
        first = self.capture.out_keys[0]
        return sum(td.get(first).shape[:-1].numel() for td in self._calls if td.get(first, None) is not None)

    def close(self) -> list[TensorDictBase]:
        """The passes that were read, each a batch.

        Raises:
            RuntimeError: the training step did not call the model.
        """
        if not self._open:
            return []
        calls, self._open = list(self._calls), False
        self._stack.close()
        wanted = [key_tuple(key) for key in self.capture.out_keys[: len(self.capture.sites)]]
        whole = [td for td in calls if all(td.get(key, None) is not None for key in wanted)]
        if not whole:
            raise RuntimeError(
                f"no pass of {type(self.capture.model).__name__} was seen in this step of training: another object was called (a "
                f"copy, a compiled one). Give the model that is called, or a probe loader as dataloader=."
            )
        return whole

    def drop(self) -> None:
        """Take the hooks away and forget what was read: an error ends the step."""
        if self._open:
            self._open, self._calls = False, []
            error = RuntimeError("dropped")
            self._stack.__exit__(RuntimeError, error, None)
