"""The heads of one attention module: its projections, found from names of its own layers and their widths."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from tdgeom.model.structure.linears import features, linears
from tdgeom.model.structure.views import HeadSlice

_QUERY = re.compile(r"(to_)?w?q(uery)?(_?(proj|lin|layer|w))?", re.I)
_KEY = re.compile(r"(to_)?w?k(ey)?(_?(proj|lin|layer|w))?", re.I)
_VALUE = re.compile(r"(to_)?w?v(alue)?(_?(proj|lin|layer|w))?", re.I)
_FUSED = re.compile(r"c_attn|query_key_value|(to_|attn_|w)?qkv(_proj)?|in_proj", re.I)
# the one layout that is laid out head by head: all queries of a key/value head, its key, its value
_BY_HEAD = re.compile(r"query_key_value", re.I)
# what an attention ends in; other linear layers beside it are gates, relative positions, adapters
_OUTPUT = re.compile(
    r"(to_|attn_|attention_)?o(ut)?(put)?(_?(proj|projection|lin|linear|layer))?|wo|c_proj|dense|proj", re.I
)
_ASIDE = re.compile(r"gate|(^|[._])g_proj|pos|rel|bias|adapter|lora", re.I)
_DIMS = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim", "d_kv", "dim_per_head")
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads", "nhead", "heads")


@dataclass(frozen=True)
class Heads:
    """Where the heads of an attention module are: paths relative to it, and how they lie in the features."""

    output: str
    count: int
    key_value: int
    dim: int  # of a value head
    slices: dict[str, tuple[str, HeadSlice]]


def find_heads(attention: nn.Module, core: nn.Module) -> Heads | None:
    """The projections of ``attention``, whose forward that computes the pattern is ``core``; ``None`` if unknown.

    Query, key and value are layers of their own or one fused layer; the output projection is the last other linear
    layer (of those called so, where there are some), and its input width is what all value heads give.
    """
    if isinstance(core, nn.MultiheadAttention):  # reads its weights without calling its layers
        return None
    linear = list(linears(attention))
    named = {
        role: [(path, m) for path, m in linear if pattern.fullmatch(path.rpartition(".")[2])]
        for role, pattern in (("q", _QUERY), ("k", _KEY), ("v", _VALUE), ("qkv", _FUSED))
    }
    inner = {path for entries in named.values() for path, _ in entries}
    rest = [(path, module) for path, module in linear if path not in inner]
    separate = all(len(named[role]) == 1 for role in "qkv")
    if not rest or not (separate or len(named["qkv"]) == 1):
        return None
    rest = [e for e in rest if _OUTPUT.fullmatch(e[0].rpartition(".")[2])] or rest
    output, projection = ([e for e in rest if not _ASIDE.search(e[0])] or rest)[-1]
    count, dim = _count(core, features(projection)[0])
    if count is None:
        return None
    if separate:
        slices = _separate(named, count)
    else:
        slices = _fused(*named["qkv"][0], count, dim)
    if slices is None or "v" not in slices:
        return None
    return Heads(output, count, slices["v"][1].heads, dim, slices)


def head_count(core: nn.Module) -> int | None:
    """How many query heads an attention module says that it has, or its configuration; ``None`` if neither does."""
    config = getattr(core, "config", None)
    counts = [getattr(o, n) for o in (core, config) for n in _COUNTS if isinstance(getattr(o, n, None), int)]
    return next((count for count in counts if count > 0 and not isinstance(count, bool)), None)


def _count(core: nn.Module, width: int) -> tuple[int | None, int]:
    dims = [getattr(core, name) for name in _DIMS if isinstance(getattr(core, name, None), int)]
    config = getattr(core, "config", None)
    counts = [getattr(o, n) for o in (core, config) for n in _COUNTS if isinstance(getattr(o, n, None), int)]
    for count in counts:
        if count > 0 and width % count == 0 and (not dims or width // count in dims):
            return count, width // count
    for dim in dims:
        if dim > 0 and width % dim == 0:
            return width // dim, dim
    return None, 0


def _separate(named: dict, count: int) -> dict[str, tuple[str, HeadSlice]] | None:
    slices = {}
    query = features(named["q"][0][1])[1]
    if query % count:
        return None
    for role in "qkv":
        path, module = named[role][0]
        width = features(module)[1]
        # query and key heads are equally wide; value heads may not be
        dim = query // count
        if width % dim == 0:
            slices[role] = (path, HeadSlice(1, width // dim, dim, 0, width // dim))
    return slices


def _fused(path: str, module: nn.Module, count: int, dim: int) -> dict[str, tuple[str, HeadSlice]] | None:
    width = features(module)[1]
    if width % dim or (width // dim - count) % 2 or width // dim <= count:
        return None
    total = width // dim
    kv = (total - count) // 2
    if count % kv:
        return None
    if _BY_HEAD.fullmatch(path.rpartition(".")[2]):
        group = count // kv
        ranges = {"q": (0, group), "k": (group, group + 1), "v": (group + 1, group + 2)}
        return {role: (path, HeadSlice(kv, group + 2, dim, a, b)) for role, (a, b) in ranges.items()}
    ranges = {"q": (0, count), "k": (count, count + kv), "v": (count + kv, total)}
    return {role: (path, HeadSlice(1, total, dim, a, b)) for role, (a, b) in ranges.items()}
