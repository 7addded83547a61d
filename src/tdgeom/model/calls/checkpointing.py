"""Passes that are run again for gradients (checkpointing), which need what was done to them the first time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from tdgeom.model.structure.readers import tensors


def runs_again() -> bool:
    """Whether this thread computes gradients: what runs then is a pass that is run again.

    >>> runs_again()
    False
    """
    return torch._C._current_graph_task_id() != -1


def is_checkpointed() -> bool:
    """Whether what runs now, in a pass with gradients, will be run again by its backward.

    >>> is_checkpointed()
    False
    """
    if torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return False
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code.co_filename != torch.utils.checkpoint.__file__:
        frame = frame.f_back
    return frame is not None


def refuse_later_backward(output: Any, entered: Sequence[bool]) -> None:
    """A backward that reaches ``output`` when ``entered`` holds no longer is an error: it would run parts again unedited."""

    def check(gradient: Tensor) -> None:
        if not entered[0]:
            raise RuntimeError(
                "this backward runs checkpointed parts of the pass again, after the Intervene that had edited them has ended: "
                "the gradients would be those of no model. Remedy: call backward() inside the with block, or switch gradient "
                "checkpointing off."
            )

    for _, tensor in tensors(output):
        if tensor.requires_grad:
            tensor.register_hook(check)
