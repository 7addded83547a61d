"""When a pass that is read begins and ends: the module form's own, and every call of the user's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn

from tdgeom.model.calls.checkpointing import runs_again
from tdgeom.model.calls.first_call import FirstCall, unverified
from tdgeom.model.calls.forward_signature import read_signature
from tdgeom.model.calls.own_hooks import OwnHook
from tdgeom.model.calls.places import Places
from tdgeom.model.calls.read_pass import Pass, join_parts
from tdgeom.model.calls.repeated_calls import CallsSpec
from tdgeom.model.calls.site_hooks import SiteHooks


class Listening(SiteHooks):
    """Hooks whose passes begin and end: ``begin`` and ``end`` mark the model's calls in module form.

    ``watch`` says whether a call of the user's is checked against the structure. ``calls`` says which one is meant of a module
    that runs several times in a pass. ``disabled`` says whether reading is switched off. ``record`` is called at the end of
    each call of the user's (context form): with the pass, the module that was called, its arguments and output.
    """

    step_type = Pass

    def __init__(
        self,
        places: Places,
        *,
        watch: bool,
        calls: CallsSpec = None,
        threads: str = "own",
        record: Callable[..., None] | None = None,
        secure: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(places, threads=threads)
        self.watch, self.disabled = watch, False
        self.which, self.record, self.secure = calls, record, secure
        self.driven = record is None
        self.early: Pass | None = None
        self.doubts: list[FirstCall] = []
        self.calls: list[TensorDictBase] = []  # what a context has recorded so far
        self.part: tuple[Pass, TensorDictBase] | None = (
            None  # the newest call, where it was one of a part of the model
        )
        self.called = False  # whether anything was called that is listened to
        self.names: dict[str, Sequence[str]] = {}

    def open(self, hooks: Sequence[OwnHook]) -> None:
        """Install the hooks; what a call of the user's has to check comes first."""
        self.early, self.part, self.disabled, self.calls, self.called = None, None, False, [], False
        self.doubts = unverified(self.places.model, self.places.sites) if self.watch else []
        try:
            for reads in self.doubts:
                reads.open()
            super().open(hooks)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the hooks and forget every tensor."""
        super().close()
        doubts, self.doubts = self.doubts, []
        for reads in doubts:
            reads.close()
        self.early = None

    def begin(self) -> None:
        """The module form's call starts."""
        step = Pass()
        step.alive = threading.enumerate()
        self.current = step

    def end(self) -> Pass:
        """The call is over: one pass, of all threads that it has started."""
        done, self.current = self.current or Pass(), None
        return self._finished(done)

    def _finished(self, done: Pass) -> Pass:
        if done.parts:
            join_parts(done)
        done.check_unmodified()
        doubts, self.doubts = self.doubts, []
        for reads in doubts:
            reads.close()
            reads.check_call()
        done.raw.clear()
        if self.which is not None:
            self._choose(done)
        return done

    def _choose(self, done: Pass) -> None:
        for site, values in done.several.items():
            if len({(value.shape, value.device) for value in values}) > 1:
                raise RuntimeError(
                    f"calls='all' at {str(site)!r} expected calls that give one shape, got "
                    f"{[tuple(value.shape) for value in values]}. Remedy: calls='first', 'last' or a number."
                )
            done.acts[site] = torch.stack(values, min(1, values[0].ndim))
        done.several.clear()

    # ------------------------------------------------------------------------------------ the user's calls

    def began(self, step: Any, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A call of the user's starts."""
        self.called = True
        if self.record is not None:
            self.learn(step, step.path, self._names_of(step.path, module), args, kwargs)
        if self.secure is not None:
            self.secure()

    def _names_of(self, path: str, module: nn.Module) -> Sequence[str]:
        if path not in self.names:
            self.names[path] = read_signature(module).names
        return self.names[path]

    def ended(self, step: Any, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """A call of the user's is over: what fired since the last one (an encoder run on its own) belongs to it."""
        if get_ident() == self.owner:
            early, self.early = self.early, None
            if early is not None and not early.acts.keys() & step.acts.keys():
                step.add(early)
            elif early is not None:
                self._emit(early)
        for info in step.told.values():
            info.returned(output)
        done = self._finished(step)
        if self.record is not None and not self.disabled:
            self.record(self, done, module, args, kwargs, output)

    def broken(self, step: Any) -> None:
        """A call that failed gives nothing."""
        if get_ident() == self.owner:
            self.early = None

    def _emit(self, early: Pass) -> None:
        if self.record is not None and not self.disabled:
            self.record(self, self._finished(early), None, (), {}, None)

    def has_all(self) -> bool:
        """Whether the running pass has read every site."""
        return self.current is not None and len(self.current.acts) == len(self.places.sites)

    def flush(self) -> None:
        """What ran outside of any call, a block on its own, makes an entry too."""
        early, self.early = self.early, None
        if early is not None and early.acts:
            self._emit(early)

    def outside(self) -> Any:
        """What runs outside of any call is kept for the next one; a pass that is run again is no call."""
        if self.record is None or runs_again():
            return None
        self.called = True
        if self.early is None:
            self.early = Pass()
        return self.early
