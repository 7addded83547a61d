"""Our hooks on modules: hung and taken away in one go, told apart from everybody else's, gone in copies of a module."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

# one thread at a time changes what hangs on modules: the silence of one (a check, a lens) must not swallow another's hooks
CHANGING = threading.RLock()
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OPTIONS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
_COPIES = ("__deepcopy__", "__reduce_ex__")
_ANY = object()


class OwnId(int):
    """The number of a hook of ours among a module's hooks."""


class FrontId(OwnId):
    """The number of a hook of ours that stays in front of all others, also of other contexts'."""


class OwnHook:
    """A hook of a context: on which module, on which side, and what is called. Made once, hung at every entering."""

    __slots__ = ("front", "hooks", "module", "options", "run")

    def __init__(
        self, module: nn.Module, hooks: str, run: Callable, options: tuple[str, ...], front: bool
    ) -> None:
        self.module, self.hooks, self.run, self.options, self.front = module, hooks, run, options, front


def hook_before(module: nn.Module, run: Callable, *, front: bool = False) -> OwnHook:
    """A hook in front of a module, called with its arguments."""
    return OwnHook(module, "_forward_pre_hooks", run, ("_forward_pre_hooks_with_kwargs",), front)


def hook_after(
    module: nn.Module, run: Callable, *, with_kwargs: bool = False, always: bool = False, front: bool = False
) -> OwnHook:
    """A hook behind a module; ``always`` calls it where the module raises, too."""
    options = ("_forward_hooks_with_kwargs",) * with_kwargs + ("_forward_hooks_always_called",) * always
    return OwnHook(module, "_forward_hooks", run, options, front)


Hung = tuple[OrderedDict, OwnId, list[dict]]


def hang(wanted: Iterable[OwnHook]) -> list[Hung]:
    """Hang hooks on their modules, which :func:`hold` is told of; what comes back is for :func:`take_down`.

    torch's registration makes a handle of weak references for each, which is most of what entering a context would cost.
    """
    hung: list[Hung] = []
    for hook in wanted:
        kept = hook.module.__dict__
        number = RemovableHandle.next_id
        RemovableHandle.next_id = number + 1
        hooks, key = kept[hook.hooks], FrontId(number) if hook.front else OwnId(number)
        options = [kept[name] for name in hook.options]
        for option in options:
            option[key] = True
        hooks[key] = hook.run
        if hook.front:
            hooks.move_to_end(key, last=False)
        hung.append((hooks, key, options))
    return hung


def take_down(hung: Iterable[Hung]) -> None:
    """Take away hooks that :func:`hang` has hung, and no others."""
    for hooks, key, options in hung:
        hooks.pop(key, None)
        for option in options:
            option.pop(key, None)


def lead(hooks: OrderedDict) -> None:
    """Put hooks that change what a module takes or gives in front of everybody else's, with those of contexts entered before."""
    numbers = list(hooks)
    ours = [isinstance(number, OwnId) for number in numbers]
    last = max((i for i, own in enumerate(ours) if own and _changes(hooks[numbers[i]])), default=-1)
    leading = [n for i, n in enumerate(numbers) if ours[i] and (i <= last or isinstance(n, FrontId))]
    leading.sort(key=lambda number: not isinstance(number, FrontId))
    for number in reversed(leading):
        hooks.move_to_end(number, last=False)


def _changes(run: Any) -> bool:
    return bool(getattr(getattr(getattr(run, "func", run), "__self__", None), "changes", False))


# ------------------------------------------------------------------------------------------ copies of a model


class CleanCopies:
    """While it hangs on a module, copies and pickles of the module have no hook and no forward of ours."""

    __slots__ = ("forward", "holders", "module")

    def __init__(self, module: nn.Module) -> None:
        self.module, self.holders, self.forward = module, 0, _ANY

    def __call__(self, given: Any) -> Any:
        """What ``copy.deepcopy`` asks (with its memo), and ``pickle`` (with a protocol)."""
        if self.holders <= 0:
            raise RuntimeError(
                f"this {type(self.module).__name__} is a shallow copy that was made inside a context, and takes what hung on "
                "the original there. Remedy: copy the original, or copy.copy() it outside of the with block."
            )
        if isinstance(given, int):
            kind: Any = type(self.module)
            made = kind.__reduce_ex__(self.module, given)
            return (*made[:2], self._clean(made[2]), *made[3:]) if len(made) > 2 else made
        with CHANGING, self._bare():
            return copy.deepcopy(self.module, given)

    def _clean(self, state: Any) -> Any:
        if not isinstance(state, dict):
            return state
        clean = {name: value for name, value in state.items() if name not in _COPIES}
        for name in (*_HOOKS, *_OPTIONS):
            if name in clean:
                foreign = ((n, v) for n, v in clean[name].items() if not isinstance(n, OwnId))
                clean[name] = type(clean[name])(foreign)
        if self.forward is not _ANY:
            clean.pop("forward", None)
            if self.forward is not None:
                clean["forward"] = self.forward
        return clean

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """Inside, the module is as it was before the first of us came."""
        kept = self.module.__dict__
        before = {name: kept[name] for name in (*_COPIES, *_HOOKS, *_OPTIONS, "forward") if name in kept}
        clean = self._clean(before)
        try:
            kept.update(clean)
            for name in before.keys() - clean.keys():
                del kept[name]
            yield
        finally:
            kept.update(before)


def hold(module: nn.Module) -> CleanCopies:
    """A module's clean copies, with one holder more; :func:`release` is the way back."""
    kept = module.__dict__
    copies = kept.get("__deepcopy__")
    if type(copies) is not CleanCopies:
        copies = kept["__deepcopy__"] = kept["__reduce_ex__"] = CleanCopies(module)
    copies.holders += 1
    return copies


def release(module: nn.Module) -> None:
    """One holder of a module's clean copies less."""
    kept = module.__dict__
    copies = kept.get("__deepcopy__")
    if type(copies) is CleanCopies:
        copies.holders -= 1
        if "forward" not in kept:
            copies.forward = _ANY
        if copies.holders <= 0:
            del kept["__deepcopy__"], kept["__reduce_ex__"]
