"""Edits applied while the model runs: hooks hand each site's tensor to its edits and put the result back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tensordict import NonTensorData, TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from tdgeom.model.calls.call_info import CallInfo
from tdgeom.model.calls.model_inputs import Signature, bound_tensors, read_signature
from tdgeom.model.calls.site_hooks import Place, Places, SiteHooks
from tdgeom.model.edits.edit import Edit
from tdgeom.model.positions import positions_second
from tdgeom.model.structure.readers import read_output, write_output
from tdgeom.model.structure.resolved_site import ResolvedSite


@dataclass(frozen=True)
class Planned:
    """The edits of one site, the part of the model whose calls tell them mask and ids, and its name in words."""

    entry: ResolvedSite
    edits: Sequence[Any]
    owner: str
    words: dict[str, NonTensorData]


class EditPlan:
    """Which edits act at which place of a model; found once, however often a context is entered."""

    def __init__(self, places: Places, edits: Sequence[Sequence[Any]]) -> None:
        self.places = places
        self.owners: dict[str, Signature] = {}
        self.at: dict[Place, list[Planned]] = defaultdict(list)
        signatures: dict[str, Signature] = {"": read_signature(places.model)}
        for entry, listed in zip(places.sites, edits, strict=True):
            owner = _owner(places.model, entry, signatures)
            self.owners[owner] = signatures[owner]
            words = {"site": NonTensorData(str(entry.site)), "groups": NonTensorData(entry.groups)}
            self.at[entry.module_path, entry.side].append(Planned(entry, listed, owner, words))
        self.bypassed = sorted({e.block_path for e in places.sites if e.bypass and e.block_path is not None})


def _owner(model: nn.Module, entry: ResolvedSite, signatures: dict[str, Signature]) -> str:
    """The nearest module around a site that is called with token ids: there the mask and the cache are known."""
    path = (entry.block_path or entry.module_path).rpartition(".")[0]
    while path:
        if path not in signatures:
            signatures[path] = read_signature(model.get_submodule(path))
        if "input_ids" in signatures[path].names:
            return path
        path = path.rpartition(".")[0]
    return ""


class Editing(SiteHooks):
    """Hooks that hand each site's tensor to its edits and put the result back."""

    changes = True

    def __init__(self, plan: EditPlan, special: Tensor | None = None) -> None:
        super().__init__(plan.places)
        self.plan, self.special = plan, special
        self.calls = {owner: CallInfo() for owner in plan.owners}
        self.fired: dict[Place, int] = defaultdict(int)
        self.past_block: dict[str, list[Tensor]] = defaultdict(list)
        self.past_module: dict[nn.Module, list[Tensor]] = defaultdict(list)

    def around(self) -> None:
        """Hooks that learn what a call was given, and those that carry a change past the module where it was made."""
        model = self.places.model
        for owner, signature in self.plan.owners.items():
            self.before(model.get_submodule(owner), partial(self._on_call, owner, signature), prepend=True)
        for path in self.plan.bypassed:
            # before every other hook on the block's output: it belongs to what the block gives
            self.after(self.places.modules[path], partial(self._on_block_end, path), prepend=True)
        for module in self.places.behind:
            self.after(module, self._on_behind, prepend=True)

    def close(self) -> None:
        """Remove the hooks and forget every tensor."""
        super().close()
        self.calls.clear()
        self.past_block.clear()
        self.past_module.clear()

    # ------------------------------------------------------------------------------------------ hooks

    def _on_call(
        self, owner: str, signature: Signature, module: nn.Module, args: tuple, kwargs: dict
    ) -> None:
        count: Any = getattr(kwargs.get("past_key_values"), "get_seq_length", lambda: 0)
        tensors = bound_tensors(signature, args, kwargs)
        masks = kwargs.get("attention_mask")
        if isinstance(masks, Mapping):  # one for each kind of layer
            mask = masks.get("full_attention", next(iter(masks.values()), None))
            tensors.update({"attention_mask": mask} if isinstance(mask, Tensor) else {})
        self.calls[owner].begin(tensors, int(count()))
        for place in [p for p in self.fired if not owner or p[0].startswith(owner + ".")]:
            self.fired[place] = 0

    def on_block(self, path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A block begins: what an earlier call that failed has left is gone."""
        super().on_block(path, module, args, kwargs)
        self.past_block.pop(path, None)

    def _on_block_end(self, path: str, module: nn.Module, args: tuple, output: Any) -> Any:
        value = read_output(args, {}, output)
        changes = self.past_block.pop(path, None)
        if value is None or not changes:
            return output
        for change in changes:
            value = value + change.reshape(value.shape)  # a part of the block may work on flattened tokens
        return write_output(args, {}, output, value)

    def _on_behind(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        for change in self.past_module.pop(module, []):
            output = output + change.to(output)
        return output

    def visit(self, place: Place, args: tuple, kwargs: dict, output: Any) -> Any:
        """Hand the sites of a place to their edits."""
        count = self.fired[place]
        self.fired[place] += 1
        for planned in self.plan.at[place]:
            entry = planned.entry
            if entry.calls > 1 and entry.call != count:
                continue
            before = entry.read(args, kwargs, output)
            if before is None:
                raise RuntimeError(
                    f"the site {str(entry.site)!r} expected a tensor at the {entry.side} of {entry.module_path!r}, got none. "
                    "Remedy: choose another module, 'module_output:<path>'."
                )
            value = self.tokens(entry, before)
            for edit in planned.edits:
                value = self._apply(edit, planned, value)
            value = value.reshape(before.shape).contiguous()  # models take views of what they computed
            if entry.bypass:
                self.past_block[entry.block_path or ""].append(value - before)
            if entry.behind is not None:
                self.past_module[entry.behind].append((value - before).sum(-2) / entry.scale)
            written: Any = entry.write(args, kwargs, output, value)
            if place[1] == "input":
                args, kwargs = written
            else:
                output = written
        return (args, kwargs) if place[1] == "input" else output

    def _apply(self, edit: Callable, planned: Planned, value: Tensor) -> Tensor:
        site = planned.entry.site
        given = positions_second(value, site) if isinstance(edit, Edit) else value
        version = None if given.is_inference() else given._version
        if isinstance(edit, TensorDictModuleBase):
            told = self._told(planned, given)
            if isinstance(edit, Edit) and edit.is_plain():  # the short way to the same numbers
                new = edit.computed([given, *told.values(), str(site), planned.entry.groups])
            else:
                known = {name: entry for name, entry in told.items() if entry is not None}
                td = TensorDict({"activation": given, **known, **planned.words}, batch_size=[])
                out = edit(td)
                new = (td if out is None else out).get("activation", None)
        else:
            new = edit(given)
        if not isinstance(new, Tensor) or new.shape != given.shape:
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(
                f"the edit {_name(edit)} at {str(site)!r} expected to give a tensor {tuple(given.shape)}, gave {got}."
            )
        if version is not None and given._version != version:
            raise RuntimeError(
                f"the edit {_name(edit)} at {str(site)!r} wrote to the activation in place, which may change tensors "
                "elsewhere. Remedy: return a new tensor (x + v, torch.where, x.clone())."
            )
        return positions_second(new, site) if isinstance(edit, Edit) else new

    def _told(self, planned: Planned, value: Tensor) -> dict[str, Tensor | None]:
        """What the model's call was given beside an activation."""
        info, special = self.calls[planned.owner], self.special
        here = value.ndim > 2
        fits = here and special is not None and special.shape == value.shape[:2]
        return {
            "attention_mask": info.mask(value, value.shape[1]) if here else None,
            "input_ids": info.history,
            "special_tokens_mask": special if fits else None,
        }


def _name(edit: Any) -> str:
    return type(edit).__name__ if isinstance(edit, nn.Module) else getattr(edit, "__name__", repr(edit))
