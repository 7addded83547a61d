"""Hooks that live for one context: they read sites into a ``Pass`` and are removed together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tdgeom.model.calls.attention_kernel import eager_attention, padding_cutters, watch_softmax, whole_batches
from tdgeom.model.sites import Site
from tdgeom.model.structure.parts import is_neutral
from tdgeom.model.structure.readers import read_input, write_input
from tdgeom.model.structure.resolve import ADDED_KINDS, ResolvedSite
from tdgeom.model.calls.structure_check import Reads, unverified


class StopForward(Exception):
    """Raised by a hook once the last site has been read; never leaves the module form."""


class Pass:
    """What one forward pass has given so far."""

    def __init__(self) -> None:
        self.acts: dict[Site, Tensor] = {}
        self.versions: dict[Site, int] = {}
        self.fired: dict[tuple[str, str], int] = defaultdict(int)
        self.leading: dict[str, torch.Size] = {}
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


class Session:
    """Hooks on the modules of ``sites``; ``close`` takes away exactly these.

    ``stop`` ends the forward pass once every site has been read. ``watch`` checks, in the first block of each
    stack, that nothing transforms an attention or MLP output before it is added to the stream. ``backward`` keeps the
    model's own tensors in ``Pass.roots`` for their gradients. ``skip`` says whether reading is switched off.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        sites: Sequence[ResolvedSite],
        *,
        stop: bool,
        clone: bool,
        keep_graph: bool,
        watch: bool,
        model: nn.Module | None = None,
        backward: bool = False,
        callback: Callable[[Site, Tensor], Tensor | None] | None = None,
    ) -> None:
        self.sites, self.stop, self.clone, self.keep_graph = sites, stop, clone, keep_graph
        self.backward, self.callback, self.disabled = backward, callback, False
        self.undo = ExitStack()
        self.current: Pass | None = None
        self.early: Pass | None = None
        self.handles: list[Any] = []
        self.doubts: list[Reads] = []
        try:
            self._install(modules, watch, model)
        except BaseException:
            self.close()
            raise

    def _install(self, modules: dict[str, nn.Module], watch: bool, model: nn.Module | None) -> None:
        if watch and model is not None:  # before the hooks that may stop the pass
            self.doubts = unverified(model, self.sites)
            for reads in self.doubts:
                self.handles += reads.install()
        places: dict[tuple[str, str], list[ResolvedSite]] = defaultdict(list)
        for entry in self.sites:
            places[entry.module_path, entry.side].append(entry)
        inner = {
            e.block_path for e in self.sites if e.block_path is not None and e.module_path != e.block_path
        }
        # the block's own input hook comes first: its shape gives (B, T) back to parts that flatten it
        for path in sorted(inner):
            hook = partial(self._on_block, path)
            self.handles.append(modules[path].register_forward_pre_hook(hook, with_kwargs=True))
        if model is not None and any(e.side in ("scores", "pattern") for e in self.sites):
            self.undo.enter_context(eager_attention(model))
        if model is not None and padding_cutters(model):
            self.undo.enter_context(whole_batches(model))
        if self.backward:
            for behind in {e.behind for e in self.sites} - {None}:
                self.handles.append(behind.register_forward_hook(self._on_behind))
        for (path, side), entries in places.items():
            if side in ("scores", "pattern"):
                self.undo.enter_context(
                    watch_softmax(
                        modules[path], partial(self._on_softmax, (path, side), entries), entries[0].view.heads
                    )
                )
            elif side == "input":
                read = self._on_input_apart if self.backward else self._on_input
                hook = partial(read, (path, side), entries)
                self.handles.append(modules[path].register_forward_pre_hook(hook, with_kwargs=True))
            else:
                hook = self._output_hook((path, side), entries)
                kwargs = isinstance(hook, partial)
                self.handles.append(modules[path].register_forward_hook(hook, with_kwargs=kwargs))
        if watch:
            self._watch(modules)

    def close(self) -> None:
        """Remove the hooks and forget every tensor."""
        while self.handles:
            self.handles.pop().remove()
        self.undo.close()
        self.doubts = []
        self.current = self.early = None

    def begin(self) -> None:
        """A model call starts. What fired since the last one (an encoder run on its own) belongs to it."""
        self.current, self.early = self.early or Pass(), None

    def end(self) -> Pass:
        """The model call is over."""
        done, self.current = self.current, None
        done = done or Pass()
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

    def _on_block(self, path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        value = read_input(args, kwargs)
        if value is not None:
            self._pass().leading[path] = value.shape[:-1]

    def _on_input(self, place: tuple, entries: list, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._store(place, entries, args, kwargs, None)

    def _on_input_apart(
        self, place: tuple, entries: list, module: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict]:
        """The gradient of what a module receives goes through this module alone: others that use the tensor have their own."""
        value = read_input(args, kwargs)
        if value is not None and value.requires_grad and not self.disabled:
            apart = value.view_as(value)
            apart._stream = value  # for sites that mean the stream around the module too
            args, kwargs = write_input(args, kwargs, None, apart)
        self._store(place, entries, args, kwargs, None)
        return args, kwargs

    def _on_output(
        self, place: tuple, entries: list, module: nn.Module, args: tuple, kwargs: dict, output: Any
    ) -> None:
        self._store(place, entries, args, kwargs, output)

    def _output_hook(self, place: tuple[str, str], entries: list[ResolvedSite]) -> Callable:
        """A hook on a module's output: the common case, one site that is the output itself, has a short way."""
        slow, entry = partial(self._on_output, place, entries), entries[0]
        plain = len(entries) == 1 and entry.view is None and entry.scale == 1.0 and entry.calls == 1
        plain = plain and not (self.backward or self.clone or self.callback)
        if not plain or entry.site.kind in ADDED_KINDS:
            return slow
        site, inner = entry.site, entry.block_path != entry.module_path
        last = len(self.sites) if self.stop else -1

        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            step = self.current
            if (
                step is None
                or self.disabled
                or not isinstance(output, Tensor)
                or place in step.fired
                or (inner and output.ndim == 2)
            ):
                slow(module, args, {}, output)
                return
            step.fired[place] = 1
            value = output.detach() if output.requires_grad and not self.keep_graph else output
            if not value.is_inference():
                step.versions[site] = value._version
            step.acts[site] = value
            if len(step.acts) == last:
                raise StopForward

        return hook

    def _on_behind(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        """Heads' shares add up to what a norm or scale gives: the gradient is taken there."""
        if self.disabled:
            return
        step = self._pass()
        for entry in self.sites:
            if entry.behind is module and entry.site in step.acts and entry.site not in step.roots:
                step.roots[entry.site] = _with_graph(entry, args, {}, output)
                return

    def _on_softmax(self, place: tuple, entries: list, side: str, value: Tensor) -> Tensor:
        if side == place[1]:
            self._store(place, entries, (), {}, value)
        return value

    def _store(
        self, place: tuple, entries: list[ResolvedSite], args: tuple, kwargs: dict, output: Any
    ) -> None:
        if self.disabled:
            return
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
                self._keep(step, entry, args, kwargs, output)
        if self.stop and len(step.acts) == len(self.sites):
            raise StopForward

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
        leading = step.leading.get(entry.block_path) if entry.block_path != entry.module_path else None
        if (
            leading is not None
            and value.ndim == 2
            and len(leading) == 2
            and value.shape[0] == leading.numel()
        ):
            value = (
                value.view(*leading, value.shape[-1])
                if value.is_contiguous()
                else value.reshape(*leading, -1)
            )
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

    # ------------------------------------------------------------------------- is it what is added?

    def _watch(self, modules: dict[str, nn.Module]) -> None:
        watched: set[tuple] = set()
        for entry in self.sites:
            key = (entry.site.stack, entry.site.kind)
            if entry.site.kind not in ADDED_KINDS or entry.call or key in watched:
                continue
            watched.add(key)
            leave = entry.module_path
            for name, module in modules[entry.block_path or ""].named_modules():
                path = ".".join(p for p in (entry.block_path, name) if p)
                related = path.startswith(leave + ".") or leave.startswith(path + ".") or path == leave
                if name and not related and not is_neutral(module):
                    hook = partial(self._on_follower, entry, path)
                    self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

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


def read_named_outputs(
    output: Any, names: Sequence[str], keep: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Tensors of a model's output by attribute name; a plain tensor answers to a single name."""
    if isinstance(output, Tensor) and len(names) == 1:
        return {names[0]: keep(output)}
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
        found[name] = keep(value)
    return found
