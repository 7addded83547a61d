"""What a module is, by its class, its name and what it holds: a norm, an attention, an MLP, something that changes nothing."""

from __future__ import annotations

import inspect
import re

from torch import nn

from tdgeom.model.structure.linears import is_linear, linears

NORM = re.compile(r"norm|(^|_)ln(_|\d|$)", re.I)
ATTENTION = re.compile(r"attn|attention", re.I)
CROSS = re.compile(r"cross|encdec|encoder_?attn|encoder_?attention", re.I)
_PART = re.compile(r"(output|intermediate|attention|mlp|layer|block|embeddings|encoder|decoder|model)$", re.I)
MLP = re.compile(r"mlp|ffn|feed_?forward|(^|_)ffw?(_|$)|moe|layerff|denserelu|denseact|densegated", re.I)


def is_norm(name: str, module: nn.Module) -> bool:
    """A normalisation, by its class or, where the class does not say, by its attribute's name."""
    kind = type(module).__name__
    if NORM.search(kind):
        # a block and its parts may be named after its norms; a norm that depends on something else has one layer for that
        inner = sum(1 for _ in linears(module))
        return inner == 0 or (inner == 1 and not _PART.search(kind))
    return bool(NORM.search(name)) and not any(True for _ in module.children()) and has_weights(module)


def is_attention(path: str, module: nn.Module) -> bool:
    """An attention over the block's own sequence."""
    name = path.rpartition(".")[2]
    if not attends(path, module) or CROSS.search(name):
        return False
    return "self" in name.lower() or not CROSS.search(type(module).__name__)


def is_cross_attention(path: str, module: nn.Module) -> bool:
    """An attention over another sequence."""
    return attends(path, module) and not is_attention(path, module)


def attends(path: str, module: nn.Module) -> bool:
    """An attention, over whatever."""
    name, kind = path.rpartition(".")[2], type(module).__name__
    if is_norm(name, module) or "drop" in name.lower():
        return False
    if not any(True for _ in module.children()) or not has_weights(module):
        return False
    return bool(ATTENTION.search(name) or ATTENTION.search(kind))


def is_scale(path: str, module: nn.Module) -> bool:
    """A learned scale of a branch."""
    return bool(re.search(r"layer_?scale", path.rpartition(".")[2] + " " + type(module).__name__, re.I))


def is_neutral(module: nn.Module) -> bool:
    """Dropout and identity: what passes through them in eval mode is unchanged."""
    kind = type(module).__name__.lower()
    return "drop" in kind or "identity" in kind


def adds_stream(module: nn.Module) -> bool:
    """Whether a module takes the residual stream as a second input and adds it itself."""
    return bool({"residual", "input_tensor"} & set(inspect.signature(module.forward).parameters))


def has_cross_attention(block: nn.Module) -> bool:
    """Whether a block also attends to another sequence."""
    return any(CROSS.search(name) for name, _ in block.named_modules())


def has_weights(module: nn.Module) -> bool:
    """Whether a module has parameters, or layers that keep theirs packed."""
    return any(p.numel() for p in module.parameters()) or any(map(is_linear, module.modules()))


def join(path: str, name: str) -> str:
    """The path of what lies at ``name`` inside ``path``; either may be empty."""
    return f"{path}.{name}" if path and name else path or name


def module_tree(root: nn.Module) -> list[tuple[str, type, nn.Module]]:
    """Every module below a root with its name and class, in order: equal where nothing was put in another's place."""
    found: list[tuple[str, type, nn.Module]] = []
    waiting = [root]
    seen: set[int] = set()
    while waiting:
        for name, child in waiting.pop()._modules.items():
            if child is not None:
                found.append((name, type(child), child))
                if id(child) not in seen:
                    seen.add(id(child))
                    waiting.append(child)
    return found
