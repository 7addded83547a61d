"""Finding the repeated blocks of a model from its structure alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from tdgeom.model.structure.module_roles import ATTENTION, has_weights, is_norm, join

# what a block of a transformer, or of a model like one, has inside
_WORKS = re.compile(
    r"attn|attention|mlp|ffn|feed_?forward|mixer|mamba|ssm|retention|moe|rwkv|linear_?(1|2)|fc_?(1|2)", re.I
)


@dataclass(frozen=True)
class Block:
    """One layer of a stack: ``call`` says which of its ``calls`` in one pass it is (weights may be shared)."""

    path: str
    module: nn.Module
    call: int = 0
    calls: int = 1


@dataclass(frozen=True)
class Stack:
    """A list of blocks that run one after the other; ``name`` is ``None`` where a model has only one."""

    name: str | None
    path: str
    blocks: tuple[Block, ...]


def find_stacks(model: nn.Module) -> list[Stack]:
    """The repeated blocks of a model: its outermost lists of like modules, in the order of registration.

    Lists of composite modules come before lists of single layers, lists with under a twentieth of the
    largest one's parameters (auxiliary heads) are left out, and experts are never blocks. Nor are lists side by side of
    which one holds the attentions of all layers and another what comes after them: there the block is a loop of the model's,
    and no module is one. An empty list means that the model repeats nothing.
    """
    composite: list[tuple[str, list[tuple[str, nn.Module]]]] = []
    plain: list[tuple[str, list[tuple[str, nn.Module]]]] = []
    _walk(model, "", composite, plain, set())
    lists = [entry for entry in composite if not _is_half(entry, composite)] if composite else plain
    if not lists:
        return []
    working = [entry for entry in lists if any(_transforms(module) for _, module in entry[1])]
    lists = working or lists  # beside blocks that attend or think, convolutions are a way in
    sizes = [sum(p.numel() for m in {m for _, m in blocks} for p in m.parameters()) for _, blocks in lists]
    kept = [entry for entry, size in zip(lists, sizes, strict=True) if size * 20 >= max(sizes)]
    names = _stack_names([path for path, _ in kept])
    return [
        Stack(name, path, _layers(model, blocks, alone=len(kept) == 1))
        for name, (path, blocks) in zip(names, kept, strict=True)
    ]


_Listed = tuple[str, list[tuple[str, nn.Module]]]


def _is_half(entry: _Listed, lists: Sequence[_Listed]) -> bool:
    """Whether a list holds a part of each layer, another part of which is in a list beside it."""
    path, blocks = entry
    beside = [
        other
        for other, modules in lists
        if other != path
        and other.rpartition(".")[0] == path.rpartition(".")[0]
        and len(modules) == len(blocks)
        and _attends(modules) != _attends(blocks)
        and type(modules[0][1]) is not type(blocks[0][1])
    ]
    return bool(beside)


def _attends(blocks: Sequence[tuple[str, nn.Module]]) -> bool:
    module = blocks[0][1]
    return any(
        ATTENTION.search(name.rpartition(".")[2] + type(m).__name__) for name, m in module.named_modules()
    )


def _transforms(module: nn.Module) -> bool:
    return any(
        _WORKS.search(name.rpartition(".")[2] + " " + type(m).__name__) for name, m in module.named_modules()
    )


def _walk(module: nn.Module, path: str, composite: list, plain: list, seen: set[int]) -> bool:
    if id(module) in seen:
        return False
    seen.add(id(module))
    if "expert" in path.rpartition(".")[2].lower():
        return False
    blocks, sure = _repeated(module)
    blocks = [(join(path, name), child) for name, child in blocks]
    deep = bool(blocks) and all(any(True for _ in child.children()) for _, child in blocks)
    if deep and sure:
        composite.append((path, blocks))
    elif blocks and not deep:
        plain.append((path, blocks))
    chosen = {id(child) for _, child in blocks} if sure else set()
    found = deep and sure
    for name, child in module.named_children():
        if id(child) not in chosen:
            found |= _walk(child, join(path, name), composite, plain, seen)
    if deep and not sure and not found:  # blocks of unlike classes, and nothing that repeats inside them
        composite.append((path, blocks))
        found = True
    return found


def _repeated(module: nn.Module) -> tuple[list[tuple[str, nn.Module]], bool]:
    """Children of a container that look like blocks, and whether that is sure (like classes)."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return [], False
    # _modules, not named_children: a block listed twice is two layers
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    weighted = [(name, child) for name, child in children if has_weights(child) and not is_norm("", child)]
    weighted = [(name, child) for name, child in weighted if not isinstance(child, nn.Embedding)]
    counts = Counter(type(child) for _, child in weighted)
    if not counts:
        return [], False
    if isinstance(module, nn.ModuleList):
        deep = all(any(True for _ in child.children()) for _, child in children)
        if deep:
            return children, len(counts) == 1 or max(counts.values()) > 1
    kind, most = max(counts.items(), key=lambda item: item[1])
    if most < 2 and not (isinstance(module, nn.ModuleList) and len(children) == 1):
        return [], False
    return [(name, child) for name, child in weighted if type(child) is kind], True


def _layers(model: nn.Module, blocks: list[tuple[str, nn.Module]], alone: bool) -> tuple[Block, ...]:
    """One entry a layer; a block that runs several times in one pass is several layers.

    Two ways of sharing are known: the same module listed twice, and a configuration that says that its layers
    are spread over ``num_hidden_groups`` blocks.
    """
    config = getattr(model, "config", None)
    depth, groups = getattr(config, "num_hidden_layers", None), getattr(config, "num_hidden_groups", None)
    if alone and groups == len(blocks) and isinstance(depth, int) and depth > len(blocks):
        blocks = [blocks[int(i / (depth / groups))] for i in range(depth)]
    if alone and groups is not None:
        blocks = [layer for path, module in blocks for layer in _inner_layers(path, module)]
    total, done = Counter(id(module) for _, module in blocks), Counter[int]()
    layers = []
    for path, module in blocks:
        layers.append(Block(path, module, done[id(module)], total[id(module)]))
        done[id(module)] += 1
    return tuple(layers)


def _inner_layers(path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers of a group that holds nothing but a list of them, or the block itself."""
    weighted = [(name, child) for name, child in module.named_children() if has_weights(child)]
    own = any(True for _ in module.parameters(recurse=False))
    if own or len(weighted) != 1 or not isinstance(weighted[0][1], nn.ModuleList):
        return [(path, module)]
    name, listed = weighted[0]
    inner = [(join(join(path, name), number), child) for number, child in listed.named_children()]
    return (
        inner
        if inner and all(any(True for _ in child.children()) for _, child in inner)
        else [(path, module)]
    )


def _stack_names(paths: list[str]) -> list[str | None]:
    if len(paths) <= 1:
        return [None] * len(paths)
    parts = [path.split(".") for path in paths]
    while len({p[0] for p in parts}) == 1 and all(len(p) > 1 for p in parts):
        parts = [p[1:] for p in parts]
    heads: list[str | None] = [p[0] for p in parts]
    return heads if len(set(heads)) == len(heads) else [".".join(p) for p in parts]


def find_final_norm(model: nn.Module, stack: Stack) -> str | None:
    """Path of the normalisation behind a stack: the nearest one beside the list or beside one of its owners."""
    inside = stack.path
    while inside:
        owner, _, own_name = inside.rpartition(".")
        children = list(model.get_submodule(owner).named_children())
        position = [name for name, _ in children].index(own_name)
        after = [(n, c) for n, c in children[position + 1 :] if has_weights(c)]
        # further out, a norm that is not what comes next belongs to a head
        after = after if inside == stack.path else after[:1]
        behind = [join(owner, n) for n, c in after if is_norm(n, c)]
        before = [
            join(owner, n) for n, c in children[:position] if is_norm(n, c) and re.search("final|last", n)
        ]
        if behind or before:
            return (behind or before)[0]
        inside = owner
    if isinstance(model, nn.Sequential) and not stack.path:
        last = stack.blocks[-1].path
        names = list(model._modules)  # a block listed twice has two names
        behind = [n for n in names[names.index(last) + 1 :] if is_norm("", model.get_submodule(n))]
        return behind[0] if behind else None
    return None
