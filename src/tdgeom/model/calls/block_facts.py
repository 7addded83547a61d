"""What a block computes, told from what one pass showed in it: for each kind of site, why it is not what its name says.

Nothing here runs a model. A kind passes where numbers show that it is what docs/models.md says of it; it is refused, with the
reason, where they show something else, or where they should show something and do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from tdgeom.core.devices import doubled
from tdgeom.model.calls.block_reads import BlockReads
from tdgeom.model.sites import PATTERN_KINDS
from tdgeom.model.structure.linears import bias_of
from tdgeom.model.structure.module_roles import has_cross_attention
from tdgeom.model.structure.resolved_site import ADDED_KINDS, ResolvedSite
from tdgeom.model.structure.views import HeadOutput, HeadSlice

_HEADS = {"z", "head_output", "q", "k", "v"}


def refusals(reads: BlockReads) -> dict[str, str]:
    """Kind -> why it is not offered in this block; empty for a block that did not run, or saw nothing but zeros."""
    if not reads.ran or not bool(reads.values["residual_input"].any()):
        return {}
    found = {}
    for kind, entry in reads.entries.items():
        reason = _layout(reads, kind) or _judge(reads, kind, entry)
        if reason is not None:
            found[kind] = reason
    return found


def _judge(reads: BlockReads, kind: str, entry: ResolvedSite) -> str | None:
    cross = "cross_" if kind.startswith("cross_") else ""
    own = kind.removeprefix("cross_")
    rule: Callable[[BlockReads, str, ResolvedSite], str | None] | None = {
        "attn_output": _added, "mlp_output": _added, "residual_mid": _middle, "z": _z, "head_output": _head_output,
        "v": _values, "q": _query_or_key, "k": _query_or_key, "q_rotary": _turned, "k_rotary": _turned,
        "attn_scores": _pattern, "attn_pattern": _pattern, "mlp_act": _neurons, "router_choice": _choice,
    }.get(own)  # fmt: skip
    if rule is None:
        return None
    if kind not in reads.values and own not in (
        "attn_scores",
        "attn_pattern",
        "q_rotary",
        "k_rotary",
        "router_choice",
    ):
        return f"{entry.module_path!r} was not called"
    return rule(reads, cross, entry)


# ------------------------------------------------------------------------------------------------- layout


def _layout(reads: BlockReads, kind: str) -> str | None:
    stream, value = reads.values["residual_input"], reads.values.get(kind)
    if (
        kind.startswith("cross_")
        or value is None
        or value.ndim < 3
        or stream.ndim < 3
        or kind.startswith("router")
    ):
        return None
    if kind.startswith("residual") or value.shape[0] in (stream.shape[0], stream.shape[0] * stream.shape[1]):
        return None
    if kind in PATTERN_KINDS and value.shape[0] == stream.shape[1]:  # batch first, whatever the stream is
        return None
    return f"it lies as {tuple(value.shape)} in a block whose stream is {tuple(stream.shape)}"


def strange_stream(reads: BlockReads, batch: int) -> str | None:
    """Why the stream of a block of tokens is no (B, T, D) (or (T, B, D), or (B T, D))."""
    stream = reads.values.get("residual_input")
    if stream is None or stream.ndim == 2 or (stream.ndim == 3 and batch in stream.shape[:2]):
        return None
    return f"the stream lies as {tuple(stream.shape)} for {batch} sequences, not as (B, T, D)"


def other_positions(reads: BlockReads, batch: int, length: int) -> str | None:
    """Why the positions of a block of tokens are not the tokens: padded inside, pooled, or several streams in one."""
    stream = reads.values.get("residual_input")
    if stream is None or stream.ndim != 3 or stream.shape[:2].numel() == batch * length:
        return None
    return f"the stream lies as {tuple(stream.shape)} for {batch} sequences of {length} tokens: its positions are not theirs"


# ------------------------------------------------------------------------------------ what is added to the stream


def same(found: Tensor, expected: Tensor, part: Tensor | None = None) -> bool:
    """Whether two tensors agree, to a fiftieth of ``part`` (what is in question; default: all of it) and rounding."""
    if found.numel() != expected.numel():
        return False
    found, target = doubled(found.detach().reshape(-1)), doubled(expected.detach().reshape(-1))
    size = float(target.abs().max()) if target.numel() else 0.0
    own = size if part is None else float(part.detach().abs().max())
    rounding = 8 * torch.finfo(expected.dtype).eps if expected.is_floating_point() else 0.0
    error = float((found - target).abs().max()) if target.numel() else 0.0
    return error <= 0.02 * own + rounding * size


def _sums(before: Tensor, added: Tensor, after: Tensor) -> bool:
    """Whether ``before + added`` is ``after``, whatever their leading axes."""
    if not before.numel() == added.numel() == after.numel():
        return False
    return same(before.reshape(-1) + added.reshape(-1), after, added)


def _streams(reads: BlockReads) -> list[Tensor]:
    """What may be the stream on its way through a block: its ends, and whatever its parts receive or norms give."""
    ends = [reads.values[kind] for kind in ("residual_input", "residual_output") if kind in reads.values]
    size = ends[0].numel()
    inside = [value for value in (*reads.takes.values(), *reads.gives.values()) if value.numel() == size]
    found: list[Tensor] = []
    for value in (*ends, *inside):
        flat = value.reshape(-1)
        if value.is_floating_point() and not any(torch.equal(flat, other) for other in found):
            found.append(flat)
    return found


def _parts(reads: BlockReads) -> Iterator[Tensor]:
    for kind in ADDED_KINDS:
        if kind in reads.values:
            yield reads.values[kind].reshape(-1)


def _added(reads: BlockReads, cross: str, entry: ResolvedSite) -> str | None:
    own = reads.values[entry.site.kind].reshape(-1)
    streams = [value for value in _streams(reads) if value.numel() == own.numel()]
    others = [
        torch.zeros_like(own),
        *(part for part in _parts(reads) if part.numel() == own.numel() and part is not own),
    ]
    sums = [own] + [own + other for other in others[1:] if not torch.equal(other, own)]
    for whole, (before, after) in product(sums, product(streams, streams)):
        if before is not after and same(before + whole, after, own):
            return None
    block = reads.block
    if any(True for _ in (*block.parameters(recurse=False), *block.buffers(recurse=False))):
        return (
            "the block scales it by a parameter of its own before it is added. Remedy: "
            f"'module_output:{entry.module_path}', scaled as the block does"
        )
    return (
        "it is not what is added to the stream: the block scales or transforms it first, or adds something else. Remedy: "
        f"'module_output:{entry.module_path}', and what the block does with it"
    )


def _middle(reads: BlockReads, cross: str, entry: ResolvedSite) -> str | None:
    read, names = (
        reads.values["residual_mid"],
        ("residual_input", "attn_output", "mlp_output", "residual_output"),
    )
    before, attention, mlp, after = (reads.values.get(name) for name in names)
    norm = reads.entries.get("attn_norm")
    remedy = "'module_input:<path>'"
    if norm is not None:
        remedy = f"'module_input:{norm.module_path}' where that norm stands behind the attention"
    if entry.bypass and has_cross_attention(reads.block):
        if mlp is None or after is None or _sums(read, mlp, after):
            return None
        return f"it and mlp_output do not add up to residual_output. Remedy: {remedy}"
    if (
        before is None
        or attention is None
        or any(_sums(stream, attention, read) for stream in _streams(reads))
    ):
        return None
    return f"residual_input + attn_output is not what is read there. Remedy: {remedy}"


# ------------------------------------------------------------------------------------------------ projections


def _reaches(reads: BlockReads, projection: ResolvedSite, target: ResolvedSite | None) -> bool:
    """Whether what a projection gives is what the target site's module gives, or receives."""
    given = reads.gives.get(projection.module_path)
    if target is None or given is None:
        return False
    ends = (reads.gives.get(target.module_path), reads.takes.get(target.module_path))
    return any(end is not None and same(given, end) for end in ends)


def _z(reads: BlockReads, cross: str, entry: ResolvedSite) -> str | None:
    if not _reaches(reads, entry, reads.entries.get(f"{cross}attn_output")):
        return (
            f"the output of {entry.module_path!r}, which should project it, is not {cross}attn_output. Remedy: "
            "'module_input:<path>' of the projection"
        )
    products = _products(reads, cross)
    if products is None:
        return None
    z = reads.values[entry.site.kind]
    for *_, out in products:
        for weighed in _by_position(out, z):
            if same(weighed, z) or _same_signs(weighed, z):
                return None
    return (
        "no sum of values that its attention weighs is what its projection receives, so that heads cannot be told. "
        f"Remedy: 'module_input:{entry.module_path}'"
    )


def _by_position(out: Tensor, z: Tensor) -> Iterator[Tensor]:
    """A product of attention as (B, T, H, Dh), the ways in which it may lie."""
    if out.numel() != z.numel():
        return
    heads, width = z.shape[-2:]
    lead = z.numel() // (heads * width)
    if out.ndim == 3 and out.shape[0] % heads == 0:
        yield out.unflatten(0, (-1, heads)).transpose(1, 2)
    if out.ndim == 4 and out.shape[1] == heads:
        yield out.transpose(1, 2)
    if out.shape[-1] == width and out.numel() == lead * heads * width:
        yield out.reshape(z.shape)


def _same_signs(found: Tensor, expected: Tensor) -> bool:
    """Whether positive factors lead from one to the other: a gate, or a norm before the projection."""
    agree = found.reshape(-1).sign() == expected.reshape(-1).sign()
    return float(agree.float().mean()) > 0.995


def _head_output(reads: BlockReads, cross: str, entry: ResolvedSite) -> str | None:
    z = reads.entries.get(f"{cross}z")
    if z is not None and (reason := _z(reads, cross, z)) is not None:
        return reason.replace("z", "head_output", 1) if reason.startswith("z") else reason
    whole, read = reads.values.get(f"{cross}attn_output"), reads.values[entry.site.kind]
    if whole is None or not isinstance(entry.view, HeadOutput) or entry.behind is not None:
        return None
    bias = bias_of(entry.view.projection, read)
    total = read.sum(-2) + (0 if bias is None else bias * entry.scale)
    if same(total, whole):
        return None
    return f"the heads' shares do not add up to {cross}attn_output. Remedy: 'z'"


def _products(reads: BlockReads, cross: str) -> list[tuple[Tensor, Tensor, Tensor]] | None:
    """The products in an attention's forward; ``None`` where nobody looked."""
    core = reads.entries.get(f"{cross}attn_pattern")
    return None if core is None or not reads.products else reads.products.get(core.module_path)


def _values(reads: BlockReads, cross: str, entry: ResolvedSite) -> str | None:
    products = _products(reads, cross)
    if products is None:
        return None
    values = reads.values[entry.site.kind].transpose(1, 2)  # (B, H, T, Dh)
    for _, second, _ in products:
        if _is_repeated(values, second):
            return None
    path = entry.module_path
    if _is_fused(entry):
        return (
            f"expected the heads of the fused projection {path!r} side by side or head by head, but its values lie in it in "
            f"another way. Remedy: sites='module_output:{path}' and split it as the model does, or 'z'"
        )
    return f"what {path!r} gives is not what the pattern weighs. Remedy: 'module_output:{path}', or 'z'"


def _is_repeated(values: Tensor, second: Tensor) -> bool:
    """Whether (B, H, T, Dh) is, head by head, the second factor of a product of as many heads or more."""
    heads = values.shape[1]
    if second.ndim == 3 and second.shape[0] == values.shape[0] and heads == 1:
        second = second.unsqueeze(1)
    elif second.ndim == 3 and second.shape[0] % values.shape[0] == 0:
        second = second.unflatten(0, (values.shape[0], -1))
    if second.ndim != 4 or second.shape[0] != values.shape[0] or second.shape[-2:] != values.shape[-2:]:
        return False
    return second.shape[1] % heads == 0 and same(
        values.repeat_interleave(second.shape[1] // heads, 1), second
    )


def _is_fused(entry: ResolvedSite) -> bool:
    view = entry.view
    return isinstance(view, HeadSlice) and (view.start, view.stop) != (0, view.width)


def _query_or_key(reads: BlockReads, cross: str, entry: ResolvedSite) -> str | None:
    value = entry.site.kind.removeprefix("cross_")
    other = reads.entries.get(f"{cross}v")
    if _is_fused(entry) and other is not None and (reason := _values(reads, cross, other)) is not None:
        return reason
    turned = reads.values.get(f"{cross}{value}_rotary")
    if turned is None:
        return None
    own = reads.values[entry.site.kind]
    if (
        turned.shape[-2] % own.shape[-2]
        or turned.shape[:2] != own.shape[:2]
        or turned.shape[-1] != own.shape[-1]
    ):
        return f"its heads, {tuple(own.shape)}, are not those of the product, {tuple(turned.shape)}"
    whole = own.repeat_interleave(turned.shape[-2] // own.shape[-2], -2)
    # a rotation keeps the length of every head and leaves position 0; a norm keeps signs there
    lengths = torch.stack([doubled(one).norm(dim=-1).reshape(-1) for one in (whole, turned)])
    agree = (whole[:, 0].sign() == turned[:, 0].sign()).float().mean()
    if float(agree) > 0.75 or _correlation(lengths[0], lengths[1]) > 0.99:
        return None
    return f"its heads are not those whose product the scores are. Remedy: '{value}_rotary'"


# --------------------------------------------------------------------------------------------------- patterns


def _pattern(reads: BlockReads, cross: str, entry: ResolvedSite) -> str | None:
    pattern = reads.values.get(f"{cross}attn_pattern")
    if pattern is None or f"{cross}attn_scores" not in reads.values:
        return f"no softmax over keys was seen in {entry.module_path!r}"
    stream = reads.values["residual_input"]
    if pattern.ndim != 4 or pattern.shape[1] != entry.head_count:
        return f"its softmax is over {tuple(pattern.shape)}, not over (B, {entry.head_count}, Tq, Tk)"
    if stream.ndim == 3 and not {pattern.shape[0], pattern.shape[2]} & set(stream.shape[:2]):
        return f"its softmax is over {tuple(pattern.shape)}, the stream is {tuple(stream.shape)}"
    products = _products(reads, cross)
    if products is None:
        return None
    if any(_is_weight(first, pattern) or _is_weight(second, pattern) for first, second, _ in products):
        return None
    return f"the first softmax in {entry.module_path!r} does not weigh its values"


def _is_weight(factor: Tensor, pattern: Tensor) -> bool:
    """Whether a factor of a product is the pattern, in rows that have keys to weigh (padding has none, as a model likes)."""
    wide = (
        pattern if factor.shape[-1] == pattern.shape[-1] else pattern[..., : factor.shape[-1]]
    )  # a sink is left out
    if factor.numel() != wide.numel():
        return False
    far = (
        (doubled(factor.reshape(-1, wide.shape[-1])) - doubled(wide.reshape(-1, wide.shape[-1])))
        .abs()
        .amax(-1)
    )
    return float((far <= 0.02).float().mean()) > 0.5


def _turned(reads: BlockReads, cross: str, entry: ResolvedSite) -> str | None:
    queries, keys = reads.values.get(f"{cross}q_rotary"), reads.values.get(f"{cross}k_rotary")
    scores = reads.values.get(f"{cross}attn_scores")
    if queries is None or keys is None or scores is None or scores.ndim != 4:
        return f"no product of queries and keys was seen in {entry.module_path!r}"
    if queries.shape[-2] != entry.head_count or keys.shape[-2] != entry.head_count:
        return f"its product is of {tuple(queries.shape)} and {tuple(keys.shape)}, not of {entry.head_count} heads"
    raw = torch.einsum("bqhd,bkhd->bhqk", doubled(queries), doubled(keys))
    if raw.shape[:3] != scores.shape[:3] or raw.shape[-1] > scores.shape[-1]:
        return f"its product is {tuple(raw.shape)}, the scores are {tuple(scores.shape)}"
    seen, pattern = doubled(scores[..., : raw.shape[-1]]), reads.values.get(f"{cross}attn_pattern")
    if pattern is None:
        return f"no softmax over keys was seen in {entry.module_path!r}"
    pattern = pattern.to(seen.device)
    open_ = (pattern[..., : raw.shape[-1]] > 0) & (seen > torch.finfo(scores.dtype).min / 4)
    if _correlation(raw[open_], seen[open_]) > 0.99:
        return None
    rows = [
        (value - _row_means(value, open_))[open_] for value in (raw, seen)
    ]  # a softmax leaves a row's level free
    if _correlation(*rows) > 0.99:
        return None
    both = open_[0] & open_[-1]  # what depends on positions alone falls out between two texts
    if _correlation((raw[0] - raw[-1])[both], (seen[0] - seen[-1])[both]) > 0.99:
        return None
    return "the scores are not its scaled product with a bias of positions"


def _row_means(value: Tensor, open_: Tensor) -> Tensor:
    return value.masked_fill(~open_, 0).sum(-1, keepdim=True) / open_.sum(-1, keepdim=True).clamp(min=1)


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 0 else 1.0


# ------------------------------------------------------------------------------------------ neurons and routers


def _neurons(reads: BlockReads, cross: str, entry: ResolvedSite) -> str | None:
    if _reaches(reads, entry, reads.entries.get("mlp_output")):
        return None
    return (
        f"the output of {entry.module_path!r}, which should project it, is not mlp_output. Remedy: "
        f"'module_input:{entry.module_path}'"
    )


def _choice(reads: BlockReads, cross: str, entry: ResolvedSite) -> str | None:
    if "router_choice" in reads.values:
        return None
    return "the model does not tell which experts it chose: no indices and no mask were seen that fit a selection of the largest"
