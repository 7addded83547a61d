"""Calls of a model that nobody is meant to see: other forwards in place, hooks silent."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from tdgeom.model.calls.bound_model import may_stop
from tdgeom.model.calls.own_hooks import CHANGING, OwnId
from tdgeom.model.calls.shared_model import has_parts

_NAMES = ("_forward_hooks", "_forward_pre_hooks")


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
    """No hook fires inside: contexts around the caller neither read nor edit what the lens computes.

    Those with which transformers collects ``hidden_states`` stay, once a call has put them there: models of images read them.
    Where hooks load or gather weights (offloading, sharding) or carry tensors between ranks (tensor parallel), only those of
    our contexts are silent.
    """
    modules = list(model.modules())
    foreign = may_stop(modules) and not has_parts(model)
    with CHANGING:
        kept = [(m, n, hooks) for m in modules for n in _NAMES if (hooks := getattr(m, n))]
        try:
            for module, name, hooks in kept:
                others = {
                    k: h
                    for k, h in hooks.items()
                    if _is_collector(h) or not (foreign or isinstance(k, OwnId))
                }
                setattr(module, name, OrderedDict(others))
            yield
        finally:
            for module, name, hooks in kept:
                setattr(module, name, hooks)


def _is_collector(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("transformers.utils.")
