"""A model and what was found out about it, held without belonging to the module that holds it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import nn

from tdgeom.model.calls.model_inputs import ModelInputs
from tdgeom.model.calls.site_hooks import Places
from tdgeom.model.structure.parts import join
from tdgeom.model.structure.resolved_site import ResolvedSite


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

    def __init__(self, model: nn.Module, sites: Iterable[ResolvedSite], inputs: ModelInputs) -> None:
        super().__init__(model)
        self.places, self.inputs = Places(model, sites), inputs
        self.sites = self.places.sites
        self.watched = False
        refuse_compiled(model, self.places.modules)
        self._steps = [step for _, *step in _steps(model, self.places.modules)]

    def refuse_compiled(self, owner: object) -> None:
        """``refuse_compiled`` of the model as it is now; one look at each module while nothing has been replaced."""
        model = self.require(owner)
        if model._compiled_call_impl is not None or not all(
            parent._modules.get(name) is child and child._compiled_call_impl is None
            for parent, name, child in self._steps
        ):
            refuse_compiled(model, self.places.modules)


def _steps(model: nn.Module, paths: Iterable[str]) -> Iterator[tuple[str, Any, str, nn.Module]]:
    """Every step from the model down to the modules at ``paths``, once: (path, parent, name, child)."""
    seen: set[str] = set()
    for path in paths:
        parent, walked = model, ""
        for name in path.split(".") if path else []:
            walked, child = join(walked, name), parent.get_submodule(name)
            if walked not in seen:
                yield walked, parent, name, child
            seen.add(walked)
            parent = child


def refuse_compiled(model: nn.Module, paths: Iterable[str]) -> None:
    """Raise if a hook on one of ``paths`` would never fire because something around it is compiled."""
    for owner, _, _, module in chain([("", None, "", model)], _steps(model, paths)):
        # a compiled module runs its traced graph: hooks added to what is inside are silently skipped
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            where = f"its submodule {owner!r}" if owner else "it"
            raise RuntimeError(
                f"expected a model whose hooks fire, got a {type(model).__name__} of which {where} is "
                "compiled: hooks inside would silently never fire. Remedy: give the model before "
                "torch.compile (`compiled._orig_mod` is it) and call that."
            )


def may_stop(modules: Sequence[nn.Module]) -> bool:
    """Whether a forward pass may end early: not under offloading or sharding hooks, which must finish."""
    bases = {base.__name__ for kind in {type(module) for module in modules} for base in kind.__mro__}
    sharded = bases & {"FSDPModule", "FullyShardedDataParallel"}
    return not sharded and not any("_hf_hook" in module.__dict__ for module in modules)


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
