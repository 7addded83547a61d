"""Hooks that write: they hand each site's tensor to its edits and put the result back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from tdgeom.model.calls.attention_kernel import eager_attention, padding_cutters, watch_softmax, whole_batches
from tdgeom.model.calls.call_info import CallInfo
from tdgeom.model.calls.model_inputs import bound_tensors, read_signature
from tdgeom.model.edits.edit import Edit
from tdgeom.model.sites import PATTERN_KINDS
from tdgeom.model.structure.readers import read_input, read_output, write_output
from tdgeom.model.structure.resolve import ResolvedSite


class EditSession:
    """Hooks on the modules of the plan's sites; ``close`` takes away exactly these."""

    def __init__(
        self,
        model: nn.Module,
        plan: Sequence[tuple[ResolvedSite, Sequence[Any]]],
        special: Tensor | None = None,
    ) -> None:
        self.handles: list[Any] = []
        self.undo = ExitStack()
        self.calls: dict[str, CallInfo] = {}
        self.leading: dict[str, torch.Size] = {}
        self.fired: dict[tuple[str, str], int] = defaultdict(int)
        self.around: dict[str, list[Tensor]] = defaultdict(list)
        self.behind: dict[nn.Module, list[Tensor]] = defaultdict(list)
        self.special = special
        try:
            self._install(model, plan)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the hooks and forget every tensor."""
        while self.handles:
            self.handles.pop().remove()
        self.undo.close()
        self.calls.clear()
        self.around.clear()
        self.behind.clear()

    def _install(self, model: nn.Module, plan: Sequence[tuple[ResolvedSite, Sequence[Any]]]) -> None:
        places: dict[tuple[str, str], list[tuple[ResolvedSite, Sequence[Any], str]]] = defaultdict(list)
        for entry, edits in plan:
            places[entry.module_path, entry.side].append((entry, edits, _owner(model, entry)))
        if any(entry.side in ("scores", "pattern") for entry, _ in plan):
            self.undo.enter_context(eager_attention(model))
        if padding_cutters(model):
            self.undo.enter_context(whole_batches(model))
        for owner in sorted({owner for entries in places.values() for *_, owner in entries}):
            self.calls[owner] = CallInfo()
            module = model.get_submodule(owner)
            hook = partial(self._on_call, owner, read_signature(module))
            self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
        inner = {e.block_path for e, _ in plan if e.block_path is not None and e.module_path != e.block_path}
        for path in sorted(inner):
            hook = partial(self._on_block, path)
            self.handles.append(model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
        for path in sorted(
            {entry.block_path for entry, _ in plan if entry.bypass and entry.block_path is not None}
        ):
            # before every other hook on the block's output: it belongs to what the block gives
            hook = partial(self._on_block_end, path)
            self.handles.append(model.get_submodule(path).register_forward_hook(hook, prepend=True))
        for module in {entry.behind for entry, _ in plan} - {None}:
            self.handles.append(module.register_forward_hook(self._on_behind, prepend=True))
        for (path, side), entries in places.items():
            module = model.get_submodule(path)
            if side in ("scores", "pattern"):
                watcher = partial(self._on_softmax, (path, side), entries)
                self.undo.enter_context(watch_softmax(module, watcher, entries[0][0].view.heads))
            elif side == "input":
                hook = partial(self._on_input, (path, side), entries)
                self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                hook = partial(self._on_output, (path, side), entries)
                self.handles.append(module.register_forward_hook(hook, with_kwargs=True))

    # ------------------------------------------------------------------------------------------ hooks

    def _on_call(self, owner: str, signature: Any, module: nn.Module, args: tuple, kwargs: dict) -> None:
        past = kwargs.get("past_key_values")
        length = past.get_seq_length() if hasattr(past, "get_seq_length") else 0
        tensors = bound_tensors(signature, args, kwargs)
        masks = kwargs.get("attention_mask")
        if isinstance(masks, Mapping):  # one for each kind of layer
            mask = masks.get("full_attention", next(iter(masks.values()), None))
            tensors.update({"attention_mask": mask} if isinstance(mask, Tensor) else {})
        self.calls[owner].begin(tensors, int(length))
        for place in [p for p in self.fired if not owner or p[0].startswith(owner + ".")]:
            self.fired[place] = 0

    def _on_block(self, path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        value = read_input(args, kwargs)
        self.around.pop(path, None)
        if value is not None:
            self.leading[path] = value.shape[:-1]

    def _on_block_end(self, path: str, module: nn.Module, args: tuple, output: Any) -> Any:
        changes = self.around.pop(path, None)
        if not changes:
            return output
        value = read_output(args, {}, output)
        # a part of the block may work on flattened tokens
        return write_output(args, {}, output, value + sum(change.reshape(value.shape) for change in changes))

    def _on_behind(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        changes = self.behind.pop(module, None)
        return output if not changes else output + sum(change.to(output) for change in changes)

    def _on_input(self, place: tuple, entries: list, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        for entry, edits, owner in self._due(place, entries):
            before = entry.read(args, kwargs, None)
            value = self._edit(entry, edits, owner, before)
            if entry.bypass:
                self.around[entry.block_path or ""].append(value - before)
            args, kwargs = entry.write(args, kwargs, None, value)
        return args, kwargs

    def _on_output(
        self, place: tuple, entries: list, module: nn.Module, args: tuple, kwargs: dict, output: Any
    ) -> Any:
        for entry, edits, owner in self._due(place, entries):
            before = entry.read(args, kwargs, output)
            value = self._edit(entry, edits, owner, before)
            if entry.behind is not None:
                self.behind[entry.behind].append((value - before).sum(-2) / entry.scale)
            output = entry.write(args, kwargs, output, value)
        return output

    def _on_softmax(self, place: tuple, entries: list, side: str, value: Tensor) -> Tensor:
        if side == place[1]:
            for entry, edits, owner in self._due(place, entries):
                new = self._edit(entry, edits, owner, entry.read((), {}, value))
                value = entry.write((), {}, value, new)
        return value

    def _due(self, place: tuple[str, str], entries: list) -> list:
        count = self.fired[place]
        self.fired[place] += 1
        return [item for item in entries if item[0].calls == 1 or item[0].call == count]

    # ------------------------------------------------------------------------------------------ edits

    def _edit(self, entry: ResolvedSite, edits: Sequence[Any], owner: str, value: Tensor | None) -> Tensor:
        if value is None:
            raise RuntimeError(
                f"the site {str(entry.site)!r} expected a tensor at the {entry.side} of {entry.module_path!r}, got none. "
                "Remedy: choose another module, 'module_output:<path>'."
            )
        shape = value.shape
        leading = self.leading.get(entry.block_path or "") if entry.block_path != entry.module_path else None
        if leading is not None and len(leading) == 2 and value.ndim == 2 and shape[0] == leading.numel():
            value = value.reshape(*leading, -1)  # a part of the block that works on flattened tokens
        for edit in edits:
            value = self._apply(edit, entry, owner, value)
        return value.reshape(shape).contiguous()  # models take views of what they computed themselves

    def _apply(self, edit: Callable, entry: ResolvedSite, owner: str, value: Tensor) -> Tensor:
        turned = isinstance(edit, Edit) and entry.site.kind in PATTERN_KINDS
        given = value.transpose(1, 2) if turned else value
        version = None if given.is_inference() else given._version
        if isinstance(edit, TensorDictModuleBase):
            td = self._context(entry, owner, given)
            out = edit(td)
            new = (td if out is None else out).get("activation", None)
        else:
            new = edit(given)
        if not isinstance(new, Tensor) or new.shape != given.shape:
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(
                f"the edit {_name(edit)} at {str(entry.site)!r} expected to give a tensor {tuple(given.shape)}, gave {got}."
            )
        if version is not None and given._version != version:
            raise RuntimeError(
                f"the edit {_name(edit)} at {str(entry.site)!r} wrote to the activation in place, which may change tensors "
                "elsewhere. Remedy: return a new tensor (x + v, torch.where, x.clone())."
            )
        return new.transpose(1, 2) if turned else new

    def _context(self, entry: ResolvedSite, owner: str, value: Tensor) -> TensorDict:
        """What an edit stage reads: the activation and what the model's call was given."""
        info = self.calls[owner]
        td = TensorDict({"activation": value}, batch_size=[])
        mask = info.mask(value, value.shape[1]) if value.ndim > 2 else None
        if mask is not None:
            td.set("attention_mask", mask)
        if info.history is not None:
            td.set("input_ids", info.history)
        special = self.special
        if special is not None and value.ndim > 2 and special.shape == value.shape[:2]:
            td.set("special_tokens_mask", special)
        td.set_non_tensor("site", str(entry.site))
        td.set_non_tensor("groups", entry.groups)
        return td


def _owner(model: nn.Module, entry: ResolvedSite) -> str:
    """The nearest module around a site that is called with token ids: there the mask and the cache are known."""
    parts = (entry.block_path or entry.module_path).split(".")
    for depth in range(len(parts) - 1, 0, -1):
        path = ".".join(parts[:depth])
        if "input_ids" in read_signature(model.get_submodule(path)).names:
            return path
    return ""


def _name(edit: Any) -> str:
    return type(edit).__name__ if isinstance(edit, nn.Module) else getattr(edit, "__name__", repr(edit))
