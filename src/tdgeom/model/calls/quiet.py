"""Calls of a model that nobody is meant to see: other forwards in place, hooks silent."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from tdgeom.model.calls.bound_model import may_stop


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Other forwards inside; afterwards the ones before, also those that other libraries have put there."""
    own = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in own.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """No hook fires inside: contexts around the caller neither read nor edit what the lens computes."""
    modules = list(model.modules())
    names = ("_forward_hooks", "_forward_pre_hooks")
    kept = (
        []
        if not may_stop(modules)
        else [(m, n, getattr(m, n)) for m in modules for n in names if getattr(m, n)]
    )
    try:
        for module, name, _ in kept:
            setattr(module, name, OrderedDict())
        yield
    finally:
        for module, name, hooks in kept:
            setattr(module, name, hooks)
