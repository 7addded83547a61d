"""The parts of one block: where its attention, MLP and router receive and give their tensors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)", re.I)
_ATTENTION = re.compile(r"attn|attention", re.I)
_CROSS = re.compile(r"cross|encdec|encoder_?attn|encoder_?attention", re.I)
_MLP = re.compile(r"mlp|ffn|feed_?forward|(^|_)ffw?(_|$)|moe|layerff|denserelu|denseact|densegated", re.I)
_ROUTER = re.compile(r"router", re.I)


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
    return bool(_NORM.search(name)) and not any(True for _ in module.children()) and size_of(module) > 0


def find_parts(block: nn.Module) -> dict[str, Place]:
    """Where a block's attention, MLP and router receive and give their tensors, paths relative to the block.

    Outputs are what is added to the residual stream: behind a norm that belongs to the branch, inside a
    module that adds the stream itself, times the block's residual multiplier. A part that cannot be told
    apart (two MLPs side by side, no attention) is absent.
    """
    parts: dict[str, Place] = {}
    multiplier = getattr(block, "residual_multiplier", 1.0)
    scale = float(multiplier) if isinstance(multiplier, int | float) else 1.0
    children = list(_children(block))
    attention = [(path, module) for path, module in children if _is_attention(path, module)]
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


def is_neutral(module: nn.Module) -> bool:
    """Dropout and identity: what passes through them in eval mode is unchanged."""
    kind = type(module).__name__.lower()
    return "drop" in kind or "identity" in kind


def _children(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in block.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential) and not _MLP.search(name):
            yield from ((join(name, inner), grandchild) for inner, grandchild in child.named_children())
        else:
            yield name, child


def _is_attention(path: str, module: nn.Module) -> bool:
    name, kind = path.rpartition(".")[2], type(module).__name__
    if is_norm(name, module) or "drop" in name.lower() or _CROSS.search(name) or _CROSS.search(kind):
        return False
    if not any(True for _ in module.children()) or not size_of(module):
        return False
    return bool(_ATTENTION.search(name) or _ATTENTION.search(kind))


def _attention_core(path: str, module: nn.Module) -> str:
    for name, child in module.named_children():
        if _ATTENTION.search(type(child).__name__) and _is_attention(name, child):
            return _attention_core(join(path, name), child)
    return path


def _attention_exit(path: str, module: nn.Module, core: str) -> str:
    if core == path:
        return _inner_exit(path, module)
    own = core[len(path) + 1 :].split(".")[0]
    names = list(dict(module.named_children()))
    for name in names[names.index(own) + 1 :]:
        child = module.get_submodule(name)
        if size_of(child) and not is_norm(name, child):
            return _inner_exit(join(path, name), child)
    return core


def _inner_exit(path: str, module: nn.Module) -> str:
    """The module itself, or its last linear layer where the module adds the stream to that."""
    if not adds_stream(module):
        return path
    linear = [name for name, child in module.named_modules() if name and _is_linear(child)]
    return join(path, linear[-1]) if linear else path


def _find_mlp(block: nn.Module, children: list[tuple[str, nn.Module]]) -> tuple[str, str] | None:
    rest = [
        (path, module)
        for path, module in children
        if size_of(module)
        and not is_norm(path.rpartition(".")[2], module)
        and not _is_attention(path, module)
        and not _CROSS.search(path.rpartition(".")[2] + type(module).__name__)
        and not _is_scale(path, module)
    ]
    named = [(p, m) for p, m in rest if _MLP.search(p.rpartition(".")[2]) or _MLP.search(type(m).__name__)]
    named = [(p, m) for p, m in named if any(True for _ in m.children())]
    if len(named) == 1:
        path, module = named[0]
        inner = [(n, c) for n, c in module.named_children() if size_of(c)]
        weighted = [(n, c) for n, c in inner if not is_norm(n, c)]
        if len(weighted) < len(inner) and len(weighted) == 1:  # the norm is inside: T5
            path, module = join(path, weighted[0][0]), weighted[0][1]
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
    named = _ROUTER.search(name) or _ROUTER.search(type(module).__name__)
    return bool(named) or (name == "gate" and size_of(module) > 0)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def size_of(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def join(path: str, name: str) -> str:
    """A child's path."""
    return f"{path}.{name}" if path else name
