"""What was concluded from a model's structure, checked once by a tiny pass of the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tdgeom.core.surroundings import steady
from tdgeom.model.calls.bound_model import eval_mode, may_stop
from tdgeom.model.calls.model_inputs import made_up_inputs, read_signature
from tdgeom.model.calls.quiet import replaced_forwards, without_hooks
from tdgeom.model.calls.site_hooks import Place, Places, SiteHooks, only_reads
from tdgeom.model.calls.verified import verified
from tdgeom.model.structure.parts import has_cross_attention, is_neutral, join
from tdgeom.model.structure.resolve import available_sites
from tdgeom.model.structure.resolved_site import ADDED_KINDS, ResolvedSite
from tdgeom.model.structure.views import HeadOutput, HeadSlice

CHECKED = ("q", "k", "v", "head_output", "residual_mid", *ADDED_KINDS)
_SHOWN = (
    "v",
    "head_output",
    "attn_output",
    "residual_input",
    "residual_mid",
    "mlp_output",
    "residual_output",
)
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}


def check_structure(model: nn.Module, entries: Sequence[ResolvedSite]) -> None:
    """Raise where heads or the stream in the middle of a block are not what the structure seemed to say.

    Checked in one block of each stack, once a model: that the values read from a fused projection are those the
    pattern weighs, that the heads' shares add up to ``attn_output``, that ``residual_mid`` is ``residual_input`` plus
    ``attn_output`` (with cross-attention on the way, that ``residual_output`` is it plus ``mlp_output``), and that a block
    with parameters of its own does not scale by them what it adds. Models whose inputs cannot be made up are checked in
    the first call that is read (:func:`unverified`).
    """
    done: set[tuple] = verified(model).setdefault("structure", set())
    wanted = {
        (e.site.stack, e.site.kind) for e in entries if e.site.kind in CHECKED and _in_doubt(model, e)
    } - done
    if not wanted:
        return
    signature, modules = read_signature(model), list(model.modules())
    if not may_stop(modules) or any(p.is_meta for p in model.parameters()):
        return
    given = made_up_inputs(model, signature, 2, 5)
    if given is None:
        return
    known = available_sites(model)
    reads = [BlockReads(model, stack, known) for stack in sorted({stack for stack, _ in wanted}, key=str)]
    forwards = {read.core: read.watched(read.core) for read in reads if read.core is not None}
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    with eval_mode(modules), without_hooks(model), replaced_forwards(forwards), steady(home), torch.no_grad():
        try:
            for read in reads:
                read.open()
            model(**given)
        except Exception:  # wants other inputs: the user's own call will say what is wrong with them
            return
        finally:
            for read in reads:
                read.close()
    for stack, kind in sorted(wanted, key=str):
        next(read for read in reads if read.stack == stack).check(kind)
    done |= wanted


def unverified(model: nn.Module, entries: Sequence[ResolvedSite]) -> list[BlockReads]:
    """What ``check_structure`` could not check, for want of inputs, and a call of the user's can: readers for that call."""
    kinds = ("head_output", "residual_mid")
    wanted = {(e.site.stack, e.site.kind) for e in entries if e.site.kind in kinds} - verified(model).get(
        "structure", set()
    )
    if not wanted:
        return []
    known = available_sites(model)
    return [
        BlockReads(model, stack, known, [kind for own, kind in sorted(wanted, key=str) if own == stack])
        for stack in sorted({stack for stack, _ in wanted}, key=str)
    ]


def followers(places: Places) -> Iterator[tuple[ResolvedSite, str, nn.Module]]:
    """Modules that may still transform what a block adds: the site, and each other part of its stack's first block."""
    watched: set[tuple] = set()
    for entry in places.sites:
        key = (entry.site.stack, entry.site.kind)
        if entry.site.kind not in ADDED_KINDS or entry.call or key in watched:
            continue
        watched.add(key)
        leave, block = entry.module_path, entry.block_path or ""
        for name, module in places.modules[block].named_modules():
            path = join(block, name)
            related = path.startswith(leave + ".") or leave.startswith(path + ".") or path == leave
            if name and not related and not is_neutral(module):
                yield entry, path, module


def _in_doubt(model: nn.Module, entry: ResolvedSite) -> bool:
    if entry.site.kind in ADDED_KINDS:  # a block's own parameters may scale what it adds
        block = model.get_submodule(entry.block_path or "")
        return any(True for _ in block.parameters(recurse=False))
    fused = isinstance(entry.view, HeadSlice) and (entry.view.start, entry.view.stop) != (0, entry.view.width)
    return fused or entry.site.kind in ("head_output", "residual_mid")


class BlockReads(SiteHooks):
    """What one pass shows in a block of a stack."""

    def __init__(
        self, model: nn.Module, stack: str | None, known: Sequence[ResolvedSite], kinds: Sequence[str] = ()
    ) -> None:
        self.model, self.stack, self.kinds = model, stack, kinds
        layers: dict[int, dict[str, ResolvedSite]] = {}
        for entry in known:
            if entry.site.stack == stack and entry.site.layer is not None:
                layers.setdefault(entry.site.layer, {})[entry.site.kind] = entry
        # the first block that has most: some models leave a norm out of their first one
        self.entries = max(layers.values(), key=lambda kinds: sum(kind in kinds for kind in CHECKED))
        self.values: dict[str, Tensor] = {}
        self.weighed: list[Tensor] = []
        pattern = self.entries.get("attn_pattern")
        self.core = None if pattern is None else model.get_submodule(pattern.module_path)
        super().__init__(Places(model, [self.entries[kind] for kind in _SHOWN if kind in self.entries]))

    def visit(self, place: Place, args: tuple, kwargs: dict, output: Any) -> None:
        """Keep copies of what is read the first time."""
        for entry in self.places.at[place]:
            kind = entry.site.kind
            value = None if kind in self.values else entry.read(args, kwargs, output)
            if value is not None:
                self.values[kind] = value.detach().clone()

    def watched(self, core: nn.Module) -> Callable:
        """The attention module's forward, noting the second factor of its matrix products."""
        forward = core.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            with _Products(self.weighed):
                return forward(*args, **kwargs)

        return run

    def check_call(self) -> None:
        """``check`` after a call of the user's, unless hooks of others (edits) may have changed what was read."""
        block = self.model.get_submodule(self.entries[self.kinds[0]].block_path or "")
        hooks = [
            h
            for m in block.modules()
            for kept in (m._forward_hooks, m._forward_pre_hooks)
            for h in kept.values()
        ]
        if all(only_reads(hook) for hook in hooks):
            for kind in self.kinds:
                self.check(kind)
                if {kind, "attn_output"} <= self.values.keys():
                    verified(self.model).setdefault("structure", set()).add((self.stack, kind))

    def check(self, kind: str) -> None:
        """Raise if the numbers contradict the structure; silent where they cannot tell."""
        entry, names = self.entries[kind], ("residual_input", "attn_output", "mlp_output", "residual_output")
        before, attention, mlp, after = (self.values.get(name) for name in names)
        read = self.values.get(kind)
        if kind in ("q", "k", "v"):
            self._check_values(kind)
        elif kind == "head_output":
            if read is None or attention is None or not isinstance(entry.view, HeadOutput) or entry.behind:
                return
            bias = getattr(entry.view.projection, "bias", None)
            whole = read.sum(-2) + (0 if bias is None else bias * entry.scale)
            self._compare(kind, whole, attention, "the heads' shares do not add up to attn_output", "'z'")
        elif (
            kind in ADDED_KINDS
        ):  # in a block with parameters of its own (that does not normalise at its end)
            middle = self.entries.get("residual_mid")
            if middle is not None and not middle.bypass:
                return
            if before is not None and attention is not None and mlp is not None and after is not None:
                whole = (
                    before.reshape(after.shape) + attention.reshape(after.shape) + mlp.reshape(after.shape)
                )
                what = "the block scales it by a parameter of its own before it is added"
                self._compare(
                    kind, whole, after, what, f"'module_output:{entry.module_path}', scaled as the block does"
                )
        elif read is not None:
            norm = self.entries.get("attn_norm")
            remedy = "'module_input:<path>'"
            if norm is not None:
                remedy = f"'module_input:{norm.module_path}' where that norm stands behind the attention"
            # with cross-attention on the way, the middle is told by what comes after
            crossed = has_cross_attention(self.model.get_submodule(entry.block_path or ""))
            if entry.bypass and crossed:
                if mlp is not None and after is not None:
                    what = "it and mlp_output do not add up to residual_output"
                    whole = read.reshape(after.shape) + mlp.reshape(after.shape)
                    self._compare(kind, whole, after, what, remedy)
            elif before is not None and attention is not None:
                what = "residual_input + attn_output is not what is read there"
                self._compare(kind, before + attention, read, what, remedy)

    def _check_values(self, kind: str) -> None:
        values = self.values.get("v")
        if values is None:
            return
        values = values.transpose(1, 2)  # (B, H, T, Dh)
        fitting = [
            t for t in self.weighed if t.shape[0] == values.shape[0] and t.shape[-2:] == values.shape[-2:]
        ]
        fitting = [t for t in fitting if t.ndim == 4 and t.shape[1] % values.shape[1] == 0]
        same = any(
            torch.equal(t, values.repeat_interleave(t.shape[1] // values.shape[1], 1)) for t in fitting
        )
        if fitting and not same:
            path = self.entries["v"].module_path
            raise RuntimeError(
                f"{kind!r} expected the heads of the fused projection {path!r} side by side or head by head, but its values "
                f"lie in it in another way. Remedy: sites='module_output:{path}' and split it as the model does, or 'z'."
            )

    def _compare(self, kind: str, found: Tensor, expected: Tensor, what: str, remedy: str) -> None:
        if found.numel() == expected.numel():  # a part of the block may work on flattened tokens
            found, expected = found.detach().reshape(-1), expected.reshape(-1)
        error, size = float((found - expected).abs().max()), float(expected.abs().max())
        if not error <= 0.02 * size:
            raise RuntimeError(
                f"{kind!r} of {type(self.model).__name__} is not where its structure says: {what} (difference {error:.2g}, "
                f"size {size:.2g}). Remedy: {remedy}."
            )


class _Products(TorchFunctionMode):
    """Notes the second factor of matrix products and the values of fused attention."""

    def __init__(self, seen: list[Tensor]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in _PRODUCTS and len(args) > 1:
            self.seen.append(args[1].clone())
        elif func is nn.functional.scaled_dot_product_attention and len(args) > 2:
            self.seen.append(args[2].clone())
        return func(*args, **(kwargs or {}))
