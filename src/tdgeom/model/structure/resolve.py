"""From site names to the modules of one model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from tdgeom.model.sites import (
    BLOCK_KINDS,
    HEAD_KINDS,
    KINDS,
    MODULE_KINDS,
    STACK_KINDS,
    LayerSpec,
    Site,
    select_layers,
)
from tdgeom.model.structure.blocks import Stack, find_final_norm, find_stacks
from tdgeom.model.structure.parts import Part, find_parts, join
from tdgeom.model.structure.resolved_site import ResolvedSite


def available_sites(model: nn.Module) -> list[ResolvedSite]:
    """All sites of a model that have a kind of their own, in execution order, with their module paths.

    Any other place is ``module_input:<path>`` or ``module_output:<path>``. The list is empty for a model in
    which no repeated blocks are found.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    >>> [(entry.site, entry.module_path) for entry in available_sites(model)][:2]
    [('embed', '0'), ('residual_input.0', '0')]
    """
    return [entry for stack in find_stacks(model) for entry in _stack_sites(model, stack)]


def resolve_sites(
    model: nn.Module,
    sites: str | re.Pattern | Iterable[str | re.Pattern],
    *,
    layers: LayerSpec = "all",
    prefix: str = "",
    heads: int | Sequence[int] | None = None,
    classes: Sequence[type[nn.Module]] = (),
    skip_classes: Sequence[type[nn.Module]] = (),
) -> list[ResolvedSite]:
    """The sites that ``sites`` and ``layers`` name in ``model``, each once, in execution order.

    ``sites`` holds kinds (``layers`` applies to them), kinds of one stack (``"encoder.residual_input"``),
    concrete names (``"residual_output.-1"``), or globs of module paths (``"module_output:h.*.mlp"``; ``*``
    stays within one component, ``**`` takes any number of them), or compiled regular expressions, which must match a
    whole module path and stand for its output. ``classes`` and ``skip_classes`` take or leave modules that globs and
    expressions match. ``heads`` picks query heads; where queries share key/value heads, the keys and values of these
    heads. Raises ``ValueError`` for what a model does not have and ``IndexError`` for a layer or head out of range.
    """
    wanted = [sites] if isinstance(sites, str | re.Pattern) else list(sites)
    if not wanted:
        raise ValueError(f"sites= names no site; kinds: {', '.join(KINDS)}.")
    stacks = find_stacks(model)
    found = [entry for stack in stacks for entry in _stack_sites(model, stack)]
    chosen: list[ResolvedSite] = []
    for name in wanted:
        if isinstance(name, re.Pattern):
            chosen += _module_sites(model, name, "output", classes, skip_classes)
            continue
        if not isinstance(name, str):
            raise ValueError(f"a site is a string such as 'residual_input.0', got {name!r}.")
        site = Site(name.removeprefix(prefix) if prefix else name)
        if site.prefix:
            raise ValueError(
                f"the site {name!r} has the prefix {site.prefix!r}, where prefix={prefix!r} was given."
            )
        if site.kind in MODULE_KINDS:
            chosen += _module_sites(
                model, site.path or "", site.kind.removeprefix("module_"), classes, skip_classes
            )
        else:
            chosen += _select(model, stacks, found, site, layers)
    unique = {entry.site: entry for entry in chosen}
    ordered = sorted(unique.values(), key=_execution_order(model, found))
    if heads is not None:
        ordered = _with_heads(ordered, [heads] if isinstance(heads, int) else list(heads))
    return [replace(e, site=e.site.with_prefix(prefix)) for e in ordered] if prefix else ordered


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
    model: nn.Module, stacks: list[Stack], found: list[ResolvedSite], site: Site, layers: LayerSpec
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


def _select_in(stack: Stack, found: list[ResolvedSite], site: Site, layers: LayerSpec) -> list[ResolvedSite]:
    own = [entry for entry in found if entry.site.kind == site.kind and entry.site.stack == stack.name]
    if site.kind in STACK_KINDS:
        return own
    where = f"the stack {stack.name!r}" if stack.name else f"the stack at {stack.path or 'the root'!r}"
    asked = layers if site.layer is None else site.layer
    chosen = select_layers(asked, len(stack.blocks), where)
    by_layer = {entry.site.layer: entry for entry in own if entry.site.layer is not None}
    missing = [layer for layer in chosen if layer not in by_layer]
    # "all" means all layers that have one: hybrid models mix blocks with and without attention
    explicit = site.layer is not None or not isinstance(asked, str) or asked != "all"
    if own and missing and explicit:
        raise ValueError(
            f"the layers {missing} have no {site.kind!r}; layers of {where} that do: {sorted(by_layer)}."
        )
    return [by_layer[layer] for layer in chosen if layer in by_layer]


def _module_sites(
    model: nn.Module,
    pattern: str | re.Pattern,
    side: str,
    classes: Sequence[type[nn.Module]],
    skip_classes: Sequence[type[nn.Module]],
) -> list[ResolvedSite]:
    modules = {path: module for path, module in model.named_modules() if path}
    if isinstance(pattern, str):
        matched = [path for path in modules if match_path(path, pattern)]
    else:
        matched = [path for path in modules if pattern.fullmatch(path)]
    if not matched:
        text = pattern if isinstance(pattern, str) else pattern.pattern
        close = get_close_matches(text, list(modules), n=5, cutoff=0.4) or list(modules)[:5]
        raise ValueError(
            f"no module of {type(model).__name__} matches {text!r} (the whole path has to match). "
            f"Nearest: {', '.join(close)}."
        )
    kept = [path for path in matched if not classes or isinstance(modules[path], tuple(classes))]
    kept = [path for path in kept if not isinstance(modules[path], tuple(skip_classes))]
    if not kept:
        kinds = sorted({type(modules[path]).__name__ for path in matched})
        raise ValueError(
            f"classes= and skip_classes= leave none of the modules matched, which are {', '.join(kinds)}."
        )
    return [ResolvedSite(Site.of(f"module_{side}", path=path), path, side) for path in kept]


def _with_heads(entries: list[ResolvedSite], heads: Sequence[int]) -> list[ResolvedSite]:
    chosen = []
    for entry in entries:
        if entry.view is None:
            chosen.append(entry)
            continue
        count = entry.head_count
        for head in heads:
            if isinstance(head, bool) or not isinstance(head, int) or not -count <= head < count:
                raise IndexError(
                    f"head {head!r} is out of range: {str(entry.site)!r} has {count} query heads."
                )
        chosen.append(replace(entry, heads=tuple(head % count // entry.groups for head in heads)))
    if not any(entry.site.kind in HEAD_KINDS for entry in chosen):
        raise ValueError(
            f"heads= needs a site with heads ({', '.join(HEAD_KINDS)}), got {[e.site for e in entries]}."
        )
    return chosen


def match_path(path: str, pattern: str) -> bool:
    """Whether a glob matches a whole module path: ``*`` within one component, ``**`` over any number of them.

    >>> match_path("h.1", "h.1"), match_path("h.10", "h.1"), match_path("h.10.mlp", "h.*.mlp")
    (True, False, True)
    """
    return _match(path.split("."), pattern.split("."))


def _match(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_match(parts[i:], patterns[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], patterns[0]) and _match(parts[1:], patterns[1:])


def _execution_order(
    model: nn.Module, found: list[ResolvedSite]
) -> Callable[[ResolvedSite], tuple[float, float, float]]:
    """A sort key: known sites as :func:`available_sites` lists them, other modules where they are registered."""
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


__all__ = ["available_sites", "match_path", "resolve_sites"]
