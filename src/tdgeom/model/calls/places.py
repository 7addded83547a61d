"""Where hooks for some sites of a model go, and whether the modules there are still the ones that were found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any
from weakref import ref

from torch import nn

from tdgeom.model.calls.call_info import mask_tellers
from tdgeom.model.calls.call_paths import paths_of_calls
from tdgeom.model.calls.forward_signature import Signature, names_another, read_signature
from tdgeom.model.structure.parts import join
from tdgeom.model.structure.resolved_site import ResolvedSite

Place = tuple[str, str]  # a module's path, and the side of it


class Places:
    """Where hooks for some sites of a model go; found once, for every context that asks for these sites.

    The model itself is referred to and not held: what is kept with a model must not keep it.
    """

    def __init__(self, model: nn.Module, sites: Iterable[ResolvedSite]) -> None:
        self._model, self.sites = ref(model), tuple(sites)
        self.paths = {path for e in self.sites for path in (e.module_path, e.block_path) if path is not None}
        self._modules = {path: model.get_submodule(path) for path in self.paths if path}
        self.at: dict[Place, list[ResolvedSite]] = defaultdict(list)
        for entry in self.sites:
            self.at[entry.module_path, entry.side].append(entry)
        # the block's own input hook comes first: its shape gives (B, T) back to parts that flatten it
        self.blocks = sorted(
            {e.block_path for e in self.sites if e.block_path is not None and e.block_path != e.module_path}
        )
        self.behind = list(dict.fromkeys(e.behind for e in self.sites if e.behind is not None))
        self.softmax = any(entry.in_softmax for entry in self.sites)
        self.inside = {p: own for p, own in self.at.items() if own[0].in_softmax or own[0].in_router}
        _, *self._parts = paths_of_calls(model, [e.block_path or e.module_path for e in self.sites])
        self.tellers = mask_tellers(model, [e.block_path or e.module_path for e in self.sites[:1]])
        self._steps = [
            (None if parent is model else parent, name, child, len(parent._modules), *_forwards_of(child))
            for _, parent, name, child in steps_to(model, self.paths)
        ]
        self._own = _forwards_of(model)

    @property
    def model(self) -> nn.Module:
        """The model; who holds the places of one holds it, too."""
        model = self._model()
        if model is None:
            raise ReferenceError("the model of these places is gone.")
        return model

    def module(self, path: str) -> nn.Module:
        """The module at one of the paths."""
        return self._modules[path] if path else self.model

    @property
    def calls(self) -> list[tuple[str, nn.Module]]:
        """The modules whose calls are calls of the model, with their paths: the model first."""
        return [("", self.model), *self._parts]

    def is_as_found(self) -> bool:
        """Whether nothing on the way to the places was replaced or compiled since they were found; one look at each module."""
        model = self._model()
        if (
            model is None
            or model._compiled_call_impl is not None
            or type(model).forward is not self._own[0]
            or model.__dict__.get("forward") is not self._own[1]
        ):
            return False
        for parent, name, child, siblings, usual, own in self._steps:
            modules = (model if parent is None else parent)._modules
            if (
                modules.get(name) is not child
                or len(modules) != siblings
                or child._compiled_call_impl is not None
                or type(child).forward is not usual
                or child.__dict__.get("forward") is not own
            ):
                return False
        return True

    def can_be_kept(self) -> bool:
        """Whether ``is_as_found`` sees all that was found: not where a forward of somebody's hands on to others."""
        modules = [self.model, *(step[2] for step in self._steps)]
        return not any("forward" in module.__dict__ or names_another(module) for module in modules)

    def insides(self) -> list[str]:
        """The paths of modules in whose forward something is looked at, not only what it takes and gives."""
        return [entry.module_path for entry in self.sites if entry.in_softmax]

    @cached_property
    def owners(self) -> list[list[tuple[str, Signature]]]:
        """For each site the modules around it that are called with token ids, the nearest first and the model last.

        The nearest knows the mask and the cache; one further out knows the ids, where the nearest is given embeddings.
        """
        model, known = self.model, {"": self.signature}
        return [_owners(model, entry, known) for entry in self.sites]

    @cached_property
    def signature(self) -> Signature:
        """What the model itself is called with."""
        return read_signature(self.model)


def _owners(
    model: nn.Module, entry: ResolvedSite, known: dict[str, Signature]
) -> list[tuple[str, Signature]]:
    path, found = (entry.block_path or entry.module_path).rpartition(".")[0], []
    while path:
        if path not in known:
            known[path] = read_signature(model.get_submodule(path))
        if "input_ids" in known[path].names:
            found.append((path, known[path]))
        path = path.rpartition(".")[0]
    return [*found, ("", known[""])]


def steps_to(model: nn.Module, paths: Iterable[str]) -> Iterator[tuple[str, Any, str, nn.Module]]:
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


def _forwards_of(module: nn.Module) -> tuple[Any, Any]:
    """The forward of a module's class, and one that was put in its place."""
    return type(module).forward, module.__dict__.get("forward")
