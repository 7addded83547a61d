"""The parts of a block's attention, over its own sequence or another one: inputs, heads, patterns, what is added."""

from __future__ import annotations

from torch import nn

from tdgeom.model.structure.heads import find_heads, head_count
from tdgeom.model.structure.linears import linears
from tdgeom.model.structure.module_roles import (
    ATTENTION,
    adds_stream,
    attends,
    has_weights,
    is_norm,
    join,
)
from tdgeom.model.structure.views import HeadOutput, HeadSlice, HeadsSecond, Part, Pattern


def attention_parts(
    block: nn.Module, path: str, module: nn.Module, after: str | None, scale: float
) -> dict[str, Part]:
    """Where the attention at ``path`` receives and gives; ``after`` is the norm or scale behind it, paths are the block's."""
    core = attention_core(path, module)
    parts = {"attn_input": Part(core, "input")}
    parts["attn_output"] = Part(after or _exit(path, module, core), "output", scale)
    return {**parts, **_head_parts(block, path, core, after, scale)}


def cross_parts(block: nn.Module, path: str, module: nn.Module, scale: float) -> dict[str, Part]:
    """The same of an attention to another sequence, under names of their own."""
    own = attention_parts(block, path, module, None, scale)
    own = {kind: part for kind, part in own.items() if not kind.endswith("_rotary")}
    return {f"cross_{kind}": part for kind, part in own.items()}


def attention_core(path: str, module: nn.Module) -> str:
    """The innermost attention module, in whose forward the pattern is computed."""
    for name, child in module.named_children():
        if ATTENTION.search(type(child).__name__) and attends(name, child):
            return attention_core(join(path, name), child)
    return path


def inner_exit(path: str, module: nn.Module) -> str:
    """The module itself, or its last linear layer where the module adds the stream to that."""
    if not adds_stream(module):
        return path
    linear = [name for name, _ in linears(module)]
    return join(path, linear[-1]) if linear else path


def _exit(path: str, module: nn.Module, core: str) -> str:
    if core == path:
        return inner_exit(path, module)
    own = core[len(path) + 1 :].split(".")[0]
    names = list(dict(module.named_children()))
    for name in names[names.index(own) + 1 :]:
        child = module.get_submodule(name)
        if has_weights(child) and not is_norm(name, child):
            return inner_exit(join(path, name), child)
    return core


def _head_parts(block: nn.Module, path: str, core: str, after: str | None, scale: float) -> dict[str, Part]:
    attention, inner = block.get_submodule(path), block.get_submodule(core)
    parts: dict[str, Part] = {}
    if isinstance(inner, nn.MultiheadAttention):  # computes in one call that nobody can look into
        return parts
    heads = find_heads(attention, inner)
    count = head_count(inner) if heads is None else heads.count
    if count is not None:  # the softmax inside tells of its own, whatever the projections are
        for kind, side in (("attn_scores", "scores"), ("attn_pattern", "pattern")):
            parts[kind] = Part(core, side, 1.0, Pattern(count))
        for kind, side in (("q_rotary", "queries"), ("k_rotary", "keys")):
            parts[kind] = Part(core, side, 1.0, HeadsSecond(count))
    if heads is None:
        return parts
    groups = heads.count // heads.key_value
    for role, (name, view) in heads.slices.items():
        parts[role] = Part(join(path, name), "output", 1.0, view, 1 if role == "q" else groups)
    output = join(path, heads.output)
    whole = HeadSlice(1, heads.count, heads.dim, 0, heads.count)
    parts["z"] = Part(output, "input", 1.0, whole)
    behind = block.get_submodule(after) if after else None
    norm = behind is not None and is_norm(after or "", behind)
    if not (norm and isinstance(behind, nn.LayerNorm)):  # a norm that centres leaves no share to a head
        shares = HeadOutput(block.get_submodule(output), heads.count, behind, norm)
        parts["head_output"] = Part(output, "output", scale, shares)
    return parts
