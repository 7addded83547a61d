"""A model and what was found out about it, held without belonging to the module that holds it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from tdgeom.model.calls.model_inputs import ModelInputs
from tdgeom.model.calls.places import Place, Places, steps_to
from tdgeom.model.calls.verified import verified
from tdgeom.model.structure.resolved_site import ResolvedSite

# wrappers whose forward has something to do after the model inside
_FINISH = {"FSDPModule", "FullyShardedDataParallel", "DistributedDataParallel", "DataParallel"}


class HeldModel:
    """A model that stays the user's: registered nowhere, shared by copies, dropped by pickling."""

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module | None = model
        self.name = type(model).__name__

    def require(self, owner: object) -> nn.Module:
        """The model, or an error if pickling has dropped it."""
        if self.model is None:
            kind = type(owner).__name__
            bind = f"{kind.lower()}.bind(model), or " if hasattr(owner, "bind") else ""
            raise RuntimeError(
                f"this {kind} was unpickled without its model (a {self.name}): pickling keeps settings, not models. "
                f"Remedy: {bind}a new {kind}(model, ...)."
            )
        return self.model

    def __deepcopy__(self, memo: dict) -> HeldModel:
        return self

    def __copy__(self) -> HeldModel:
        return self

    def __reduce__(self) -> tuple:
        return _lost, (type(self), self.name)


def _lost(kind: type[HeldModel], name: str) -> HeldModel:
    held = kind.__new__(kind)
    held.model, held.name = None, name
    return held


class Bound(HeldModel):
    """A model as a hooking context refers to it, and what was found out about it."""

    sites: tuple[ResolvedSite, ...] = ()

    def __init__(self, model: nn.Module, places: Places, inputs: ModelInputs) -> None:
        super().__init__(model)
        self.places, self.inputs, self.sites = places, inputs, places.sites
        self.watched = self.counted = False

    def refuse_compiled(self, owner: object) -> None:
        """``refuse_compiled`` of the model as it is now; one look at each module while nothing has been replaced."""
        model, places = self.require(owner), self.places
        if not places.is_as_found():
            refuse_compiled(model, places.paths, places.insides())

    def is_counted(self) -> bool:
        """Whether a whole pass of the model has shown how often each place fires."""
        if not self.counted:
            known, places = verified(self.require(self)).get("firings", {}), self.places
            self.counted = all((place, id(places.module(place[0]))) in known for place in places.at)
        return self.counted

    def count(self, fired: Mapping[Place, int]) -> None:
        """Note how often the places fired in a whole pass of the model."""
        known = verified(self.require(self)).setdefault("firings", {})
        for place in self.places.at:
            known[place, id(self.places.module(place[0]))] = fired.get(place, 0)

    def firings(self, place: Place) -> int | None:
        """How often a place fired in a whole pass; ``None`` where none was counted."""
        known = verified(self.require(self)).get("firings", {})
        return known.get((place, id(self.places.module(place[0]))))


def refuse_compiled(model: nn.Module, paths: Iterable[str], inside: Iterable[str] = ()) -> None:
    """Raise if a hook on one of ``paths`` would never fire because something around it is compiled.

    ``inside`` are paths of modules in whose forward something is looked at, not only what it takes and gives.
    """
    paths = list(paths)
    holding = {""} | set(inside)  # whose own forward has a place of ours inside
    for path in paths:
        while path := path.rpartition(".")[0]:
            if path in holding:
                break
            holding.add(path)
    for owner, _, _, module in chain([("", None, "", model)], steps_to(model, paths)):
        # a compiled module runs its traced graph: hooks added to what is inside are silently skipped
        whole = "_orig_mod" in module._modules or module._compiled_call_impl is not None
        if whole or (owner in holding and _has_compiled_forward(module)):
            where = f"its submodule {owner!r}" if owner else "it"
            remedy = (
                "give the model before torch.compile (`compiled._orig_mod` is it) and call that"
                if whole
                else "the model before `.forward` was replaced by torch.compile(...): del module.forward"
            )
            raise RuntimeError(
                f"expected a model whose hooks fire, got a {type(model).__name__} of which {where} is "
                f"compiled: hooks inside would silently never fire. Remedy: {remedy}."
            )


_COMPILED: WeakKeyDictionary[FunctionType, bool] = WeakKeyDictionary()


def _has_compiled_forward(module: nn.Module) -> bool:
    function = type(module).forward
    if "forward" in module.__dict__ or not isinstance(function, FunctionType):
        return _is_compiled(module.forward)
    if function not in _COMPILED:  # a class is asked about again with every context
        _COMPILED[function] = _is_compiled(function)
    return _COMPILED[function]


def _is_compiled(forward: Any) -> bool:
    """Whether a forward is what ``torch.compile`` gave, in whatever other libraries have wrapped it."""
    while forward is not None:
        marked = getattr(forward, "_torchdynamo_orig_callable", None) is not None
        if marked and not getattr(forward, "_torchdynamo_disable", False):
            return True
        forward = getattr(forward, "func", None) or getattr(forward, "__wrapped__", None)
    return False


def may_stop(modules: Sequence[nn.Module]) -> bool:
    """Whether a forward pass may end early: not under offloading, replicas or sharding, which must finish."""
    if any(map(_finishes, set(map(type, modules)))):
        return False
    return not any(["_hf_hook" in module.__dict__ for module in modules])


@lru_cache(1024)
def _finishes(kind: type) -> bool:
    return any(base.__name__ in _FINISH for base in kind.__mro__)


def has_other_forwards(modules: Sequence[nn.Module]) -> bool:
    """Whether somebody has put a forward in a module's place, which may have something to put back at its end."""
    return any(["forward" in module.__dict__ for module in modules])


def modules_within(model: nn.Module) -> list[nn.Module]:
    """``list(model.modules())`` in another order: without a generator a level, which costs more than a small model's pass.

    >>> len(modules_within(nn.Sequential(nn.Linear(1, 1), nn.ReLU())))
    3
    """
    found = {model: None}
    modules = [model]
    for module in modules:  # grows while it is walked
        if children := module._modules:
            for child in children.values():
                if child is not None and child not in found:
                    found[child] = None
                    modules.append(child)
    return modules


@contextmanager
def eval_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Every module in eval mode inside; each one's own flag is put back, frozen parts stay frozen."""
    training = [module for module in modules if module.training]
    try:
        for module in training:  # not model.eval(): some modules act on a change of mode
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
