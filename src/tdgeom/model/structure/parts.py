"""The parts of one block: where its attention, MLP and router receive and give their tensors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from tdgeom.model.structure.heads import find_heads, is_linear
from tdgeom.model.structure.views import HeadOutput, HeadSlice, Pattern, View

_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)", re.I)
_ATTENTION = re.compile(r"attn|attention", re.I)
_CROSS = re.compile(r"cross|encdec|encoder_?attn|encoder_?attention", re.I)
_MLP = re.compile(r"mlp|ffn|feed_?forward|(^|_)ffw?(_|$)|moe|layerff|denserelu|denseact|densegated", re.I)
_ROUTER = re.compile(r"router", re.I)
_QK = re.compile(r"(^|_)q?[qk]_?(layer)?_?norm|(query|key)_?(layer)?_?norm", re.I)
_DOWN = re.compile(r"down|out|(^|_)c_proj|fc2|^w2$|^wo$|4h_to_h|lin2", re.I)


@dataclass(frozen=True)
class Part:
    """A module path, the side of the module, and what its tensor is multiplied by before it is used.

    ``side`` is ``"input"``, ``"output"``, or ``"scores"`` and ``"pattern"`` for the softmax inside the module.
    ``groups`` is the number of query heads that share a head. ``bypass`` says that the residual stream also goes
    around the module, so that who edits here has to edit the block's output too.
    """

    path: str
    side: str
    scale: float = 1.0
    view: View | None = None
    groups: int = 1
    bypass: bool = False


def is_norm(name: str, module: nn.Module) -> bool:
    """A normalisation, by its class or, where the class does not say, by its attribute's name."""
    if _NORM.search(type(module).__name__):
        return True
    return bool(_NORM.search(name)) and not any(True for _ in module.children()) and has_weights(module)


def find_parts(block: nn.Module) -> dict[str, Part]:
    """Where a block's attention, MLP and router receive and give their tensors, paths relative to the block.

    Outputs are what is added to the residual stream: behind a norm that belongs to the branch, inside a
    module that adds the stream itself, times the block's residual multiplier. A part that cannot be told
    apart (two MLPs side by side, no attention) is absent.
    """
    parts: dict[str, Part] = {}
    multiplier = getattr(block, "residual_multiplier", 1.0)
    scale = float(multiplier) if isinstance(multiplier, int | float) else 1.0
    children = list(_children(block))
    attention = [(path, module) for path, module in children if _is_attention(path, module)]
    attention_after, mlp_after = _branch_ends(block)
    if len(attention) == 1:
        path, module = attention[0]
        core = _attention_core(path, module)
        parts["attn_input"] = Part(core, "input")
        parts["attn_output"] = Part(attention_after or _attention_exit(path, module, core), "output", scale)
        parts.update(_head_parts(block, path, core, attention_after, scale))
    mlp = _find_mlp(block, children)
    if mlp is not None:
        entry, leave = mlp
        parts["mlp_input"] = Part(entry, "input")
        parts["mlp_output"] = Part(mlp_after or leave, "output", scale)
        neurons = _find_neurons(block, entry, leave)
        if neurons is not None:
            parts["mlp_act"] = Part(neurons, "input")
    if len(attention) == 1 and mlp is not None:
        parts.update(_norm_parts(block, parts, attention[0][0]))
    routers = [path for path, module in block.named_modules() if path and _is_router(path, module)]
    routers = [path for path in routers if not any(path.startswith(other + ".") for other in routers)]
    if len(routers) == 1:
        parts["router_logits"] = Part(routers[0], "output")
    return parts


def adds_stream(module: nn.Module) -> bool:
    """Whether a module takes the residual stream as a second input and adds it itself."""
    return bool({"residual", "input_tensor"} & set(inspect.signature(module.forward).parameters))


def has_cross_attention(block: nn.Module) -> bool:
    """Whether a block also attends to another sequence."""
    return any(_CROSS.search(name) for name, _ in block.named_modules())


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
    if not any(True for _ in module.children()) or not has_weights(module):
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
        if has_weights(child) and not is_norm(name, child):
            return _inner_exit(join(path, name), child)
    return core


def _inner_exit(path: str, module: nn.Module) -> str:
    """The module itself, or its last linear layer where the module adds the stream to that."""
    if not adds_stream(module):
        return path
    linear = [name for name, child in module.named_modules() if name and is_linear(child)]
    return join(path, linear[-1]) if linear else path


def _find_mlp(block: nn.Module, children: list[tuple[str, nn.Module]]) -> tuple[str, str] | None:
    rest = [
        (path, module)
        for path, module in children
        if has_weights(module)
        and not is_norm(path.rpartition(".")[2], module)
        and not _is_attention(path, module)
        and not _CROSS.search(path.rpartition(".")[2] + type(module).__name__)
        and not _is_scale(path, module)
    ]
    named = [(p, m) for p, m in rest if _MLP.search(p.rpartition(".")[2]) or _MLP.search(type(m).__name__)]
    named = [(p, m) for p, m in named if any(True for _ in m.children())]
    if len(named) == 1:
        path, module = named[0]
        inner = [(n, c) for n, c in module.named_children() if has_weights(c)]
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
    return bool(named) or (name == "gate" and has_weights(module))


def _head_parts(block: nn.Module, path: str, core: str, after: str | None, scale: float) -> dict[str, Part]:
    attention, inner = block.get_submodule(path), block.get_submodule(core)
    parts: dict[str, Part] = {}
    heads = find_heads(attention, inner)
    if heads is None:
        return parts
    groups = heads.count // heads.key_value
    for role, (name, view) in heads.slices.items():
        parts[role] = Part(join(path, name), "output", 1.0, view, 1 if role == "q" else groups)
    for kind, side in (("attn_scores", "scores"), ("attn_pattern", "pattern")):
        parts[kind] = Part(core, side, 1.0, Pattern(heads.count))
    output = join(path, heads.output)
    whole = HeadSlice(1, heads.count, heads.dim, 0, heads.count)
    parts["z"] = Part(output, "input", 1.0, whole)
    behind = block.get_submodule(after) if after else None
    norm = behind is not None and is_norm(after or "", behind)
    if not (norm and isinstance(behind, nn.LayerNorm)):  # a norm that centres leaves no share to a head
        shares = HeadOutput(block.get_submodule(output), heads.count, behind, norm)
        parts["head_output"] = Part(output, "output", scale, shares)
    return parts


def _norm_parts(block: nn.Module, parts: dict[str, Part], attention: str) -> dict[str, Part]:
    """The stream between attention and MLP, and the outputs of the norms in front of (or behind) the two.

    In a block that normalises first, the stream after attention is what the second norm receives, or the MLP itself
    where nothing normalises before it; in a block that normalises last, what the norm behind attention receives.
    A block that runs attention and MLP side by side has no such place.
    """
    found: dict[str, Part] = {}
    branch = {name for name in _branch_ends(block) if name}
    norms = [(p, m) for p, m in block.named_modules() if p and is_norm(p.rpartition(".")[2], m)]
    norms = [(p, m) for p, m in norms if p not in branch and not _QK.search(p.rpartition(".")[2])]
    norms = [(p, m) for p, m in norms if not _CROSS.search(p)]
    inner = parts["mlp_input"].path
    # norms of queries and keys, of latents, or in front of the output projection are the attention's own
    core = parts["attn_input"].path
    norms = [(p, m) for p, m in norms if not p.startswith((inner + ".", core + "."))]
    norms.sort(key=lambda entry: "input" not in entry[0].rpartition(".")[2])  # one family registers it last
    if _is_parallel(block) or (len(norms) < 2 and not branch):
        if norms and not branch:
            found["attn_norm"] = Part(norms[0][0], "output")
        return found
    if not norms:
        return {"residual_mid": Part(inner, "input", bypass=True)}
    if len(norms) < 2:
        return found
    first, second = norms[0][0], norms[-1][0]
    found["attn_norm"], found["mlp_norm"] = Part(first, "output"), Part(second, "output")
    last = _normalises_last(block, first, second)
    found["residual_mid"] = Part(first if last else second, "input", bypass=not last)
    return found


def _is_parallel(block: nn.Module) -> bool:
    config = getattr(block, "config", None)
    names = ("use_parallel_residual", "parallel_residual", "parallel_attn", "parallel_attention_mlp")
    return any(getattr(owner, name, False) is True for owner in (block, config) for name in names)


def _normalises_last(block: nn.Module, first: str, second: str) -> bool:
    """Whether the norms stand behind attention and MLP: inside the module that adds the stream, or said so."""
    for flag in ("norm_first", "do_layer_norm_before", "normalize_before"):
        if isinstance(getattr(block, flag, None), bool):
            return not getattr(block, flag)
    owner = block.get_submodule(first.rpartition(".")[0])
    if owner is not block and adds_stream(owner):
        return True
    names = [name for name, _ in block.named_children()]
    if first in names and second in names:  # registered right behind what it normalises
        attention = [n for n, m in block.named_children() if _is_attention(n, m)]
        return bool(attention) and names.index(first) == names.index(attention[0]) + 1 and "output" in second
    return False


def _find_neurons(block: nn.Module, entry: str, leave: str) -> str | None:
    """The MLP's last linear layer: its input are the neurons."""
    whole = block.get_submodule(leave)
    if is_linear(whole):
        return leave if entry != leave else None
    if any("expert" in name for name, _ in whole.named_modules()):
        return None
    linear = [(name, m) for name, m in whole.named_modules() if name and is_linear(m)]
    closing = [name for name, _ in linear if _DOWN.search(name.rpartition(".")[2])]
    ending = closing or ([linear[-1][0]] if len(linear) > 1 else [])
    return join(leave, ending[-1]) if ending else None


def has_weights(module: nn.Module) -> bool:
    """Whether a module has parameters."""
    return any(p.numel() for p in module.parameters())


def join(path: str, name: str) -> str:
    """The path of what lies at ``name`` inside ``path``; either may be empty."""
    return f"{path}.{name}" if path and name else path or name
