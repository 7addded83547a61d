"""The parts of one block: where its attention, MLP and router receive and give their tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from tdgeom.model.structure.attention_parts import attention_parts, cross_parts, inner_exit
from tdgeom.model.structure.linears import is_linear, linears
from tdgeom.model.structure.module_roles import (
    CROSS,
    MLP,
    adds_stream,
    has_cross_attention,
    has_weights,
    is_attention,
    is_cross_attention,
    is_neutral,
    is_norm,
    is_scale,
    join,
)
from tdgeom.model.structure.routers import router_parts
from tdgeom.model.structure.views import Part

__all__ = ["Part", "find_parts", "has_cross_attention", "has_weights", "is_neutral", "is_norm", "join"]

_QK = re.compile(r"(^|_)q?[qk]_?(layer)?_?norm|(query|key)_?(layer)?_?norm", re.I)
_DOWN = re.compile(r"down|out|(^|_)c_proj|fc2|^w2$|^wo$|4h_to_h|lin2", re.I)


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
    attention = [(path, module) for path, module in children if is_attention(path, module)]
    crossing = [(path, module) for path, module in children if is_cross_attention(path, module)]
    attention_after, mlp_after = _branch_ends(block)
    if len(attention) == 1:
        parts.update(attention_parts(block, *attention[0], attention_after, scale))
    if len(crossing) == 1:
        parts.update(cross_parts(block, *crossing[0], scale))
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
    return {**parts, **router_parts(block)}


def _children(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in block.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential) and not MLP.search(name):
            yield from ((join(name, inner), grandchild) for inner, grandchild in child.named_children())
        else:
            yield name, child


def _find_mlp(block: nn.Module, children: list[tuple[str, nn.Module]]) -> tuple[str, str] | None:
    rest = [
        (path, module)
        for path, module in children
        if has_weights(module)
        and not is_norm(path.rpartition(".")[2], module)
        and not is_attention(path, module)
        and not CROSS.search(path.rpartition(".")[2] + type(module).__name__)
        and not is_scale(path, module)
    ]
    named = [(p, m) for p, m in rest if MLP.search(p.rpartition(".")[2]) or MLP.search(type(m).__name__)]
    named = [(p, m) for p, m in named if any(True for _ in m.children())]
    if len(named) == 1:
        path, module = named[0]
        inner = [(n, c) for n, c in module.named_children() if has_weights(c)]
        weighted = [(n, c) for n, c in inner if not is_norm(n, c)]
        if len(weighted) < len(inner) and len(weighted) == 1:  # the norm is inside: T5
            path, module = join(path, weighted[0][0]), weighted[0][1]
        return path, inner_exit(path, module)
    # no module of its own: the layers that stand in the block beside its attention (BERT, OPT)
    loose = not named and len(rest) >= 2 and any(is_attention(p, m) for p, m in children)
    return (rest[0][0], inner_exit(*rest[-1])) if loose else None


def _branch_ends(block: nn.Module) -> tuple[str | None, str | None]:
    """Norms or learned scales that a branch passes through before it is added to the stream.

    ``post_attention_layernorm`` is the MLP's own norm in most models. It belongs to the attention branch only
    where the block also has a norm behind its MLP, and none that names the attention more closely.
    """
    scales = [name for name, module in block.named_children() if is_scale(name, module)]
    if len(scales) == 2:
        return scales[0], scales[1]
    norms = [name for name, module in block.named_children() if is_norm(name, module)]
    after_mlp = [n for n in norms if re.search(r"post_?(feed_?forward|ffn?|mlp)", n, re.I)]
    after_attention = [n for n in norms if re.search(r"post_?(self_?)?att", n, re.I)]
    if not after_mlp:
        return None, None
    closer = [n for n in after_attention if "self" in n.lower()]
    return next(iter(closer or after_attention), None), after_mlp[0]


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
    norms = [(p, m) for p, m in norms if not CROSS.search(p)]
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
        attention = [n for n, m in block.named_children() if is_attention(n, m)]
        return bool(attention) and names.index(first) == names.index(attention[0]) + 1 and "output" in second
    return False


def _find_neurons(block: nn.Module, entry: str, leave: str) -> str | None:
    """The MLP's last linear layer: its input are the neurons."""
    whole = block.get_submodule(leave)
    if is_linear(whole):
        return leave if entry != leave else None
    if any("expert" in name for name, _ in whole.named_modules()):
        return None
    linear = list(linears(whole))
    closing = [name for name, _ in linear if _DOWN.search(name.rpartition(".")[2])]
    ending = closing or ([linear[-1][0]] if len(linear) > 1 else [])
    return join(leave, ending[-1]) if ending else None
