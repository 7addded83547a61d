"""What was concluded from a model's structure, checked once by a tiny pass of the model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tdgeom.model.calls.bound_model import eval_mode, may_stop
from tdgeom.model.calls.model_inputs import made_up_inputs, read_signature
from tdgeom.model.calls.quiet import replaced_forwards, without_hooks
from tdgeom.model.structure.parts import has_cross_attention
from tdgeom.model.structure.readers import read_input, read_output
from tdgeom.model.structure.resolve import ADDED_KINDS, ResolvedSite, available_sites
from tdgeom.model.structure.views import HeadSlice

CHECKED = ("q", "k", "v", "head_output", "residual_mid", *ADDED_KINDS)
_DONE: WeakKeyDictionary[nn.Module, set] = WeakKeyDictionary()
_READERS = ("tdgeom.model.calls.reading", "tdgeom.model.calls.structure_check")  # whose hooks change nothing
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}


def verify(model: nn.Module, entries: Sequence[ResolvedSite]) -> None:
    """Raise where heads or the stream in the middle of a block are not what the structure seemed to say.

    Checked in one block of each stack, once a model: that the values read from a fused projection are those the
    pattern weighs, that the heads' shares add up to ``attn_output``, that ``residual_mid`` is ``residual_input`` plus
    ``attn_output`` (with cross-attention on the way, that ``residual_output`` is it plus ``mlp_output``), and that a block
    with parameters of its own does not scale by them what it adds. Models whose inputs cannot be made up are checked in
    the first call that is read (:func:`unverified`).
    """
    done = _DONE.setdefault(model, set())
    wanted = {
        (e.site.stack, e.site.kind) for e in entries if e.site.kind in CHECKED and _in_doubt(model, e)
    } - done
    if not wanted:
        return
    signature, modules = read_signature(model), list(model.modules())
    if not may_stop(modules) or any(p.is_meta for p in model.parameters()):
        return
    known = available_sites(model)
    reads = [Reads(model, stack, known) for stack in sorted({stack for stack, _ in wanted}, key=str)]
    given = made_up_inputs(model, signature, 2, 5)
    if given is None:
        return
    forwards = {reader.core: reader.watched() for reader in reads if reader.core is not None}
    with eval_mode(modules), without_hooks(model), replaced_forwards(forwards), torch.no_grad():
        handles = [handle for reader in reads for handle in reader.install()]
        try:
            model(**given)
        except (
            Exception
        ):  # a model that wants other inputs: the user's own call will say what is wrong with them
            return
        finally:
            for handle in handles:
                handle.remove()
    for stack, kind in sorted(wanted, key=str):
        next(reader for reader in reads if reader.stack == stack).check(kind)
    done |= wanted


def unverified(model: nn.Module, entries: Sequence[ResolvedSite]) -> list[Reads]:
    """What ``verify`` could not check, for want of inputs, and a call of the user's can: readers for that call."""
    kinds = ("head_output", "residual_mid")
    done = _DONE.get(model, set())
    wanted = {(e.site.stack, e.site.kind) for e in entries if e.site.kind in kinds} - done
    if not wanted:
        return []
    known = available_sites(model)
    return [
        Reads(model, stack, known, [kind for own, kind in sorted(wanted, key=str) if own == stack])
        for stack in sorted({stack for stack, _ in wanted}, key=str)
    ]


def _in_doubt(model: nn.Module, entry: ResolvedSite) -> bool:
    if entry.site.kind in ADDED_KINDS:  # a block's own parameters may scale what it adds
        block = model.get_submodule(entry.block_path or "")
        return any(True for _ in block.parameters(recurse=False))
    fused = isinstance(entry.view, HeadSlice) and (entry.view.start, entry.view.stop) != (0, entry.view.width)
    return fused or entry.site.kind in ("head_output", "residual_mid")


class Reads:
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

    def install(self) -> list[Any]:
        """Hooks that keep copies of what is read."""
        handles = []
        for kind in (
            "v", "head_output", "attn_output", "residual_input", "residual_mid", "mlp_output", "residual_output",
        ):  # fmt: skip
            entry = self.entries.get(kind)
            if entry is None:
                continue
            module = self.model.get_submodule(entry.module_path)
            if entry.side == "input":
                handles.append(
                    module.register_forward_pre_hook(self._keep_input(kind, entry), with_kwargs=True)
                )
            else:
                handles.append(module.register_forward_hook(self._keep_output(kind, entry), with_kwargs=True))
        return handles

    def _keep_input(self, kind: str, entry: ResolvedSite) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if kind not in self.values and read_input(args, kwargs) is not None:
                self.values[kind] = entry.read(args, kwargs).clone()  # type: ignore[union-attr]

        return hook

    def _keep_output(self, kind: str, entry: ResolvedSite) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if kind not in self.values and read_output(args, kwargs, output) is not None:
                self.values[kind] = entry.read(args, kwargs, output).clone()  # type: ignore[union-attr]

        return hook

    def watched(self) -> Callable:
        """The attention module's forward, noting the second factor of its matrix products."""
        forward = self.core.forward  # type: ignore[union-attr]

        def run(*args: Any, **kwargs: Any) -> Any:
            with _Products(self.weighed):
                return forward(*args, **kwargs)

        return run

    def check_call(self) -> None:
        """``check`` after a call of the user's, unless hooks of others (edits) may have changed what was read."""
        block = self.model.get_submodule(self.entries[self.kinds[0]].block_path or "")
        hooks = [
            h for m in block.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
        ]
        if all(
            getattr(h, "func", h).__module__ in _READERS
            for h in hooks
            if hasattr(getattr(h, "func", h), "__module__")
        ):
            for kind in self.kinds:
                self.check(kind)
                if {kind, "attn_output"} <= self.values.keys():
                    _DONE.setdefault(self.model, set()).add((self.stack, kind))

    def check(self, kind: str) -> None:
        """Raise if the numbers contradict the structure; silent where they cannot tell."""
        if kind in ("q", "k", "v"):
            self._check_values(kind)
        elif kind == "head_output":
            shares, total = self.values.get(kind), self.values.get("attn_output")
            bias = getattr(self.entries[kind].view.projection, "bias", None)  # type: ignore[union-attr]
            if shares is not None and total is not None and self.entries[kind].view.behind is None:  # type: ignore[union-attr]
                whole = shares.sum(-2) + (0 if bias is None else bias * self.entries[kind].scale)
                self._compare(kind, whole, total, "the heads' shares do not add up to attn_output", "'z'")
        elif kind in ADDED_KINDS:
            self._check_added(kind)
        else:
            self._check_middle(kind, self.entries[kind])

    def _check_added(self, kind: str) -> None:
        """What is added to the stream, in a block with parameters of its own (that does not normalise at its end)."""
        middle = self.entries.get("residual_mid")
        parts = [
            self.values.get(k) for k in ("residual_input", "attn_output", "mlp_output", "residual_output")
        ]
        if (middle is None or middle.bypass) and not any(part is None for part in parts):
            *added, after = parts
            what = "the block scales it by a parameter of its own before it is added"
            remedy = f"'module_output:{self.entries[kind].module_path}', scaled as the block does"
            self._compare(kind, sum(part.reshape(after.shape) for part in added), after, what, remedy)

    def _check_middle(self, kind: str, entry: ResolvedSite) -> None:
        """The stream before the MLP: with cross-attention on the way to it, told by what comes after."""
        block = self.model.get_submodule(entry.block_path or "")
        read, before, attention, mlp, after = (
            self.values.get(k)
            for k in (kind, "residual_input", "attn_output", "mlp_output", "residual_output")
        )
        norm = self.entries.get("attn_norm")
        remedy = (
            f"'module_input:{norm.module_path}' where that norm stands behind the attention" if norm else ""
        )
        remedy = remedy or "'module_input:<path>'"
        if entry.bypass and has_cross_attention(block):
            if read is not None and mlp is not None and after is not None:
                what = "it and mlp_output do not add up to residual_output"
                self._compare(kind, read.reshape(after.shape) + mlp.reshape(after.shape), after, what, remedy)
        elif read is not None and before is not None and attention is not None:
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
            found, expected = found.detach().reshape(-1), expected.detach().reshape(-1)
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
