"""From site names to the modules of one model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from tdgeom.model.sites import (
    BLOCK_KINDS,
    KINDS,
    MODULE_KINDS,
    ROOT,
    STACK_KINDS,
    LayerSpec,
    Site,
    exact_site,
    select_layers,
    split_element,
)
from tdgeom.model.structure.blocks import Stack, find_final_norm, find_stacks
from tdgeom.model.structure.match_path import match_path
from tdgeom.model.structure.meant_sites import listed_sites, meant_sites
from tdgeom.model.structure.module_roles import module_tree
from tdgeom.model.structure.parts import Part, find_parts, join
from tdgeom.model.structure.readers import spelled
from tdgeom.model.structure.resolved_site import ResolvedSite
from tdgeom.model.structure.select_heads import HeadSpec, with_heads

_GLOB = frozenset("*?[")
_MOST_NAMED = 4096
_NAMED: WeakKeyDictionary[nn.Module, dict[str, ResolvedSite]] = WeakKeyDictionary()
# the tree of a model's modules, its stacks and its sites: held by the model's own life, and never the model itself
_FOUND: WeakKeyDictionary[nn.Module, tuple[list[tuple], list[Stack], list[ResolvedSite]]] = (
    WeakKeyDictionary()
)


def find_sites(model: nn.Module) -> list[ResolvedSite]:
    """All sites of a model that have a kind of their own, in execution order, as its structure has them.

    Nothing is run: whether they hold is said by ``tdgeom.model.calls.checked_sites``. The list is empty for a model in which
    no repeated blocks are found.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    >>> [(entry.site, entry.module_path) for entry in find_sites(model)][:2]
    [('embed', '0'), ('residual_input.0', '0')]
    """
    return list(_found(model)[1])


def _found(model: nn.Module) -> tuple[list[Stack], list[ResolvedSite]]:
    """Stacks and sites of a model, found anew where a module of it is another one than before."""
    modules = module_tree(model)
    known = _FOUND.get(model)
    if known is None or known[0] != modules:
        stacks = find_stacks(model)
        entries = [entry for stack in stacks for entry in _stack_sites(model, stack)]
        known = _FOUND[model] = modules, stacks, entries
    return known[1], known[2]


def select_sites(
    model: nn.Module,
    sites: str | re.Pattern | Iterable[str | re.Pattern],
    found: Sequence[ResolvedSite] | None = None,
    *,
    layers: LayerSpec = "all",
    prefix: str = "",
    heads: HeadSpec = None,
    classes: Sequence[type[nn.Module]] = (),
    skip_classes: Sequence[type[nn.Module]] = (),
) -> list[ResolvedSite]:
    """The sites that ``sites`` and ``layers`` name among those ``found`` in ``model``, each once, in execution order.

    ``sites`` holds kinds, kinds of one stack (``"encoder.residual_input"``), concrete names (``"residual_output.-1"``), globs
    of module paths (``"module_output:h.*.mlp"``; ``*`` stays within one component, ``**`` takes any number of them;
    ``"module_output:<root>"`` is the model itself; ``[1]`` or ``['name']`` behind a path is that tensor of a container), or
    compiled regular expressions, which must match a whole module path and stand for its output. ``layers`` applies to
    kinds, globs and expressions (which keep what lies in the blocks of these layers); beside concrete names alone it must not
    exclude them. ``classes`` and ``skip_classes`` take or leave sites by the class of their module. ``heads`` picks query
    heads, for all layers or as a mapping from layers; where queries share key/value heads, the keys and values of these heads.
    Raises ``ValueError`` for what a model does not have and ``IndexError`` for a layer or head out of range.
    """
    wanted = sites_meant(model, sites, prefix)
    # paths of modules alone ask nothing of the structure, which takes longest to find
    paths = _is_all(layers) and not any(isinstance(name, str) and ":" not in name for name in wanted)
    stacks, all_found = ([], []) if paths else _found(model)
    if found is None:
        found = all_found
    chosen: list[ResolvedSite] = []
    applied = any(map(takes_layers, wanted))
    for name in wanted:
        if isinstance(name, re.Pattern):
            own = _in_layers(_module_sites(model, name, "output"), stacks, layers, name.pattern)
        elif name.kind in MODULE_KINDS:
            own = _module_sites(model, name.path or ROOT, name.kind.removeprefix("module_"))
            own = _in_layers(own, stacks, layers, name)
        else:
            own = _select(
                model, stacks, found or [], name, layers if takes_layers(name) or not applied else "all"
            )
        chosen += _of_classes(model, own, classes, skip_classes)
    if not _is_all(layers) and not applied and all(entry.site.kind in STACK_KINDS for entry in chosen):
        names = ", ".join(sorted({repr(entry.site.kind) for entry in chosen}))
        raise ValueError(f"layers={layers!r} was given, and {names} has no layers. Remedy: leave it out.")
    unique = {entry.site: entry for entry in chosen}
    rank = {entry.site: i for i, entry in enumerate(found)}
    ordered = list(unique.values())
    if all(site in rank for site in unique):
        ordered.sort(key=lambda entry: rank[entry.site])
    elif len(ordered) > 1:
        ordered.sort(key=_execution_order(model, find_sites(model) if paths else found))
    if heads is not None:
        ordered = with_heads(ordered, heads)
    return [replace(e, site=e.site.with_prefix(prefix)) for e in ordered] if prefix else ordered


def sites_meant(model: nn.Module, sites: Any, prefix: str = "") -> list[Site | re.Pattern]:
    """The sites and expressions that ``sites`` stands for in a model, however it names them.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    >>> sites_meant(model, ["blocks.1.hook_resid_pre", "embed", model[0]]), sites_meant(model, ("resid_post", 1))
    (['residual_input.1', 'embed', 'module_output:0'], ['residual_output.1'])
    """
    wanted = listed_sites(model, sites)
    if not wanted:
        raise ValueError(f"sites= names no site; kinds: {', '.join(KINDS)}.")
    return meant_sites(model, wanted, prefix, _found)


def takes_layers(name: object) -> bool:
    """Whether ``layers=`` chooses among what a name stands for: kinds, globs and expressions, not a concrete site.

    >>> takes_layers("residual_output"), takes_layers("residual_output.0"), takes_layers("final_norm")
    (True, False, False)
    """
    return not isinstance(name, str) or _is_open(str(name))


@lru_cache(1024)
def _is_open(name: str) -> bool:
    site = Site(name)
    return site.layer is None and site.kind not in STACK_KINDS


def _is_all(layers: LayerSpec) -> bool:
    return isinstance(layers, str) and layers.strip() == "all"


def _stack_sites(model: nn.Module, stack: Stack) -> list[ResolvedSite]:
    first, norm = stack.blocks[0], find_final_norm(model, stack)
    embed = Site.of("embed", stack=stack.name)
    entries = [ResolvedSite(embed, first.path, "input", calls=first.calls, block_path=first.path)]
    known: dict[nn.Module, dict[str, Part]] = {}
    for layer, block in enumerate(stack.blocks):
        if block.module not in known:
            known[block.module] = find_parts(block.module)
        parts = {
            "residual_input": Part("", "input"),
            **known[block.module],
            "residual_output": Part("", "output"),
        }
        for kind in BLOCK_KINDS:
            if (part := parts.get(kind)) is not None:
                site, path = Site.of(kind, layer, stack=stack.name), join(block.path, part.path)
                where = ResolvedSite(site, path, part.side, part.scale, block.call, block.calls, block.path)
                entries.append(replace(where, view=part.view, groups=part.groups, bypass=part.bypass))
    if norm is not None:
        entries.append(ResolvedSite(Site.of("final_norm", stack=stack.name), norm, "output"))
    return entries


def _select(
    model: nn.Module, stacks: list[Stack], found: Sequence[ResolvedSite], site: Site, layers: LayerSpec
) -> list[ResolvedSite]:
    if not stacks:
        raise ValueError(
            f"expected repeated blocks (a list of like modules) for the site {site!r}, found none in "
            f"{type(model).__name__}. Remedy: name the module, sites='module_output:<path>'; paths: "
            f"{_some(p for p, _ in model.named_modules() if p)}."
        )
    names = [stack.name for stack in stacks]
    if site.stack is not None and site.stack not in names:
        known = ", ".join(repr(n) for n in names if n) or "one stack without a name"
        raise ValueError(
            f"the site {site!r} names the stack {site.stack!r}; {type(model).__name__} has {known}."
        )
    if site.stack is None and site.layer is not None and len(stacks) > 1:
        raise ValueError(
            f"{site!r} could be in any of the stacks {', '.join(map(str, names))} of "
            f"{type(model).__name__}. Remedy: {names[0]}.{site}."
        )
    if site.layer is not None and site.kind in STACK_KINDS:
        raise ValueError(f"{site.kind!r} has no layers; write it without a number, got {site!r}.")
    chosen = []
    for stack in stacks:
        if site.stack in (None, stack.name):
            chosen += _select_in(stack, found, site, layers)
    if not chosen:
        kinds = sorted({entry.site.kind for entry in found}, key=KINDS.index)
        raise ValueError(
            f"{type(model).__name__} has no {site.kind!r} that can be told from its structure; it has "
            f"{', '.join(kinds)}. Remedy: name the module, sites='module_output:<path>'; modules of a "
            "block: "
            f"{_some(n for n, _ in stacks[0].blocks[0].module.named_modules(prefix=stacks[0].blocks[0].path))}."
        )
    return chosen


def _select_in(
    stack: Stack, found: Sequence[ResolvedSite], site: Site, layers: LayerSpec
) -> list[ResolvedSite]:
    own = [entry for entry in found if entry.site.kind == site.kind and entry.site.stack == stack.name]
    if site.kind in STACK_KINDS:
        return own
    where = f"the stack {stack.name!r}" if stack.name else f"the stack at {stack.path or 'the root'!r}"
    asked = layers if site.layer is None else site.layer
    chosen = select_layers(asked, len(stack.blocks), where)
    if site.layer is not None and not set(chosen) <= set(select_layers(layers, len(stack.blocks), where)):
        raise ValueError(
            f"{site!r} and layers={layers!r} exclude each other. Remedy: name sites of these layers, or give kinds."
        )
    by_layer = {entry.site.layer: entry for entry in own if entry.site.layer is not None}
    missing = [layer for layer in chosen if layer not in by_layer]
    # "all" means all layers that have one: hybrid models mix blocks with and without attention
    explicit = site.layer is not None or not isinstance(asked, str) or asked != "all"
    if own and missing and explicit:
        raise ValueError(
            f"the layers {missing} have no {site.kind!r}; layers of {where} that do: {sorted(by_layer)}."
        )
    return [by_layer[layer] for layer in chosen if layer in by_layer]


def _module_sites(model: nn.Module, pattern: str | re.Pattern, side: str) -> list[ResolvedSite]:
    text, element = split_element(pattern) if isinstance(pattern, str) else (pattern.pattern, None)
    matched = [] if not isinstance(pattern, str) else [""] if text == ROOT else _exactly(model, text)
    modules = {} if matched else {path: module for path, module in model.named_modules() if path}
    if not isinstance(pattern, str):
        matched = [path for path in modules if pattern.fullmatch(path)]
    elif not matched:
        matched = [path for path in modules if match_path(path, text)]
    if not matched:
        close = get_close_matches(text, list(modules), n=5, cutoff=0.4) or list(modules)[:5]
        raise ValueError(
            f"no module of {type(model).__name__} matches {text!r} (the whole path has to match). "
            f"Nearest: {', '.join(close)}. The model itself is {ROOT!r}."
        )
    behind = "" if element is None else spelled(element)
    sites = [Site.of(f"module_{side}", path=(path or ROOT) + behind) for path in matched]
    return [
        ResolvedSite(site, path, side, element=element) for site, path in zip(sites, matched, strict=True)
    ]


def _exactly(model: nn.Module, path: str) -> list[str]:
    """A path that is no glob and leads to a module: looked up, not looked for."""
    module: nn.Module | None = model
    for name in () if _GLOB.intersection(path) else path.split("."):
        module = None if module is None else module._modules.get(name)
    return [] if module is None or module is model else [path]


def site_by_path(
    model: nn.Module,
    sites: Any,
    *,
    layers: LayerSpec = "all",
    prefix: str = "",
    heads: HeadSpec = None,
    classes: Sequence[type[nn.Module]] = (),
    skip_classes: Sequence[type[nn.Module]] = (),
) -> ResolvedSite | None:
    """What :func:`select_sites` gives where that is one module, named by its path, and nothing is chosen beside.

    >>> site_by_path(nn.Sequential(nn.Linear(4, 4)), "module_output:0"), site_by_path(nn.Linear(4, 4), "module_output:0")
    (<module_output:0: output of 0>, None)
    """
    name = sites[0] if type(sites) is list and len(sites) == 1 else sites
    if not isinstance(name, str) or not name.startswith(("module_output:", "module_input:")):
        return None
    if not _is_all(layers) or prefix or heads is not None or classes or skip_classes:
        return None
    known = _NAMED.setdefault(model, {})
    entry = known.get(name)
    if entry is None:
        asked = exact_site(name)
        path, element = split_element(ROOT if asked is None else asked.path or ROOT)
        if (
            asked is None
            or asked.prefix
            or element is not None
            or len(known) >= _MOST_NAMED
            or not _exactly(model, path)
        ):
            return None
        site = Site.of(asked.kind, path=path)  # not the caller's own, which may be another model's
        entry = known[str(name)] = ResolvedSite(site, path, site.kind.removeprefix("module_"))
    return entry if _exactly(model, entry.module_path) else None


def _in_layers(
    entries: list[ResolvedSite], stacks: Sequence[Stack], layers: LayerSpec, name: str
) -> list[ResolvedSite]:
    """Modules in the blocks of the chosen layers; those outside of blocks belong to none."""
    if _is_all(layers):
        return entries
    if not stacks:
        raise ValueError(
            f"layers={layers!r} needs repeated blocks, and none were found. Remedy: leave it out, and name the "
            f"modules in sites= alone, instead of {name!r}."
        )
    kept: set[str] = set()
    inside = 0
    for stack in stacks:
        numbers: dict[str, set[int]] = {}
        for number, block in enumerate(stack.blocks):
            numbers.setdefault(block.path, set()).add(number)
        own = {
            e.module_path: n for e in entries for path, n in numbers.items() if _is_in(e.module_path, path)
        }
        if own:
            inside += len(own)
            where = (
                f"the stack {stack.name!r}" if stack.name else f"the stack at {stack.path or 'the root'!r}"
            )
            chosen = set(select_layers(layers, len(stack.blocks), where))
            kept |= {path for path, layer in own.items() if layer & chosen}
    if not kept:
        raise ValueError(
            f"layers={layers!r} leaves nothing of {name!r}: {inside} of the {len(entries)} modules matched lie in blocks, "
            "none of them in these layers. Remedy: other layers, or leave layers= out."
        )
    return [entry for entry in entries if entry.module_path in kept]


def _is_in(path: str, block: str) -> bool:
    return path == block or path.startswith(block + ".")


def _of_classes(
    model: nn.Module,
    entries: list[ResolvedSite],
    classes: Sequence[type[nn.Module]],
    skip_classes: Sequence[type[nn.Module]],
) -> list[ResolvedSite]:
    if not classes and not skip_classes:
        return entries
    kinds = {entry.module_path: model.get_submodule(entry.module_path) for entry in entries}
    kept = [e for e in entries if not classes or isinstance(kinds[e.module_path], tuple(classes))]
    kept = [e for e in kept if not isinstance(kinds[e.module_path], tuple(skip_classes))]
    if not kept:
        names = sorted({type(module).__name__ for module in kinds.values()})
        raise ValueError(
            f"classes= and skip_classes= leave none of the modules matched, which are {', '.join(names)}."
        )
    return kept


def _execution_order(
    model: nn.Module, found: Sequence[ResolvedSite]
) -> Callable[[ResolvedSite], tuple[float, float, float]]:
    """A sort key: known sites as :func:`find_sites` lists them, other modules where they are registered."""
    rank = {entry.site: i for i, entry in enumerate(found)}
    start = {path: i for i, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    end = dict(start)
    for path in reversed(start):  # children come behind their parents
        parent = path.rpartition(".")[0]
        end[parent] = max(end[parent], end[path])
    ends = [entry for entry in found if entry.site.kind in ("residual_input", "residual_output")]
    first_of = {e.block_path: rank[e.site] for e in reversed(ends) if e.site.kind == "residual_input"}
    last_of = {e.block_path: rank[e.site] for e in ends if e.site.kind == "residual_output"}
    # what has run by then, for a module outside of blocks: whole blocks, and a final norm registered behind
    # them
    passed = [(start[path], last) for path, last in last_of.items() if path is not None]
    blocks_end = max((at for at, _ in passed), default=0)
    norms = [e for e in found if e.site.kind == "final_norm" and start[e.module_path] > blocks_end]
    passed += [(start[e.module_path], rank[e.site]) for e in norms]

    def key(entry: ResolvedSite) -> tuple[float, float, float]:
        if entry.site in rank:
            return (rank[entry.site], 0.0, 0.0)
        path, is_output = entry.module_path, entry.side == "output"
        moment = end[path] + 0.5 if is_output else start[path]
        tie = -float(path.count(".")) if is_output else float(path.count("."))
        if path in first_of:
            return (last_of[path], 1.0, tie) if is_output else (first_of[path], -1.0, tie)
        owner = path
        while owner and owner not in first_of:
            owner = owner.rpartition(".")[0]
        if owner:
            return (first_of[owner], 1.0 + moment, tie)
        before = [rank for at, rank in passed if at < moment]
        return (max(before, default=-1.0), 2.0 + moment + len(start), tie)

    return key


def _some(paths: Iterable[str], most: int = 12) -> str:
    listed = list(paths)
    return ", ".join(listed[:most]) + (f", ... ({len(listed)} in all)" if len(listed) > most else "")


__all__ = ["find_sites", "select_sites", "sites_meant"]
