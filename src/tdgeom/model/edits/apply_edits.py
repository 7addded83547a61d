"""Edits applied while the model runs: hooks hand each site's tensor to its edits and put the result back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from threading import get_ident
from typing import Any

import torch
from tensordict import NonTensorData, TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from tdgeom.model.calls.call_info import CallInfo
from tdgeom.model.calls.checkpointing import is_checkpointed, refuse_later_backward, runs_again
from tdgeom.model.calls.embedded_tokens import ids_around
from tdgeom.model.calls.forward_signature import Signature
from tdgeom.model.calls.own_hooks import CHANGING, OwnHook, OwnId, lead
from tdgeom.model.calls.places import Place, Places
from tdgeom.model.calls.repeated_calls import CallsSpec, fired_too_often, is_meant
from tdgeom.model.calls.site_hooks import SiteHooks, Step
from tdgeom.model.calls.token_axis import is_time_first
from tdgeom.model.edits.edit import Edit
from tdgeom.model.sites import is_pattern, token_side
from tdgeom.model.structure.distributed_tensors import parted_like
from tdgeom.model.structure.readers import read_output, write_output
from tdgeom.model.structure.resolved_site import ResolvedSite


@dataclass(frozen=True)
class Planned:
    """The edits of one site, the part of the model whose calls tell them mask and ids, and its name in words."""

    entry: ResolvedSite
    edits: Sequence[Any]
    owner: str
    around: Sequence[str]  # further parts that are called with token ids, outwards
    side: str
    is_pattern: bool  # (B, H, Tq, Tk), which edits are given as (B, Tq, H, Tk)

    @cached_property
    def words(self) -> dict[str, NonTensorData]:
        """The site's name and groups, for edits that are called with a TensorDict."""
        return {"site": NonTensorData(self.entry.site), "groups": NonTensorData(self.entry.groups)}


class EditPlan:
    """Which edits act at which place of a model; found once, however often a context is entered."""

    def __init__(self, places: Places, edits: Sequence[Sequence[Any]]) -> None:
        self.places = places
        self.owners: dict[str, Signature] = {"": places.signature}
        self.at: dict[Place, list[Planned]] = defaultdict(list)
        for entry, owners, listed in zip(places.sites, places.owners, edits, strict=True):
            self.owners.update(owners)
            (owner, signature), *around = owners
            both = not owner or "decoder_input_ids" in signature.names
            side = token_side(entry.site) if both else ""
            self.at[entry.module_path, entry.side].append(
                Planned(entry, listed, owner, [path for path, _ in around], side, is_pattern(entry.site))
            )
        self.everything = [planned for here in self.at.values() for planned in here]
        given = [edit for planned in self.everything for edit in planned.edits]
        self.selective = [edit for edit in dict.fromkeys(given) if isinstance(edit, Edit) and edit.selects()]
        self.bypassed = sorted({e.block_path for e in places.sites if e.bypass and e.block_path is not None})


class EditStep(Step):
    """One running call of the model under edits, and what it was given."""

    __slots__ = ("checkpointed", "embedded", "grad", "past_block", "past_module")

    def __init__(self, path: str = "") -> None:
        super().__init__(path)
        self.grad, self.checkpointed = torch.is_grad_enabled(), False
        self.embedded: dict[str, Tensor | None] = {}  # ids of parts that were given embeddings
        self.past_block: dict[str, list[Tensor]] = {}
        self.past_module: dict[int, list[Tensor]] = {}


class Editing(SiteHooks):
    """Hooks that hand each site's tensor to its edits and put the result back.

    They stand in front of everybody else's hooks, so that whoever else looks sees what an edit left; only contexts that were
    entered before come first.
    """

    changes = True
    step_type = EditStep

    def __init__(
        self,
        plan: EditPlan,
        special: Tensor | None = None,
        *,
        calls: CallsSpec = None,
        totals: Mapping[Place, int] | None = None,
        threads: str = "own",
    ) -> None:
        super().__init__(plan.places, threads=threads)
        self.plan, self.special, self.which, self.totals = plan, special, calls, totals or {}
        self.between: EditStep | None = None
        self.acted: set[int] = set()
        self.called = self.failed = False
        self.entered = [
            False
        ]  # whether this entering of the context goes on, for passes that may be run again

    def around(self) -> None:
        """Hooks that learn what a call was given, and those that carry a change past the module where it was made."""
        model = self.places.model
        marked = {path for path, _ in self.places.calls}
        for owner in self.plan.owners:
            if owner not in marked:  # there one hook does both
                self.before(model.get_submodule(owner), partial(self._on_call, owner), front=True)
        self.listen()
        self.mark_calls()  # in front of what learns about the call
        for path in self.plan.bypassed:
            # before every other hook on the block's output: it belongs to what the block gives
            self.after(self.places.module(path), partial(self._on_block_end, path), front=True)
        for index, module in enumerate(self.places.behind):
            self.after(module, partial(self._on_behind, index), front=True)

    def _make(self) -> None:
        super()._make()
        self.mark_ends()
        self.edited = [
            (self.places.module(path), "_forward_pre_hooks" if side == "input" else "_forward_hooks")
            for path, side in self.places.at
            if side in ("input", "output")
        ]

    def open(self, hooks: Sequence[OwnHook]) -> None:
        """Install the hooks, in front of everybody else's."""
        self.acted, self.called, self.failed, self.between = set(), False, False, None
        self.entered = [True]
        for edit in self.plan.selective:
            edit.watch_selection(True)
        try:
            super().open(hooks)
            with CHANGING:
                self._lead()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the hooks and forget every tensor."""
        super().close()
        self.entered[0] = False
        self.between = None

    def _lead(self) -> None:
        for module, name in self.edited:
            hooks = module.__dict__[name]
            if len(hooks) > 1:
                lead(hooks)

    # ----------------------------------------------------------------------------------------- calls

    def began(self, step: Any, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A call starts: hooks that others have put in front of ours since then go behind them again."""
        self.called = True
        for module, name in self.edited:
            hooks = module.__dict__[name]
            if hooks and not isinstance(next(iter(hooks)), OwnId):
                with CHANGING:
                    lead(hooks)

    def ended(self, step: Any, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """A call is over."""
        for info in step.told.values():
            info.returned(output)
        if step.checkpointed:
            refuse_later_backward(output, self.entered)
        if self.which == "last":
            for place, total in self.totals.items():
                fired = step.fired.get(place, 0)
                if fired and fired != total:
                    raise RuntimeError(
                        f"calls='last' at {place[0]!r} expected the {total} calls that were counted in an earlier pass, this "
                        f"one had {fired}. Remedy: calls=<the number of the call>."
                    )
        if get_ident() == self.owner:
            self.between = step

    def broken(self, step: Any) -> None:
        """A call that failed says nothing about what it did not reach."""
        self.failed = True

    def outside(self) -> Any:
        """What runs in no call knows what the last one was given: a pass that is run again for gradients, say."""
        self.called = True
        if self.between is None:
            self.between = EditStep()
        return self.between

    # ------------------------------------------------------------------------------------------ hooks

    def _on_begin(self, path: str, module: nn.Module, args: tuple, kwargs: Any = None) -> None:
        super()._on_begin(path, module, args, kwargs)
        if path in self.plan.owners:
            self._on_call(path, module, args, kwargs)

    def _on_call(self, owner: str, module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        step = None if kwargs is None else self.step()
        if step is None or kwargs is None:
            return
        self.learn(step, owner, self.plan.owners[owner].names, args, kwargs)

    def on_block(self, path: str, module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        """A block begins: what an earlier call that failed has left is gone."""
        super().on_block(path, module, args, kwargs)
        if (step := self.step()) is not None:
            step.past_block.pop(path, None)

    def _on_block_end(self, path: str, module: nn.Module, args: tuple, output: Any) -> Any:
        step = self.step()
        changes = None if step is None else step.past_block.pop(path, None)
        value = read_output(args, {}, output) if changes else None
        if value is None or not changes:
            return output
        for change in changes:
            # a part of the block may work on flattened tokens
            value = value + parted_like(change.reshape(value.shape), value)
        return write_output(args, {}, output, value)

    def _on_behind(self, index: int, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        step = self.step()
        for change in [] if step is None else step.past_module.pop(index, []):
            output = output + parted_like(change.to(output.dtype).to(output.device), output)
        return output

    def visit(self, place: Place, args: tuple, kwargs: dict, output: Any) -> Any:
        """Hand the sites of a place to their edits."""
        step = self.step()
        if step is None:
            return None
        count, calls = step.fired.get(place, 0), self.places.at[place][0].calls
        if step is self.between:  # in no call: each time anew
            if (calls > 1 or self.which not in (None, "all")) and runs_again():
                raise RuntimeError(
                    f"{place[0]!r} is run again for gradients (checkpointing), where nothing tells which of its calls it is, and "
                    "so which edit belongs to it. Remedy: model.gradient_checkpointing_disable()."
                )
            count = 0 if count >= calls else count
        step.fired[place] = count + 1
        if count >= calls and (self.which is None or calls > 1):
            raise fired_too_often(self.places.at[place][0], count + 1)
        if calls == 1 and not is_meant(self.which, count, self.totals.get(place)):
            return None
        if step.grad and not step.checkpointed and is_checkpointed():
            step.checkpointed = True
        for planned in self.plan.at[place]:
            entry = planned.entry
            if calls > 1 and entry.call != count:
                continue
            self.refuse_part(entry, args, kwargs, output)
            plain = entry.is_whole and type(output) is Tensor
            before = output if plain else entry.read(args, kwargs, output)
            if before is None:
                raise RuntimeError(
                    f"the site {str(entry.site)!r} expected a tensor at the {entry.side} of {entry.module_path!r}, got none. "
                    "Remedy: choose another module, 'module_output:<path>'."
                )
            value = self.tokens(step, entry, before)
            told = self._info(planned, step).tokens(planned.side)
            turned = is_time_first(self.places.model, entry, value, told, self.places.sites)
            value = value.transpose(0, 1) if turned else value
            for edit in planned.edits:
                value = self._apply(edit, planned, value, step)
            value = value.transpose(0, 1) if turned else value
            self.acted.add(id(planned))
            value = value if value.shape == before.shape else value.reshape(before.shape)
            value = value.contiguous()  # models take views of what they computed
            if entry.bypass:
                step.past_block.setdefault(entry.block_path or "", []).append(value - before)
            if entry.behind is not None:
                change = (value - before).sum(-2) / entry.scale
                step.past_module.setdefault(self.places.behind.index(entry.behind), []).append(change)
            written: Any = value if plain else entry.write(args, kwargs, output, value)
            if place[1] == "input":
                args, kwargs = written
            else:
                output = written
        return (args, kwargs) if place[1] == "input" else output

    def without_effect(self) -> list[str]:
        """What to say of edits that have done nothing since the context was entered, one line each."""
        said = [
            f"{str(planned.entry.site)!r} never fired"
            for planned in self.plan.everything
            if id(planned) not in self.acted and not self.failed
        ]
        for edit in self.plan.selective:
            for site, touched in edit.watch_selection(False).items():
                if not bool(touched):
                    said.append(
                        f"{_name(edit)} at {site!r} found no position {edit.selection()} in any sequence"
                    )
        return said

    def _apply(self, edit: Callable, planned: Planned, value: Tensor, step: EditStep) -> Tensor:
        site = planned.entry.site
        turns = isinstance(edit, Edit) and planned.is_pattern
        given = value.transpose(1, 2) if turns else value
        version = None if given.is_inference() else given._version
        if isinstance(edit, TensorDictModuleBase):
            if isinstance(edit, Edit) and edit.is_plain():  # the short way to the same numbers
                tokens = self._told(planned, given, step).values() if edit.looks_at_tokens() else [None] * 3
                new = edit.computed([given, *tokens, site, planned.entry.groups])
            else:
                told = self._told(planned, given, step)
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
        return new.transpose(1, 2) if turns else new

    def _info(self, planned: Planned, step: EditStep) -> CallInfo:
        """What the nearest part that knows the tokens was given, or else the model: parts may run without being called."""
        return step.told.get(planned.owner) or step.told.get("") or CallInfo()

    def _told(self, planned: Planned, value: Tensor, step: EditStep) -> dict[str, Tensor | None]:
        """What the model's call was given beside an activation."""
        info, special = self._info(planned, step), self.special
        here = value.ndim > 2
        fits = here and special is not None and special.shape == value.shape[:2]
        return {
            "attention_mask": info.mask(value, planned.side) if here else None,
            "input_ids": self._ids(planned, value, step, info) if here else None,
            "special_tokens_mask": special if fits else None,
        }

    def _ids(self, planned: Planned, value: Tensor, step: EditStep, info: CallInfo) -> Tensor | None:
        """The ids of the tokens at an activation; ``None`` where it has no tokens, or nothing tells which they are."""
        if planned.entry.site.image or info.tokens(planned.side) != value.shape[:2]:
            return None  # an image's patches, say
        if info.side != planned.side:
            return info.tensors.get(planned.side + "input_ids")
        embeds = info.tensors.get(planned.side + "inputs_embeds")
        if info.history is not None or not isinstance(embeds, Tensor) or planned.owner not in step.told:
            return info.history
        if planned.owner not in step.embedded:
            model = self.places.model
            around = [step.told[path] for path in planned.around if path in step.told]
            modules = [model.get_submodule(path) for path in (planned.owner, *planned.around)]
            step.embedded[planned.owner] = ids_around(embeds, around, modules)
        return step.embedded[planned.owner]


def _name(edit: Any) -> str:
    return type(edit).__name__ if isinstance(edit, nn.Module) else getattr(edit, "__name__", repr(edit))
