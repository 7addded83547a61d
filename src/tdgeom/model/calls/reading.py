"""Hooks that live for one context: they read sites into a ``Pass`` and are removed together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor, nn

from tdgeom.model.calls.site_hooks import Place, Places, SiteHooks
from tdgeom.model.calls.structure_check import BlockReads, followers, unverified
from tdgeom.model.sites import Site
from tdgeom.model.structure.readers import read_input, write_input
from tdgeom.model.structure.resolved_site import ADDED_KINDS, ResolvedSite


class StopForward(Exception):
    """Raised by a hook once the last site has been read; never leaves the module form."""


class Pass:
    """What one forward pass has given so far."""

    def __init__(self) -> None:
        self.acts: dict[Site, Tensor] = {}
        self.versions: dict[Site, int] = {}
        self.fired: dict[Place, int] = defaultdict(int)
        self.raw: dict[Site, Tensor] = {}
        self.roots: dict[Site, Tensor] = {}

    def check_unmodified(self) -> None:
        """Raise if a captured tensor was written to after it was read."""
        for site, version in self.versions.items():
            if self.acts[site]._version != version:
                raise RuntimeError(
                    f"the tensor read at {str(site)!r} was modified in place later in the same forward "
                    "pass, so it no longer holds what was there. Remedy: Capture(..., clone=True)."
                )


class Reading(SiteHooks):
    """Hooks that read sites; ``begin`` and ``end`` mark the model's calls.

    ``stop`` ends the forward pass once every site has been read. ``watch`` checks, in the first block of each
    stack, that nothing transforms an attention or MLP output before it is added to the stream. ``backward`` keeps the
    model's own tensors in ``Pass.roots`` for their gradients. ``disabled`` says whether reading is switched off.
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
        callback: Callable[[Site, Tensor], Tensor | None] | None = None,
    ) -> None:
        super().__init__(places)
        self.stop, self.clone, self.keep_graph, self.watch = stop, clone, keep_graph, watch
        self.backward, self.callback, self.disabled = backward, callback, False
        self.current: Pass | None = None
        self.early: Pass | None = None
        self.doubts: list[BlockReads] = []
        self.calls: list[TensorDictBase] = []  # what a context has recorded so far

    def around(self) -> None:
        """Hooks of the check, before those that may stop the pass, and behind norms whose gradients are wanted."""
        if self.watch:
            self.doubts = unverified(self.places.model, self.places.sites)
            for reads in self.doubts:
                reads.open()
                self.undo.callback(reads.close)
            for entry, path, module in followers(self.places):
                self.before(module, partial(self._on_follower, entry, path))
        for module in self.places.behind if self.backward else ():
            self.after(module, self._on_behind)

    def close(self) -> None:
        """Remove the hooks and forget every tensor."""
        super().close()
        self.doubts = []
        self.current = self.early = None

    def begin(self) -> None:
        """A model call starts. What fired since the last one (an encoder run on its own) belongs to it."""
        self.current, self.early = self.early or Pass(), None

    def end(self) -> Pass:
        """The model call is over."""
        done, self.current = self.current or Pass(), None
        done.check_unmodified()
        doubts, self.doubts = self.doubts, []
        for reads in doubts:
            reads.check_call()
        done.raw.clear()
        return done

    # ------------------------------------------------------------------------------------------ hooks

    def _pass(self) -> Pass:
        if self.current is not None:
            return self.current
        if self.early is None:
            self.early = Pass()
        return self.early

    def on_output(self, place: Place, module: nn.Module) -> None:
        """The common case, one site that is the output itself, has a short way."""
        entry, *others = self.places.at[place]
        plain = not others and entry.view is None and entry.scale == 1.0 and entry.calls == 1
        plain = plain and not (self.backward or self.clone or self.callback)
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

    def _on_behind(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        """Heads' shares add up to what a norm or scale gives: the gradient is taken there."""
        if self.disabled:
            return
        step = self._pass()
        for entry in self.places.sites:
            if entry.behind is module and entry.site in step.acts and entry.site not in step.roots:
                step.roots[entry.site] = _with_graph(entry, args, {}, output)
                return

    def visit(self, place: Place, args: tuple, kwargs: dict, output: Any) -> Any:
        """Read the sites of a place whose turn it is."""
        if self.disabled:
            return None
        given, changed, entries = (args, kwargs), None, self.places.at[place]
        if self.backward and place[1] == "input":
            value = read_input(args, kwargs)
            if value is not None and value.requires_grad:
                # the gradient goes through this module alone: others that use the tensor have their own
                apart = value.view_as(value)
                vars(apart)["_stream"] = value  # for sites that mean the stream around the module too
                given = changed = write_input(args, kwargs, None, apart)
        step = self._pass()
        count = step.fired[place]
        step.fired[place] += 1
        calls = entries[0].calls
        if count >= calls:
            raise RuntimeError(
                f"the site {str(entries[0].site)!r} fired {count + 1} times in one forward pass, expected "
                f"{calls}: the module {place[0]!r} runs more than once. Remedy: capture a module that runs "
                "once, sites='module_output:<path>', or list the shared block once a layer."
            )
        for entry in entries:
            if entry.call == count:
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
        value = self.tokens(entry, value)
        if self.backward and entry.behind is None:
            step.roots[entry.site] = _with_graph(entry, args, kwargs, output)
        value = value if self.keep_graph else value.detach()
        if self.callback is not None:
            changed = self.callback(entry.site, value)
            value = value if changed is None else changed
        if self.clone:
            value = value.clone()
        elif not value.is_inference():  # inference tensors have no version to compare
            step.versions[entry.site] = value._version
        step.acts[entry.site] = value

    def _on_follower(
        self, entry: ResolvedSite, path: str, module: nn.Module, args: tuple, kwargs: dict
    ) -> None:
        value = self._pass().raw.get(entry.site)
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


def read_named_outputs(output: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of a model's output by attribute name; a plain tensor answers to a single name."""
    if isinstance(output, Tensor) and len(names) == 1:
        return {names[0]: output}
    found = {}
    for name in names:
        value = output.get(name) if isinstance(output, dict) else getattr(output, name, None)
        if not isinstance(value, Tensor):
            has = [k for k in output if isinstance(output[k], Tensor)] if isinstance(output, dict) else []
            raise ValueError(
                f"model_outputs= expected a tensor {name!r} in the model's output, got "
                f"{type(value).__name__} from a "
                f"{type(output).__name__}" + (f" that has the tensors {has}." if has else ".")
            )
        found[name] = value
    return found
