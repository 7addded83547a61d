"""Hooks that live for one context: they read sites into a ``Pass`` and are removed together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from threading import get_ident
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdgeom.model.calls.checkpointing import runs_again
from tdgeom.model.calls.first_call import FirstCall, unverified
from tdgeom.model.calls.model_inputs import read_signature
from tdgeom.model.calls.repeated_calls import CallsSpec, fired_too_often, is_meant
from tdgeom.model.calls.site_hooks import Place, Places, SiteHooks, Step
from tdgeom.model.calls.structure_check import followers
from tdgeom.model.sites import Site
from tdgeom.model.structure.readers import read_input, write_input
from tdgeom.model.structure.resolved_site import ADDED_KINDS, ResolvedSite


class StopForward(Exception):
    """Raised by a hook once the last site has been read; never leaves the module form."""


class Pass(Step):
    """What one forward pass has given so far."""

    __slots__ = ("acts", "raw", "roots", "several", "versions")

    def __init__(self, path: str = "") -> None:
        super().__init__(path)
        self.acts: dict[Site, Tensor] = {}
        self.versions: dict[Site, int] = {}
        self.raw: dict[Site, Tensor] = {}
        self.roots: dict[Site, Tensor] = {}
        self.several: dict[Site, list[Tensor]] = {}

    def check_unmodified(self) -> None:
        """Raise if a captured tensor was written to after it was read."""
        for site, version in self.versions.items():
            if self.acts[site]._version != version:
                raise RuntimeError(
                    f"the tensor read at {str(site)!r} was modified in place later in the same forward "
                    "pass, so it no longer holds what was there. Remedy: Capture(..., clone=True)."
                )

    def is_as_read(self) -> bool:
        """Whether what was read is known to be what it was then."""
        if len(self.versions) < len(self.acts):
            return False  # inference tensors do not tell
        return all(self.acts[site]._version == version for site, version in self.versions.items())

    def add(self, other: Pass) -> None:
        """Take what a part of the model gave that ran on its own, before or beside this pass."""
        self.acts.update(other.acts)
        self.roots.update(other.roots)
        self.versions.update(other.versions)


class Reading(SiteHooks):
    """Hooks that read sites; ``begin`` and ``end`` mark the model's calls in module form.

    ``stop`` ends the forward pass once every site has been read. ``watch`` checks, in the first block of each
    stack, that nothing transforms an attention or MLP output before it is added to the stream. ``backward`` keeps the
    model's own tensors in ``Pass.roots`` for their gradients. ``calls`` says which one is meant of a module that runs several
    times in a pass. ``disabled`` says whether reading is switched off. ``record`` is called at the end of each call of the
    user's (context form): with the pass, the module that was called, its arguments and output.
    """

    step_type = Pass

    def __init__(
        self,
        places: Places,
        *,
        stop: bool,
        clone: bool,
        keep_graph: bool,
        watch: bool,
        backward: bool = False,
        calls: CallsSpec = None,
        threads: str = "own",
        callback: Callable[[Site, Tensor], Tensor | None] | None = None,
        record: Callable[..., None] | None = None,
        secure: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(places, threads=threads)
        self.stop, self.clone, self.keep_graph, self.watch = stop, clone, keep_graph, watch
        self.backward, self.callback, self.disabled = backward, callback, False
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

    def around(self) -> None:
        """Hooks of the check, before those that may stop the pass, and behind norms whose gradients are wanted."""
        self.mark_calls()
        if self.record is not None:
            self.listen()
        if self.watch:
            for entry, path, module in followers(self.places):
                self.before(module, partial(self._on_follower, entry, path))
        for index, module in enumerate(self.places.behind if self.backward else ()):
            self.after(module, partial(self._on_behind, index))

    def _make(self) -> None:
        super()._make()
        self.mark_ends()

    def open(self) -> None:
        """Install the hooks; what a call of the user's has to check comes first."""
        self.early, self.part, self.disabled, self.calls, self.called = None, None, False, [], False
        self.doubts = unverified(self.places.model, self.places.sites) if self.watch else []
        try:
            for reads in self.doubts:
                reads.open()
            super().open()
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
            _join(done)
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

    # ------------------------------------------------------------------------------------------ hooks

    def on_output(self, place: Place, module: nn.Module) -> None:
        """The common case, one site that is the output itself, has a short way."""
        entry, *others = self.places.at[place]
        plain = not others and entry.view is entry.element is None and entry.scale == 1.0 and entry.calls == 1
        plain = (
            plain and not (self.backward or self.clone or self.callback) and self.which in (None, "first", 0)
        )
        if not plain or entry.site.kind in ADDED_KINDS:
            super().on_output(place, module)
            return
        inner = entry.block_path != entry.module_path
        last = len(self.places.sites) if self.stop else -1
        self.after(module, partial(self._on_plain_output, place, entry.site, inner, last))

    def _on_plain_output(
        self, place: Place, site: Site, inner: bool, last: int, module: nn.Module, args: tuple, output: Any
    ) -> None:
        step = self.current
        if (
            step is None
            or get_ident() != self.owner
            or self.disabled
            or not isinstance(output, Tensor)
            or place in step.fired
            or (inner and output.ndim == 2)
        ):
            self.visit(place, args, {}, output)
            return
        step.fired[place] = 1
        value = output.detach() if output.requires_grad and not self.keep_graph else output
        if not value.is_inference():
            step.versions[site] = value._version
        step.acts[site] = value
        if len(step.acts) == last:
            raise StopForward

    def _on_behind(self, index: int, module: nn.Module, args: tuple, output: Tensor) -> None:
        """Heads' shares add up to what a norm or scale gives: the gradient is taken there."""
        step = None if self.disabled else self.step()
        if step is None:
            return
        behind = self.places.behind[index]
        for entry in self.places.sites:
            if entry.behind is behind and entry.site in step.acts and entry.site not in step.roots:
                step.roots[entry.site] = _with_graph(entry, args, {}, output)
                return

    def visit(self, place: Place, args: tuple, kwargs: dict, output: Any) -> Any:
        """Read the sites of a place whose turn it is."""
        step = None if self.disabled else self.step()
        if step is None:
            return None
        entries = self.places.at[place]
        count, calls = step.fired.get(place, 0), entries[0].calls
        if count >= calls and step is self.early:
            self.flush()
            step, count = self.step(), 0
        given, changed = (args, kwargs), None
        if self.backward and place[1] == "input":
            value = read_input(args, kwargs)
            if value is not None and value.requires_grad:
                # the gradient goes through this module alone: others that use the tensor have their own
                apart = value.view_as(value)
                vars(apart)["_stream"] = value  # for sites that mean the stream around the module too
                given = changed = write_input(args, kwargs, None, apart)
        step.fired[place] = count + 1
        if count >= calls and (self.which is None or calls > 1):
            raise fired_too_often(entries[0], count + 1)
        for entry in entries:
            if entry.call == count if calls > 1 else is_meant(self.which, count):
                self._keep(step, entry, *given, output)
        if self.stop and len(step.acts) == len(self.places.sites):
            raise StopForward
        return changed

    def _keep(self, step: Pass, entry: ResolvedSite, args: tuple, kwargs: dict, output: Any) -> None:
        value = entry.read(args, kwargs, output)
        if value is None:
            seen = type(output).__name__ if entry.side == "output" else [type(a).__name__ for a in args]
            raise RuntimeError(
                f"the site {str(entry.site)!r} expected a tensor at the {entry.side} of "
                f"{entry.module_path!r}, got {seen}. Remedy: choose another module, "
                "sites='module_output:<path>'."
            )
        if entry.site.kind in ADDED_KINDS:
            step.raw[entry.site] = value
        value = self.tokens(step, entry, value)
        if self.backward and entry.behind is None:
            step.roots[entry.site] = _with_graph(entry, args, kwargs, output)
        value = value if self.keep_graph else value.detach()
        if self.callback is not None:
            changed = self.callback(entry.site, value)
            value = value if changed is None else changed
        if self.clone:
            value = value.clone()
        elif not value.is_inference() and self.which != "all":  # inference tensors have no version to compare
            step.versions[entry.site] = value._version
        step.acts[entry.site] = value
        if self.which == "all" and entry.calls == 1:
            # each call's value is what it was: a later call may write to the same memory
            step.several.setdefault(entry.site, []).append(value if self.clone else value.clone())

    def _on_follower(
        self, entry: ResolvedSite, path: str, module: nn.Module, args: tuple, kwargs: dict | None = None
    ) -> None:
        if kwargs is None:
            return
        step = self.step()
        value = None if step is None else step.raw.get(entry.site)
        if value is None:
            return
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()]
        if len(tensors) == 1 and tensors[0] is value:
            raise RuntimeError(
                f"the site {str(entry.site)!r} should be what is added to the residual stream, but {path!r} "
                f"still transforms the output of {entry.module_path!r}. Remedy: "
                f"sites='module_output:{path}'."
            )


def _join(done: Pass) -> None:
    """Put the parts of a batch together that threads of the call's own have read, in the order of their devices."""
    parts: list[Any] = sorted(done.parts.values(), key=_device_number)
    for part in parts:
        part.check_unmodified()
    for site in dict.fromkeys(site for part in parts for site in part.acts):
        values = [part.acts[site] for part in parts if site in part.acts]
        home = values[0].device
        done.acts[site] = values[0] if len(values) == 1 else torch.cat([v.to(home) for v in values])
        if len(values) == 1:  # gradients of several parts would be several
            done.roots.update((site, part.roots[site]) for part in parts if site in part.roots)


def _device_number(part: Any) -> int:
    first = next(iter(part.acts.values()), None)
    return -1 if first is None else first.get_device()


def _with_graph(entry: ResolvedSite, args: tuple, kwargs: dict, output: Any) -> Tensor:
    raw = entry.raw(args, kwargs, output)
    raw = getattr(raw, "_stream", raw) if entry.bypass else raw
    if raw is None or not raw.requires_grad:
        raise RuntimeError(
            f"the site {str(entry.site)!r} has no gradient: its tensor does not require one. Remedy: leave no_grad and "
            "inference_mode, and let something before the site require gradients (model.requires_grad_(), or inputs)."
        )
    return raw


def read_named_outputs(output: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of a model's output by attribute name; a plain tensor answers to a single name."""
    if isinstance(output, Tensor) and len(names) == 1:
        return {names[0]: output}
    found = {}
    for name in names:
        keyed = isinstance(output, dict | TensorDictBase)
        value = output.get(name, None) if keyed else getattr(output, name, None)
        if not isinstance(value, Tensor):
            has = [k for k in output.keys() if isinstance(output[k], Tensor)] if keyed else []
            raise ValueError(
                f"model_outputs= expected a tensor {name!r} in the model's output, got "
                f"{type(value).__name__} from a "
                f"{type(output).__name__}" + (f" that has the tensors {has}." if has else ".")
            )
        found[name] = value
    return found
