"""Hooks on the places where sites lie: one installer for who reads and who edits, and whose call it is that runs."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from tdgeom.model.calls.attention_kernel import (
    padding_cutters,
    visible_attention,
    watch_softmax,
    whole_batches,
)
from tdgeom.model.calls.call_info import CallInfo, hear
from tdgeom.model.calls.call_paths import is_inside
from tdgeom.model.calls.checkpointing import runs_again
from tdgeom.model.calls.local_parts import LocalParts
from tdgeom.model.calls.own_hooks import (
    CHANGING,
    Hung,
    OwnHook,
    hang,
    hold,
    hook_after,
    hook_before,
    release,
    take_down,
)
from tdgeom.model.calls.places import Place, Places
from tdgeom.model.calls.router_kernel import router_look
from tdgeom.model.calls.shared_model import in_several_ranks
from tdgeom.model.structure.readers import read_input
from tdgeom.model.structure.resolved_site import ResolvedSite

_NOTHING: Any = object()


class Step:
    """What one running call of the model has given so far. ``path`` is the part that was called, "" the model itself."""

    __slots__ = ("alive", "during", "fired", "heard", "leading", "parts", "path", "told")

    def __init__(self, path: str = "") -> None:
        self.path, self.heard = path, True
        self.fired: dict[Place, int] = {}
        self.leading: dict[str, torch.Size] = {}
        self.told: dict[str, CallInfo] = {}  # what it, or a part of it, was given
        self.alive: list[threading.Thread] = []
        self.parts: dict[
            threading.Thread, Step
        ] = {}  # threads that the call has started: each has a part of the batch
        self.during: BaseException | None = None


class SiteHooks:
    """Hooks on the modules of sites: ``make`` gives them, ``open`` installs them, and ``close`` takes away exactly these.

    A subclass defines ``visit``, what is done at a place, and ``around``, further hooks that belong before those of the places.
    ``changes`` says whether what the model computes may change by it.

    A call begins with the outermost module of ``Places.calls`` that runs, and belongs to the thread that began it; threads
    that the call starts belong to it, any other thread has calls of its own, which ``threads="own"`` leaves alone.
    """

    changes = False
    driven = False  # whether the calls of the own thread are marked by who makes them
    step_type: type[Step] = Step

    def __init__(self, places: Places, *, threads: str = "all") -> None:
        self.places, self.threads = places, threads
        self.parts = LocalParts(places.model) if in_several_ranks() else None
        self.hooks: list[OwnHook] = []
        self.hung: list[Hung] = []
        self.hooked: list[nn.Module] = []  # where these hooks hang
        self.undo: ExitStack | None = None  # what else was changed
        self.owner = get_ident()
        self.current: Any = None
        self.others: dict[threading.Thread, Any] = {}  # running calls of other threads
        self.histories: dict[
            tuple[int, str], CallInfo
        ] = {}  # by thread and path: what earlier, cached steps were given
        self.foreign = 0  # calls of threads that are left alone

    def refuse_part(self, entry: ResolvedSite, args: tuple, kwargs: dict, output: Any) -> None:
        """Raise where a site's tensor is one rank's part of it."""
        if self.parts is not None and self.parts.groups:
            self.parts.refuse(entry, entry.held(args, kwargs, output))

    def visit(self, place: Place, args: tuple, kwargs: dict, output: Any) -> Any:
        """What goes on instead: ``(args, kwargs)`` at an input, else an output; ``None`` for what came."""
        raise NotImplementedError

    def around(self) -> None:
        """Install what a subclass needs beside the places, before their hooks."""

    def make(self) -> list[OwnHook]:
        """The hooks, for whoever opens them to hold: they refer to this, and were it to hold them, nothing would be let go."""
        self._make()
        hooks, self.hooks = self.hooks, []
        self.hooked = list(dict.fromkeys(hook.module for hook in hooks))
        return hooks

    def open(self, hooks: Sequence[OwnHook]) -> None:
        """Install the hooks that ``make`` has given, all of them or none."""
        self.owner, self.current, self.foreign = get_ident(), None, 0
        self.others.clear()
        self.histories.clear()
        places = self.places
        with CHANGING:
            try:
                if places.softmax or places.inside or padding_cutters(places.model):
                    self._change(ExitStack())
                self.hung = hang(hooks)
                for module in self.hooked:
                    hold(module)
            except BaseException:
                self.close()
                raise

    def _change(self, undo: ExitStack) -> None:
        """Whatever has to be changed beside hooks: forwards in which something is looked at, batches without padding."""
        places, self.undo = self.places, undo
        if places.softmax:
            undo.enter_context(visible_attention(places.model))
        for place, entries in places.inside.items():
            watcher = partial(self._on_softmax, place)
            module, heads = places.module(place[0]), entries[0].head_count
            look = router_look(places.model, entries[0]) if entries[0].in_router else None
            undo.enter_context(watch_softmax(module, watcher, heads, self.here, look))
        if padding_cutters(places.model):
            undo.enter_context(whole_batches(places.model))

    def _make(self) -> None:
        places = self.places
        for path in places.blocks:
            self.before(places.module(path), partial(self.on_block, path))
        self.around()
        for place in places.at:
            if place in places.inside:
                continue
            if place[1] == "input":
                self.before(places.module(place[0]), partial(self._on_input, place))
            else:
                self.on_output(place, places.module(place[0]))

    def close(self) -> None:
        """Remove the hooks and forget every tensor."""
        with CHANGING:
            hung, self.hung = self.hung, []
            take_down(hung)
            for module in self.hooked if hung else ():
                release(module)
            undo, self.undo = self.undo, None
            if undo is not None:
                undo.close()
        self.current = None
        self.others.clear()
        self.histories.clear()

    def before(self, module: nn.Module, hook: Callable, *, front: bool = False) -> None:
        """A hook in front of a module, called with its arguments."""
        self.hooks.append(hook_before(module, hook, front=front))

    def after(self, module: nn.Module, hook: Callable, **options: bool) -> None:
        """A hook behind a module."""
        self.hooks.append(hook_after(module, hook, **options))

    # ------------------------------------------------------------------------------------ whose call runs

    def mark_calls(self) -> None:
        """Hooks where calls begin and end; in ``around``, so that they stand around those of the places."""
        for path, module in self.places.calls:
            self.before(module, partial(self._on_begin, path), front=True)

    def mark_ends(self) -> None:
        """The other half of :meth:`mark_calls`, behind the hooks of the places."""
        for path, module in self.places.calls:
            self.after(module, partial(self._on_end, path), with_kwargs=True, always=True)

    def learn(self, step: Any, path: str, names: Sequence[str], args: tuple, kwargs: dict) -> None:
        """A module that knows the tokens is called: the model, or the part of it at ``path``."""
        key = (get_ident(), path)
        info = self.histories.get(key)
        if info is None:
            info = self.histories[key] = CallInfo()
        step.told[path] = info
        info.begin(names, args, kwargs, expects=bool(self.places.tellers))

    def listen(self) -> None:
        """Hooks that hear what modules inside are given as masks, where the model itself is given none."""
        for path, (names, masks) in self.places.tellers.items():
            self.before(self.places.model.get_submodule(path), partial(self._on_teller, names, masks))

    def _on_teller(
        self,
        names: Sequence[str],
        masks: Sequence[str],
        module: nn.Module,
        args: tuple,
        kwargs: dict | None = None,
    ) -> None:
        step = None if kwargs is None else self.step()
        if step is not None and kwargs is not None:
            hear(step.told.values(), names, masks, args, kwargs)

    def began(self, step: Any, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A call has begun."""

    def ended(self, step: Any, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """A call has come to its end."""

    def broken(self, step: Any) -> None:
        """A call has ended in an error."""

    def outside(self) -> Any:
        """The step of what runs in no call: a block on its own, or a pass run again for gradients."""
        if self.current is None:
            self.current = self.step_type()
        return self.current

    def step(self) -> Any:
        """The running call of this thread; ``None`` where it is nobody's business."""
        if get_ident() == self.owner:
            return self.current or self.outside()
        return self._elsewhere()

    def here(self) -> bool:
        """Whether what runs in this thread belongs to a call that is listened to."""
        if get_ident() == self.owner:
            return True
        step = self.others.get(threading.current_thread())
        return step.heard if step is not None else self._starter() is not None or runs_again()

    def _on_begin(self, path: str, module: nn.Module, args: tuple, kwargs: Any = None) -> None:
        if get_ident() == self.owner:
            step = self.current
            if self.driven or (step is not None and is_inside(path, step.path)):
                return
            self.current = step = self.step_type(path)
        else:
            thread, heard = threading.current_thread(), self.threads == "all"
            step, starter = self.others.get(thread), self._starter()
            if step is not None and is_inside(path, step.path):
                return
            if starter is not None and (
                is_inside(path, starter.path) or getattr(module, "_is_replica", False)
            ):
                return  # a part of a call of which this is one of several threads
            self.foreign += not heard
            self.others[thread] = step = self.step_type(path)
            step.heard = heard
        step.alive, step.during = threading.enumerate(), sys.exc_info()[1]
        if step.heard:
            self.began(step, module, args, kwargs or {})

    def _on_end(self, path: str, module: nn.Module, args: tuple, kwargs: Any, output: Any = _NOTHING) -> None:
        own = get_ident() == self.owner
        step = self.current if own else self.others.get(threading.current_thread())
        if step is None or step.path != path or output is _NOTHING or (own and self.driven):
            return
        if own:
            self.current = None
        else:
            del self.others[threading.current_thread()]
        if not step.heard:
            return
        if output is None and sys.exc_info()[1] is not step.during:
            self.broken(step)
        else:
            self.ended(step, module, args, kwargs, output)

    def _starter(self) -> Any:
        """The running call that has started this thread; ``None`` where none has."""
        thread = threading.current_thread()
        for step in (self.current, *self.others.values()):
            if step is not None and step.alive and thread not in step.alive:
                return step
        return None

    def _elsewhere(self) -> Any:
        thread = threading.current_thread()
        step = self.others.get(thread)
        if step is None and (starter := self._starter()) is not None:
            step = starter.parts.get(thread)
            if step is None:
                step = starter.parts[thread] = self.step_type(starter.path)
                step.heard = starter.heard
        if step is None and runs_again():  # autograd's own threads
            return self.outside()
        if step is None:
            self.foreign += 1
        return step if step is not None and step.heard else None

    # ------------------------------------------------------------------------------------------ hooks

    def on_output(self, place: Place, module: nn.Module) -> None:
        """Install the hook on a module's output."""
        self.after(module, partial(self._on_output, place), with_kwargs=True)

    def on_block(self, path: str, module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        """A block begins: note the shape of what it is given."""
        value = read_input(args, kwargs or {})
        step = None if value is None else self.step()
        if step is not None and value is not None:
            step.leading[path] = value.shape[:-1]

    def tokens(self, step: Step, entry: ResolvedSite, value: Tensor) -> Tensor:
        """(B·T, D) as (B, T, D) where a part of a block works on flattened tokens; anything else as it is."""
        path = entry.block_path
        leading = None if path is None or path == entry.module_path else step.leading.get(path)
        if leading is None or value.ndim != 2 or len(leading) != 2 or value.shape[0] != leading.numel():
            return value
        return value.reshape(*leading, value.shape[-1])

    def _on_input(self, place: Place, module: nn.Module, args: tuple, kwargs: dict | None = None) -> Any:
        # without kwargs: taken away by its own thread while another one was about to call it
        return None if kwargs is None else self.visit(place, args, kwargs, None)

    def _on_output(
        self, place: Place, module: nn.Module, args: tuple, kwargs: dict, output: Any = _NOTHING
    ) -> Any:
        return None if output is _NOTHING else self.visit(place, args, kwargs, output)

    def _on_softmax(self, place: Place, side: str, value: Tensor) -> Tensor:
        new = self.visit(place, (), {}, value) if side == place[1] else None
        return value if new is None else new


def only_reads(hook: Any) -> bool:
    """Whether a hook on a module is one of ours that changes nothing."""
    owner = getattr(getattr(hook, "func", hook), "__self__", None)
    return isinstance(owner, SiteHooks) and not owner.changes


def edits_open(model: nn.Module) -> bool:
    """Whether hooks of ours that may change what the model computes hang on it now."""
    hooks = chain.from_iterable(
        chain(module._forward_hooks.values(), module._forward_pre_hooks.values())
        for module in model.modules()
    )
    owners = (getattr(getattr(hook, "func", hook), "__self__", None) for hook in hooks)
    return any(isinstance(owner, SiteHooks) and owner.changes for owner in owners)
