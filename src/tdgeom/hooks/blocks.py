"""Finding the repeated blocks of a model, and the parts of a block, from structure alone."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)", re.I)
_ATTENTION = re.compile(r"attn|attention", re.I)
_CROSS = re.compile(r"cross|encdec|encoder_?attn|encoder_?attention", re.I)
_MLP = re.compile(r"mlp|ffn|feed_?forward|(^|_)ffw?(_|$)|moe|layerff|denserelu|denseact|densegated", re.I)
_ROUTER = re.compile(r"router", re.I)
_NEUTRAL = re.compile(r"drop|identity|activation|act_fn|gelu|relu|silu", re.I)


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


@dataclass(frozen=True)
class Place:
    """A module path, the side of the module, and what its tensor is multiplied by before it is used."""

    path: str
    side: str
    scale: float = 1.0


def is_norm(name: str, module: nn.Module) -> bool:
    """A normalisation, by its class or, where the class does not say, by its attribute's name."""
    if _NORM.search(type(module).__name__):
        return True
    return bool(_NORM.search(name)) and not any(True for _ in module.children()) and _parameters(module) > 0


# --------------------------------------------------------------------------------------------- stacks


def find_stacks(model: nn.Module) -> list[Stack]:
    """The repeated blocks of a model: its outermost lists of like modules, in the order of registration.

    Lists of composite modules come before lists of single layers, lists with under a twentieth of the
    largest one's parameters (auxiliary heads) are left out, and experts are never blocks. An empty list means
    that the model repeats nothing.
    """
    composite: list[tuple[str, list[tuple[str, nn.Module]]]] = []
    plain: list[tuple[str, list[tuple[str, nn.Module]]]] = []
    _walk(model, "", composite, plain, set())
    lists = composite or plain
    sizes = [sum(_parameters(m) for m in {id(m): m for _, m in blocks}.values()) for _, blocks in lists]
    kept = [entry for entry, size in zip(lists, sizes, strict=True) if size * 20 >= max(sizes)]
    names = _stack_names([path for path, _ in kept])
    return [
        Stack(name, path, _layers(model, blocks, alone=len(kept) == 1))
        for name, (path, blocks) in zip(names, kept, strict=True)
    ]


def _walk(module: nn.Module, path: str, composite: list, plain: list, seen: set[int]) -> bool:
    if id(module) in seen:
        return False
    seen.add(id(module))
    if "expert" in path.rpartition(".")[2].lower():
        return False
    blocks, sure = _repeated(module)
    blocks = [(_join(path, name), child) for name, child in blocks]
    deep = bool(blocks) and all(any(True for _ in child.children()) for _, child in blocks)
    if deep and sure:
        composite.append((path, blocks))
    elif blocks and not deep:
        plain.append((path, blocks))
    chosen = {id(child) for _, child in blocks} if sure else set()
    found = deep and sure
    for name, child in module.named_children():
        if id(child) not in chosen:
            found |= _walk(child, _join(path, name), composite, plain, seen)
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
    weighted = [(name, child) for name, child in children if _parameters(child) and not is_norm("", child)]
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
    total, done = Counter(id(module) for _, module in blocks), Counter()
    layers = []
    for path, module in blocks:
        layers.append(Block(path, module, done[id(module)], total[id(module)]))
        done[id(module)] += 1
    return tuple(layers)


def _stack_names(paths: list[str]) -> list[str | None]:
    if len(paths) <= 1:
        return [None] * len(paths)
    parts = [path.split(".") for path in paths]
    while len({p[0] for p in parts}) == 1 and all(len(p) > 1 for p in parts):
        parts = [p[1:] for p in parts]
    heads = [p[0] for p in parts]
    return heads if len(set(heads)) == len(heads) else [".".join(p) for p in parts]


def find_final_norm(model: nn.Module, stack: Stack) -> str | None:
    """Path of the normalisation behind a stack: the nearest one beside the list or beside one of its owners."""
    inside = stack.path
    while inside:
        owner, _, own_name = inside.rpartition(".")
        children = list(model.get_submodule(owner).named_children())
        position = [name for name, _ in children].index(own_name)
        after = [(n, c) for n, c in children[position + 1 :] if _parameters(c)]
        # further out, a norm that is not what comes next belongs to a head
        after = after if inside == stack.path else after[:1]
        behind = [_join(owner, n) for n, c in after if is_norm(n, c)]
        before = [
            _join(owner, n) for n, c in children[:position] if is_norm(n, c) and re.search("final|last", n)
        ]
        if behind or before:
            return (behind or before)[0]
        inside = owner
    if isinstance(model, nn.Sequential) and not stack.path:
        last = stack.blocks[-1].path
        names = list(dict(model.named_children()))
        behind = [n for n in names[names.index(last) + 1 :] if is_norm("", model.get_submodule(n))]
        return behind[0] if behind else None
    return None


# -------------------------------------------------------------------------------------- parts of a block


def find_parts(block: nn.Module) -> dict[str, Place]:
    """Where a block's attention, MLP and router receive and give their tensors, paths relative to the block.

    Outputs are what is added to the residual stream: behind a norm that belongs to the branch, inside a
    module that adds the stream itself, times the block's residual multiplier. A part that cannot be told apart (two MLPs
    side by side, no attention) is absent.
    """
    parts: dict[str, Place] = {}
    multiplier = getattr(block, "residual_multiplier", 1.0)
    scale = float(multiplier) if isinstance(multiplier, int | float) else 1.0
    children = list(_children(block))
    attention = _outermost(children, _is_attention)
    attention_after, mlp_after = _branch_ends(block)
    if len(attention) == 1:
        path, module = attention[0]
        core = _attention_core(path, module)
        parts["attn_input"] = Place(core, "input")
        parts["attn_output"] = Place(attention_after or _attention_exit(path, module, core), "output", scale)
    mlp = _find_mlp(block, children)
    if mlp is not None:
        entry, leave = mlp
        parts["mlp_input"] = Place(entry, "input")
        parts["mlp_output"] = Place(mlp_after or leave, "output", scale)
    routers = [path for path, module in block.named_modules() if path and _is_router(path, module)]
    routers = [path for path in routers if not any(path.startswith(other + ".") for other in routers)]
    if len(routers) == 1:
        parts["router_logits"] = Place(routers[0], "output")
    return parts


def adds_stream(module: nn.Module) -> bool:
    """Whether a module takes the residual stream as a second input and adds it itself."""
    return bool({"residual", "input_tensor"} & set(inspect.signature(module.forward).parameters))


def is_neutral(name: str, module: nn.Module) -> bool:
    """Dropout and identity: what passes through them in eval mode is unchanged."""
    return (
        isinstance(module, nn.Identity)
        or "drop" in type(module).__name__.lower()
        or "Identity" in type(module).__name__
    )


def _children(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in block.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential) and not _MLP.search(name):
            yield from ((_join(name, inner), grandchild) for inner, grandchild in child.named_children())
        else:
            yield name, child


def _is_attention(path: str, module: nn.Module) -> bool:
    name, kind = path.rpartition(".")[2], type(module).__name__
    if is_norm(name, module) or "drop" in name.lower() or _CROSS.search(name) or _CROSS.search(kind):
        return False
    if not any(True for _ in module.children()) or not _parameters(module):
        return False
    return bool(_ATTENTION.search(name) or _ATTENTION.search(kind))


def _outermost(children: list[tuple[str, nn.Module]], test) -> list[tuple[str, nn.Module]]:
    return [(path, module) for path, module in children if test(path, module)]


def _attention_core(path: str, module: nn.Module) -> str:
    for name, child in module.named_children():
        if _ATTENTION.search(type(child).__name__) and _is_attention(name, child):
            return _attention_core(_join(path, name), child)
    return path


def _attention_exit(path: str, module: nn.Module, core: str) -> str:
    if core == path:
        return _inner_exit(path, module)
    own = core[len(path) + 1 :].split(".")[0]
    names = list(dict(module.named_children()))
    for name in names[names.index(own) + 1 :]:
        child = module.get_submodule(name)
        if _parameters(child) and not is_norm(name, child):
            return _inner_exit(_join(path, name), child)
    return core


def _inner_exit(path: str, module: nn.Module) -> str:
    """The module itself, or its last linear layer where the module adds the stream to that."""
    if not adds_stream(module):
        return path
    linear = [name for name, child in module.named_modules() if name and _is_linear(child)]
    return _join(path, linear[-1]) if linear else path


def _find_mlp(block: nn.Module, children: list[tuple[str, nn.Module]]) -> tuple[str, str] | None:
    rest = [
        (path, module)
        for path, module in children
        if _parameters(module)
        and not is_norm(path.rpartition(".")[2], module)
        and not _is_attention(path, module)
        and not _CROSS.search(path.rpartition(".")[2] + type(module).__name__)
        and not _is_scale(path, module)
    ]
    named = [(p, m) for p, m in rest if _MLP.search(p.rpartition(".")[2]) or _MLP.search(type(m).__name__)]
    named = [(p, m) for p, m in named if any(True for _ in m.children())]
    if len(named) == 1:
        path, module = named[0]
        inner = [(n, c) for n, c in module.named_children() if _parameters(c)]
        weighted = [(n, c) for n, c in inner if not is_norm(n, c)]
        if len(weighted) < len(inner) and len(weighted) == 1:  # the norm is inside: T5
            path, module = _join(path, weighted[0][0]), weighted[0][1]
        return path, _inner_exit(path, module)
    # no module of its own: the layers that stand in the block beside its attention (BERT, OPT)
    loose = not named and len(rest) >= 2 and any(_is_attention(p, m) for p, m in children)
    return (rest[0][0], _inner_exit(*rest[-1])) if loose else None


def _branch_ends(block: nn.Module) -> tuple[str | None, str | None]:
    """Norms or learned scales that a branch passes through before it is added to the stream.

    ``post_attention_layernorm`` is the MLP's own norm in most models. It belongs to the attention branch only
    where the block also has a norm behind its MLP, and none that names the attention more closely.
    """
    scales = [name for name, module in block.named_children() if _is_scale(name, module)]
    if len(scales) == 2:
        return scales[0], scales[1]
    norms = [name for name, module in block.named_children() if is_norm(name, module)]
    after_mlp = [n for n in norms if re.search(r"post_?(feed_?forward|ffn?|mlp)", n, re.I)]
    after_attention = [n for n in norms if re.search(r"post_?(self_?)?att", n, re.I)]
    if not after_mlp:
        return None, None
    closer = [n for n in after_attention if "self" in n.lower()]
    return next(iter(closer or after_attention), None), after_mlp[0]


def _is_scale(path: str, module: nn.Module) -> bool:
    return bool(re.search(r"layer_?scale", path.rpartition(".")[2] + " " + type(module).__name__, re.I))


def _is_router(path: str, module: nn.Module) -> bool:
    name = path.rpartition(".")[2]
    return (
        name == "gate"
        and _parameters(module) > 0
        or bool(_ROUTER.search(name) or _ROUTER.search(type(module).__name__))
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
