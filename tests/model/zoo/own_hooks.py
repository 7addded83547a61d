"""What a model does, by hooks of our own on every module and by the model's own outputs: what the zoo compares with."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Event:
    """One run of one module in a pass, with copies of the tensors that went in and came out."""

    path: str
    module: nn.Module
    start: int
    end: int = -1
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


def tensors_in(value: Any, depth: int = 0, whole: bool = False) -> Iterator[Tensor]:
    """The floating tensors (``whole``: those of whole numbers too) of an argument or an output, containers looked into."""
    if isinstance(value, Tensor):
        if whole or value.is_floating_point():
            yield value
    elif depth < 3 and isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, depth + 1, whole)
    elif depth < 3 and isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item, depth + 1, whole)


@contextmanager
def traced(model: nn.Module, whole: bool = False) -> Iterator[list[Event]]:
    """Inside, every run of every module is written down, in the order in which they begin."""
    events: list[Event] = []
    open_: dict[int, list[Event]] = {}
    clock = iter(range(10**9))
    handles = []

    def before(path: str):
        def hook(module, args, kwargs):
            event = Event(path, module, next(clock))
            event.inputs = [t.detach().clone() for t in tensors_in((args, kwargs), whole=whole)]
            events.append(event)
            open_.setdefault(id(module), []).append(event)

        return hook

    def after(module, args, kwargs, output):
        event = open_[id(module)].pop()
        event.end = next(clock)
        event.outputs = [t.detach().clone() for t in tensors_in(output)]

    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield events
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Pass:
    """One call of a model by hand: its output and what every module did."""

    output: Any
    events: list[Event]

    def inside(self, event: Event) -> list[Event]:
        """The runs within another one, itself left out."""
        return [e for e in self.events if event.start < e.start and e.end < event.end]


def call(model: nn.Module, batch: dict[str, Any], packed: bool = False, **more: Any) -> Any:
    """One plain call without gradients; ``packed``: of one dict."""
    with torch.no_grad():
        return model(dict(batch)) if packed else model(**batch, **more)


def by_hand(
    model: nn.Module, batch: dict[str, Any], packed: bool = False, *, trace: bool = True, **more: Any
) -> Pass:
    """The model called by hand in a copy of its own, so that nothing of it stays on the model."""
    model = copy.deepcopy(model)
    if not trace:
        return Pass(call(model, batch, packed, **more), [])
    with traced(model) as events:
        output = call(model, batch, packed, **more)
    return Pass(output, [e for e in events if e.end >= 0])


def same(one: Tensor, other: Tensor, rtol: float = 2e-4) -> bool:
    """Equal up to the order of sums, whatever the axes in front."""
    if one.numel() != other.numel() or one.shape[-1] != other.shape[-1] or not one.numel():
        return False
    one, other = one.detach().reshape(-1).double(), other.detach().reshape(-1).double()
    size = float(other.abs().max())
    return bool(float((one - other).abs().max()) <= rtol * max(size, 1e-3))


def far(one: Tensor, other: Tensor) -> str:
    """How far two tensors are, in words."""
    if one.shape != other.shape:
        return f"shapes {tuple(one.shape)} and {tuple(other.shape)}"
    difference = float((one.detach().double() - other.detach().double()).abs().max())
    return f"difference {difference:.2g} of {float(other.abs().max()):.2g}"


@contextmanager
def own_hook(
    module: nn.Module, change, *, side: str = "output", like: Tensor | None = None, calls=None
) -> Iterator[None]:
    """A hook of our own: ``change`` of the tensor that the module is given or gives (the first like ``like``'s width)."""
    count = iter(range(10**9))

    def fits(value: Any) -> bool:
        return (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and (like is None or value.shape[-1] == like.shape[-1])
        )

    def edited(value: Any) -> tuple[Any, bool]:
        if fits(value):
            return change(value), True
        if isinstance(value, tuple | list):
            done = list(value)
            for i, item in enumerate(done):
                done[i], hit = edited(item)
                if hit:
                    return type(value)(done) if not hasattr(value, "_fields") else type(value)(*done), True
        elif isinstance(value, dict):
            for key, item in value.items():
                new, hit = edited(item)
                if hit:
                    value[key] = new
                    return value, True
        return value, False

    def post(module, args, kwargs, output):
        number = next(count)
        return None if calls is not None and number not in calls else edited(output)[0]

    def pre(module, args, kwargs):
        number = next(count)
        if calls is not None and number not in calls:
            return None
        new, hit = edited(args)
        return (new, kwargs) if hit else (args, edited(dict(kwargs))[0])

    if side == "output":
        handle = module.register_forward_hook(post, with_kwargs=True, prepend=True)
    else:
        handle = module.register_forward_pre_hook(pre, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def main_output(output: Any) -> Tensor:
    """What a model is called for: its logits, or its last hidden state."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "sentence_embedding", "last_hidden_state", "prediction_outputs", "pooler_output"):
        value = output.get(name, None) if hasattr(output, "get") else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    return next(t for t in tensors_in(tuple(output.values()) if hasattr(output, "values") else output))
