"""A model watched and changed by plain hooks of torch, which know nothing of sites: what sites are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_KERNEL = "_attn_implementation_internal"
_RECORDS = "_output_capturing_hooks_installed"


@dataclass
class Run:
    """One run of a module in a pass: when it began and ended, and copies of the floating tensors that went in and came out."""

    path: str
    module: nn.Module
    start: int
    end: int = -1
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    def holds(self, other: Run) -> bool:
        """Whether another run lies within this one."""
        return self.start < other.start and other.end < self.end


def floats(value: Any, depth: int = 0, whole: bool = False) -> Iterator[Tensor]:
    """The floating tensors in containers, in order, a few levels deep; ``whole``: those of whole numbers too."""
    if isinstance(value, Tensor):
        if whole or value.is_floating_point():
            yield value
    elif depth < 3 and isinstance(value, Mapping):
        for item in value.values():
            yield from floats(item, depth + 1, whole)
    elif depth < 3 and isinstance(value, tuple | list):
        for item in value:
            yield from floats(item, depth + 1, whole)


@contextmanager
def no_hooks_left(model: nn.Module) -> Iterator[None]:
    """Afterwards the hooks are those of before: transformers keeps recording hooks on a model that was asked for its states."""
    modules = list(model.modules())
    before = [(set(m._forward_hooks), set(m._forward_pre_hooks), _RECORDS in m.__dict__) for m in modules]
    try:
        yield
    finally:
        for module, (after, ahead, records) in zip(modules, before):
            for hooks, kept in ((module._forward_hooks, after), (module._forward_pre_hooks, ahead)):
                for number in set(hooks) - kept:
                    del hooks[number]
            if not records:  # else it would not install them again when it is asked again
                module.__dict__.pop(_RECORDS, None)


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Inside, every configuration in a model of transformers names its eager attention, the one that gives patterns out."""
    configs = {id(c): c for m in model.modules() if hasattr(c := m.__dict__.get("config"), _KERNEL)}
    own = {key: getattr(config, _KERNEL) for key, config in configs.items()}
    try:
        for config in configs.values():
            setattr(config, _KERNEL, "eager")
        yield
    finally:
        for key, config in configs.items():
            setattr(config, _KERNEL, own[key])


@contextmanager
def recorded(model: nn.Module, paths: Iterable[str], whole: bool = False) -> Iterator[list[Run]]:
    """Inside, every finished run of the modules at ``paths`` is listed, in the order in which they began."""
    runs: list[Run] = []
    open_: dict[str, list[Run]] = {}
    ticks = iter(range(1 << 60))
    handles: list[Any] = []

    def begin(path: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given = [value.detach().clone() for value in floats((args, kwargs), whole=whole)]
            runs.append(Run(path, module, next(ticks), inputs=given))
            open_.setdefault(path, []).append(runs[-1])

        return hook

    def finish(path: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            run = open_[path].pop()
            run.end, run.outputs = next(ticks), [value.detach().clone() for value in floats(output)]

        return hook

    try:
        for path in paths:
            module = model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(begin(path), with_kwargs=True))
            handles.append(module.register_forward_hook(finish(path), with_kwargs=True))
        yield runs
    finally:
        for handle in handles:
            handle.remove()
        runs[:] = [run for run in runs if run.end >= 0]


@contextmanager
def changed(
    module: nn.Module, side: str, change: Callable[[Tensor], Tensor], width: int, call: int = 0
) -> Iterator[None]:
    """Inside, ``change`` is made to the first floating tensor of a last axis ``width`` that a module is given or gives.

    ``call`` counts the module's runs in a pass; only that one is changed.
    """
    runs = iter(range(1 << 60))

    def edited(value: Any) -> tuple[Any, bool]:
        if isinstance(value, Tensor):
            fits = value.is_floating_point() and value.shape[-1:] == torch.Size([width])
            return (change(value), True) if fits else (value, False)
        if isinstance(value, dict):
            for key, item in value.items():
                new, hit = edited(item)
                if hit:
                    done = value.copy()
                    done[key] = new
                    return done, True
        elif isinstance(value, tuple | list):
            for i, item in enumerate(value):
                new, hit = edited(item)
                if hit:
                    items = [*value[:i], new, *value[i + 1 :]]
                    return (type(value)(*items) if hasattr(value, "_fields") else type(value)(items)), True
        return value, False

    def before(module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if next(runs) != call:
            return None
        new, hit = edited(args)
        return (new, kwargs) if hit else (args, edited(kwargs)[0])

    def after(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        return edited(output)[0] if next(runs) == call else None

    if side == "input":
        handle: Any = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def distance(found: Tensor, right: Tensor) -> float:
    """The largest difference, relative to the largest value: 0 for equal tensors, infinite for other shapes."""
    if found.numel() != right.numel() or found.shape[-1:] != right.shape[-1:]:
        return float("inf")
    found, right = (x.detach().cpu().reshape(-1).double() for x in (found, right))
    if not found.numel():
        return 0.0
    size = float(right.abs().max())
    apart = float((found - right).abs().max())
    return apart / size if size else apart


def ratio(value: Tensor, given: Tensor) -> float | None:
    """The one number that ``given`` is multiplied by to be ``value``; None where there is none."""
    if value.numel() != given.numel() or value.shape[-1:] != given.shape[-1:]:
        return None
    one, other = (x.detach().cpu().reshape(-1).double() for x in (value, given))
    square = float(other @ other)
    factor = float(one @ other) / square if square else 0.0
    return factor if factor and distance(factor * other, one) < 1e-3 else None


def columns_in(value: Tensor, given: Tensor) -> Tensor | None:
    """Which features of a tensor are those of ``value``, bit for bit; None where one of them is not there.

    >>> columns_in(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([2, 0])
    """
    if not value.shape[-1] or value.numel() // value.shape[-1] != given.numel() // given.shape[-1]:
        return None
    own = {column.numpy().tobytes(): i for i, column in enumerate(_columns(given))}
    found = [own.get(column.numpy().tobytes()) for column in _columns(value)]
    known = [i for i in found if i is not None]
    return torch.tensor(known) if len(known) == len(found) else None


def _columns(value: Tensor) -> Tensor:
    return value.detach().cpu().flatten(0, -2).double().T.contiguous()
