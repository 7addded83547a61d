"""What was concluded from a model's structure, checked once by a tiny pass of the model itself.

One block of every distinct class of blocks of a stack runs under a look (:mod:`tdgeom.model.calls.block_reads`), and its
numbers say whether each kind of site is what its name promises (:mod:`tdgeom.model.calls.block_facts`). What was found is
kept with the model, by what the block is made of: a model that is changed (an adapter, another layer) is looked at again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from tdgeom.core.surroundings import steady
from tdgeom.model.calls.attention_kernel import visible_attention
from tdgeom.model.calls.block_facts import other_positions, refusals, strange_stream
from tdgeom.model.calls.block_reads import BlockReads
from tdgeom.model.calls.bound_model import eval_mode, may_stop
from tdgeom.model.calls.forward_signature import read_signature
from tdgeom.model.calls.model_inputs import made_up_inputs
from tdgeom.model.calls.places import Places
from tdgeom.model.calls.quiet import without_hooks
from tdgeom.model.calls.router_check import MOVED, moved_logits
from tdgeom.model.calls.stream_order import STREAM_KINDS, StackReads
from tdgeom.model.calls.verified import verified
from tdgeom.model.sites import Site
from tdgeom.model.structure.module_roles import module_tree
from tdgeom.model.structure.parts import is_neutral, join
from tdgeom.model.structure.resolved_site import ADDED_KINDS, ResolvedSite

_BATCH, _LENGTH = 2, 5
PASSED = ""  # what is kept of a kind that is what it should be
Key = tuple[Any, ...]
_MADE_OF: WeakKeyDictionary[nn.Module, tuple[list, Key]] = WeakKeyDictionary()
Facts = dict[
    Key, dict[str, Any]
]  # what a block is made of -> kind -> why it is refused, or "" where it holds


def checked(
    model: nn.Module, entries: Sequence[ResolvedSite], *, again: bool = False
) -> tuple[list[ResolvedSite], dict[Site, str]]:
    """The sites of a model that hold, and why the others do not.

    The first question about a model runs it once on made-up inputs (twice where it has routers), in eval mode, without
    gradients, hooks or a trace in the random state. ``again`` asks anew about what did not hold. A model whose inputs
    cannot be made up is looked at in its first call (``tdgeom.model.calls.first_call``).
    """
    facts: Facts = verified(model).setdefault("structure", {})
    keys = block_keys(model, entries)
    known = {key for key, kinds in facts.items() if not again or not any(map(_is_reason, kinds.values()))}
    if {key for key in keys.values() if key is not None} - known:
        facts.update(_look(model, entries, keys))
    held: list[ResolvedSite] = []
    refused: dict[Site, str] = {}
    for entry in entries:
        is_embed = entry.site.kind == "embed"  # what the first block is given
        key = keys.get((entry.site.stack, 0 if is_embed else entry.site.layer))
        found = {} if key is None else facts.get(key, {})
        reason = found.get("residual_input" if is_embed else entry.site.kind)
        if _is_reason(reason):
            refused[entry.site] = str(reason)
        elif entry.site.kind == "residual_output" and "element" in found:
            held.append(replace(entry, element=found["element"]))
        else:
            held.append(entry)
    return held, refused


def _is_reason(found: Any) -> bool:
    return isinstance(found, str) and found != PASSED


class SiteRefused(ValueError, RuntimeError):
    """A site that is named as if the model had it, and is something else there."""


def refusal(model: nn.Module, reasons: Mapping[Site, str]) -> SiteRefused:
    """The error for sites that do not hold."""
    by_reason: dict[str, list[Site]] = {}
    for site, reason in reasons.items():
        by_reason.setdefault(reason, []).append(site)
    sites = next(iter(by_reason.values()))
    reason = next(iter(by_reason))
    layers = sorted({site.layer for site in sites if site.layer is not None})
    where = f" at the layers {layers}" if layers else ""
    remedy = (
        ""
        if "Remedy: " in reason
        else " Remedy: name the module that you mean, sites='module_output:<path>'; available_sites(model) lists what holds."
    )
    return SiteRefused(
        f"{sites[0].kind!r} of {type(model).__name__} is not where its structure says{where}: {reason}.{remedy}"
    )


def moves_choice(model: nn.Module, entry: ResolvedSite) -> bool | None:
    """Whether an edit of a router's logits changes what it chooses; ``None`` where no pass could tell."""
    key = block_keys(model, [entry]).get((entry.site.stack, entry.site.layer))
    return verified(model).get("structure", {}).get(key, {}).get(MOVED)


def block_keys(model: nn.Module, entries: Sequence[ResolvedSite]) -> dict[tuple, Key]:
    """(stack, layer) -> what the block is made of: classes, shapes, and the parameters of its own as they are now."""
    made: dict[str, Key] = {}
    keys: dict[tuple, Key] = {}
    for entry in entries:
        path, place = entry.block_path, (entry.site.stack, entry.site.layer)
        if path is None or entry.site.layer is None or place in keys:
            continue
        if path not in made:
            made[path] = _made_of(model.get_submodule(path))
        keys[place] = (entry.site.stack, made[path])
    return keys


def _made_of(block: nn.Module) -> Key:
    tree = module_tree(block)
    known = _MADE_OF.get(block)
    if known is None or known[0] != tree:
        parts = [(n, type(m), tuple((k, tuple(p.shape)) for k, p in m._parameters.items() if p is not None))
                 for n, m in block.named_modules()]  # fmt: skip
        known = _MADE_OF[block] = tree, tuple(parts)
    # what it may scale by, as it is now
    flags = tuple(
        (n, v)
        for n, v in list(vars(block).items())  # another thread may enter a context meanwhile
        if isinstance(v, bool | str | float) and n != "training" and n[0] != "_"
    )
    scales = (*block._parameters.values(), *block._buffers.values())
    own = tuple(t._version for t in scales if t is not None and not t.is_inference())
    return (known[1], flags, own)


# ------------------------------------------------------------------------------------------------ the tiny pass


def _look(model: nn.Module, entries: Sequence[ResolvedSite], keys: Mapping[tuple, Key]) -> Facts:
    signature, modules = read_signature(model), list(model.modules())
    if not may_stop(modules) or any(p.is_meta for p in model.parameters()):
        return {}
    given = made_up_inputs(model, signature, _BATCH, _LENGTH)
    if given is None:
        return {}
    tokens = "input_ids" in given
    return look(model, entries, keys, _with_different_tokens(model, given), _BATCH, tokens=tokens) or (
        look(model, entries, keys, given, _BATCH, tokens=tokens) if tokens else {}
    )


def _with_different_tokens(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs with tokens that differ, of those that the model has embeddings for."""
    ids = given.get("input_ids")
    try:
        rows = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return dict(given)
    if not isinstance(ids, torch.Tensor) or not isinstance(rows, int):
        return dict(given)
    different = (3 + torch.arange(ids.numel(), device=ids.device)).reshape(ids.shape) % rows
    return {**given, **{name: different for name in ("input_ids", "decoder_input_ids") if name in given}}


def look(
    model: nn.Module,
    entries: Sequence[ResolvedSite],
    keys: Mapping[tuple, Key],
    given: Mapping[str, Any],
    batch: int,
    *,
    tokens: bool,
) -> Facts:
    """What a pass on ``given`` shows of each class of blocks; nothing where the model does not take these inputs."""
    reads = _one_of_each(model, entries, keys)
    stacks = [StackReads(model, stack, entries) for stack in dict.fromkeys(stack for stack, _ in reads)]
    if not _run(model, given, [*reads.values(), *stacks]):
        return {}
    facts: Facts = {}
    anything = any(read.ran for read in reads.values())
    for (stack, _), read in reads.items():
        key = keys[stack, next(iter(read.entries.values())).site.layer]
        found: dict[str, Any] = {kind: PASSED for kind in read.entries}
        if anything and not read.ran and not any(r.ran for (s, _), r in reads.items() if s == stack):
            pass  # another part of the model: its first call will tell
        elif strange := (strange_stream(read, batch) if tokens else None):
            found |= dict.fromkeys([kind for kind in read.entries if kind in STREAM_KINDS], strange)
        elif strange := (other_positions(read, batch, _LENGTH) if tokens else None):
            found |= dict.fromkeys(read.entries, strange)
        found |= {kind: reason for kind, reason in refusals(read).items() if not found[kind]}
        facts[key] = found
    for order in stacks:
        reason, elements = order.judge()
        for place, key in keys.items():
            if place[0] == order.stack and key in facts:
                if reason is not None and not any(
                    _adds(kinds) for k, kinds in facts.items() if k[0] == order.stack
                ):
                    facts[key] |= dict.fromkeys([kind for kind in facts[key] if kind in STREAM_KINDS], reason)
                if (element := elements.get(type(order.blocks[place[1]]))) is not None:
                    facts[key]["element"] = element
    if not anything:
        reason = "none of its blocks was called in a pass of the model"
        return {key: dict.fromkeys(kinds, reason) for key, kinds in facts.items()}
    routers = [read for read in reads.values() if "router_choice" in read.values]
    if routers:
        with moved_logits(model, routers) as moved:
            _run(model, given, [])
        for read, moves in zip(routers, moved, strict=True):
            entry = next(iter(read.entries.values()))
            facts[keys[entry.site.stack, entry.site.layer]][MOVED] = moves
    return facts


def _adds(kinds: Mapping[str, Any]) -> bool:
    """Whether a block was seen to add to the stream: then it has one, whatever the model does between blocks."""
    return any(kinds.get(kind) == PASSED for kind in ADDED_KINDS)


def _one_of_each(
    model: nn.Module, entries: Sequence[ResolvedSite], keys: Mapping[tuple, Key]
) -> dict[tuple, BlockReads]:
    layers: dict[tuple, dict[str, ResolvedSite]] = {}
    for entry in entries:
        place = (entry.site.stack, entry.site.layer)
        if place in keys and entry.call == 0:
            layers.setdefault(place, {})[entry.site.kind] = entry
    reads: dict[tuple, BlockReads] = {}
    for place, kinds in layers.items():
        reads.setdefault((place[0], keys[place]), BlockReads(model, kinds))
    return reads


def _run(model: nn.Module, given: Mapping[str, Any], looks: Sequence[Any]) -> bool:
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    devices = [home] if home.type == "cuda" else []
    with ExitStack() as stack:
        for inside in (
            eval_mode(list(model.modules())),
            without_hooks(model),
            visible_attention(model),
            torch.random.fork_rng(devices=devices),
            steady(home),
            torch.no_grad(),
        ):
            stack.enter_context(inside)
        try:
            for one in looks:
                stack.callback(one.close)
                one.open()
            model(**given)
        except Exception:  # wants other inputs: the user's own call will say what is wrong with them
            return False
    return True


def followers(places: Places) -> Iterator[tuple[ResolvedSite, str, nn.Module]]:
    """Modules that may still transform what a block adds: the site, and each other part of its stack's first block."""
    watched: set[tuple] = set()
    for entry in places.sites:
        key = (entry.site.stack, entry.site.kind)
        if entry.site.kind not in ADDED_KINDS or entry.call or key in watched:
            continue
        watched.add(key)
        leave, block = entry.module_path, entry.block_path or ""
        for name, module in places.module(block).named_modules():
            path = join(block, name)
            related = path.startswith(leave + ".") or leave.startswith(path + ".") or path == leave
            if name and not related and not is_neutral(module):
                yield entry, path, module
