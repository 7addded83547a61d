"""Hooks on the places where sites lie: one installer for who reads and who edits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tdgeom.model.calls.attention_kernel import eager_attention, padding_cutters, watch_softmax, whole_batches
from tdgeom.model.structure.readers import read_input
from tdgeom.model.structure.resolved_site import ResolvedSite

Place = tuple[str, str]  # a module's path, and the side of it


class Places:
    """Where hooks for some sites of a model go; found once, however often hooks are installed there."""

    def __init__(self, model: nn.Module, sites: Iterable[ResolvedSite]) -> None:
        self.model, self.sites = model, tuple(sites)
        paths = {path for e in self.sites for path in (e.module_path, e.block_path) if path is not None}
        self.modules = {path: model.get_submodule(path) for path in paths}
        self.at: dict[Place, list[ResolvedSite]] = defaultdict(list)
        for entry in self.sites:
            self.at[entry.module_path, entry.side].append(entry)
        # the block's own input hook comes first: its shape gives (B, T) back to parts that flatten it
        self.blocks = sorted(
            {e.block_path for e in self.sites if e.block_path is not None and e.block_path != e.module_path}
        )
        self.behind = list(dict.fromkeys(e.behind for e in self.sites if e.behind is not None))
        self.softmax = any(entry.in_softmax for entry in self.sites)


class SiteHooks:
    """Hooks on the modules of sites; ``close`` takes away exactly these.

    A subclass defines ``visit``, what is done at a place, and ``around``, further hooks that belong before those of the places.
    ``changes`` says whether what the model computes may change by it.
    """

    changes = False

    def __init__(self, places: Places) -> None:
        self.places = places
        self.handles: list[Any] = []
        self.undo = ExitStack()
        self.leading: dict[str, torch.Size] = {}

    def visit(self, place: Place, args: tuple, kwargs: dict, output: Any) -> Any:
        """What goes on instead: ``(args, kwargs)`` at an input, else an output; ``None`` for what came."""
        raise NotImplementedError

    def around(self) -> None:
        """Install what a subclass needs beside the places, before their hooks."""

    def open(self) -> None:
        """Install the hooks, all of them or none."""
        places, modules = self.places, self.places.modules
        try:
            if places.softmax:
                self.undo.enter_context(eager_attention(places.model))
            if padding_cutters(places.model):
                self.undo.enter_context(whole_batches(places.model))
            for path in places.blocks:
                self.before(modules[path], partial(self.on_block, path))
            self.around()
            for place, entries in places.at.items():
                module = modules[place[0]]
                if entries[0].in_softmax:
                    watcher = partial(self._on_softmax, place)
                    self.undo.enter_context(watch_softmax(module, watcher, entries[0].head_count))
                elif place[1] == "input":
                    self.before(module, partial(self._on_input, place))
                else:
                    self.on_output(place, module)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the hooks and forget every tensor."""
        while self.handles:
            self.handles.pop().remove()
        self.undo.close()

    def before(self, module: nn.Module, hook: Callable, **options: bool) -> None:
        """A hook in front of a module, called with its arguments."""
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, **options))

    def after(self, module: nn.Module, hook: Callable, **options: bool) -> None:
        """A hook behind a module."""
        self.handles.append(module.register_forward_hook(hook, **options))

    def on_output(self, place: Place, module: nn.Module) -> None:
        """Install the hook on a module's output."""
        self.after(module, partial(self._on_output, place), with_kwargs=True)

    def on_block(self, path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A block begins: note the shape of what it is given."""
        value = read_input(args, kwargs)
        if value is not None:
            self.leading[path] = value.shape[:-1]

    def tokens(self, entry: ResolvedSite, value: Tensor) -> Tensor:
        """(B·T, D) as (B, T, D) where a part of a block works on flattened tokens; anything else as it is."""
        path = entry.block_path
        leading = None if path is None or path == entry.module_path else self.leading.get(path)
        if leading is None or value.ndim != 2 or len(leading) != 2 or value.shape[0] != leading.numel():
            return value
        return value.reshape(*leading, value.shape[-1])

    def _on_input(self, place: Place, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        return self.visit(place, args, kwargs, None)

    def _on_output(self, place: Place, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        return self.visit(place, args, kwargs, output)

    def _on_softmax(self, place: Place, side: str, value: Tensor) -> Tensor:
        new = self.visit(place, (), {}, value) if side == place[1] else None
        return value if new is None else new


def only_reads(hook: Any) -> bool:
    """Whether a hook on a module is one of ours that changes nothing."""
    owner = getattr(getattr(hook, "func", hook), "__self__", None)
    return isinstance(owner, SiteHooks) and not owner.changes
