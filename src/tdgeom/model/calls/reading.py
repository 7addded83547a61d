"""Hooks that live for one context: they read sites into a ``Pass`` and are removed together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from tdgeom.model.calls.listening import Listening
from tdgeom.model.calls.places import Place, Places
from tdgeom.model.calls.read_pass import Pass
from tdgeom.model.calls.repeated_calls import CallsSpec, fired_too_often, is_meant
from tdgeom.model.calls.structure_check import followers
from tdgeom.model.sites import Site
from tdgeom.model.structure.readers import read_input, write_input
from tdgeom.model.structure.resolved_site import ADDED_KINDS, ResolvedSite


class StopForward(Exception):
    """Raised by a hook once the last site has been read; never leaves the module form."""


class Reading(Listening):
    """Hooks that read sites.

    ``stop`` ends the forward pass once every site has been read. ``watch`` checks, in the first block of each
    stack, that nothing transforms an attention or MLP output before it is added to the stream. ``backward`` keeps the
    model's own tensors in ``Pass.roots`` for their gradients.
    """

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
        super().__init__(places, watch=watch, calls=calls, threads=threads, record=record, secure=secure)
        self.stop, self.clone, self.keep_graph = stop, clone, keep_graph
        self.backward, self.callback = backward, callback

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

    def on_output(self, place: Place, module: nn.Module) -> None:
        """The common case, one site that is the output itself, has a short way."""
        entry, *others = self.places.at[place]
        plain = not others and entry.is_whole and entry.calls == 1
        plain = (
            plain and not (self.backward or self.clone or self.callback) and self.which in (None, "first", 0)
        )
        plain = plain and (self.parts is None or not self.parts.groups)
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
            or type(output) is not Tensor  # a DTensor is gathered first
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
        self.refuse_part(entry, args, kwargs, output)
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


def _with_graph(entry: ResolvedSite, args: tuple, kwargs: dict, output: Any) -> Tensor:
    raw = entry.raw(args, kwargs, output)
    raw = getattr(raw, "_stream", raw) if entry.bypass else raw
    if raw is None or not raw.requires_grad:
        raise RuntimeError(
            f"the site {str(entry.site)!r} has no gradient: its tensor does not require one. Remedy: leave no_grad and "
            "inference_mode, and let something before the site require gradients (model.requires_grad_(), or inputs)."
        )
    return raw
