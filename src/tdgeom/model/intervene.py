"""Intervene: change a model's activations, as a TensorDict module or around the user's own calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch, set_skip_existing
from torch import nn

from tdgeom.core.keys import Key
from tdgeom.core.stage_settings import plain_setting
from tdgeom.core.wrong_objects import refuse_class
from tdgeom.model.calls.bound_model import Bound, eval_mode, modules_within
from tdgeom.model.calls.checked_sites import refuse_edits, resolve_sites
from tdgeom.model.calls.hooking_context import HookingContext
from tdgeom.model.calls.model_inputs import InKeys
from tdgeom.model.calls.named_outputs import read_named_outputs
from tdgeom.model.calls.own_hooks import OwnHook
from tdgeom.model.calls.places import Place
from tdgeom.model.calls.recorded_calls import write_entries
from tdgeom.model.calls.repeated_calls import CallsSpec
from tdgeom.model.capture import Capture
from tdgeom.model.edits.apply_edits import Editing, EditPlan
from tdgeom.model.edits.edit import Edit
from tdgeom.model.sites import LayerSpec, Site
from tdgeom.model.structure.meant_sites import listed_sites
from tdgeom.model.structure.resolve import site_by_path, sites_meant, takes_layers
from tdgeom.model.structure.resolved_site import ResolvedSite

EditLike = nn.Module | Callable[[torch.Tensor], torch.Tensor]
_SPECIAL = "special_tokens_mask"


class Intervene(HookingContext):
    """Edits named places of a model: a TensorDict module, and a context manager around the user's own calls.

    **Context form**, ``with intervene:``: every call of the model (each step of ``generate``) runs with the edits; nothing
    else about the call changes, and everything is as it was when the block ends, whatever ended it.

    **Module form**, ``intervene(td)``: runs the model on the batch as :class:`Capture` does, with the edits, and writes the
    ``model_outputs``.

    **Order.** Edits of one place run in the order of the mapping and of the lists in it; an edit sees what earlier edits left.
    Places are met in the order in which the model reaches them. Several contexts act in the order in which they were entered:
    a ``Capture`` entered inside reads what the edits left, one entered outside reads what came in (later sites show the
    consequences in both). Contexts unwind in reverse. Edits stand in front of everybody else's hooks: whatever else looks at
    the model (its own recorded ``hidden_states``, hooks of other libraries) sees what they left.

    **Calls and threads** as for :class:`Capture`: a call belongs to the thread that began it, another thread's calls pass
    untouched.

    Args:
        model: any ``nn.Module`` that is not compiled. It stays the user's.
        edits: site or kind -> edit or list of edits; ``{}`` for a baseline that changes nothing. An edit is a stage that
            reads and writes ``"activation"`` (:class:`Steer`, :class:`Patch`, ...), or any module or function from the site's
            tensor to the new one.
        layers: which layers kinds stand for, as for :class:`Capture`.
        model_outputs: the model's outputs that the module form writes.
        keep_graph: keep the autograd graph in module form (to train a steering vector, say).
        withhold, in_keys: as for :class:`Capture`.
        out_keys: a list of keys for ``model_outputs``.
        missing: what happens when the block ends and an edited place never fired in it, or an edit with ``positions=`` found
            none of them in any sequence: ``"warn"``, ``"raise"`` or ``"ignore"``.
        calls: which call of a module that runs several times in one pass is edited: ``"first"``, ``"last"``, a number from 0,
            or ``"all"``. Default: such a module is an error. ``"last"`` is known once ``Capture(model, site)(td)`` has counted.
        threads: ``"all"`` edits the calls of every thread in context form, default the entering thread's ``"own"``.
        classes, skip_classes: module classes to take or leave among those that globs match.

    Positions of edits count attended tokens of the whole sequence, also in cached steps. An edit never changes tensors in
    place, and one that does is an error. Other runs that edits ask for (``Patch(inputs=)``, ``ActivationAddition``) are made
    when the context is entered, without its own edits.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> with Intervene(model, {"residual_output.1": lambda x: 0 * x}):
    ...     model(torch.ones(1, 2)).abs().sum().item()
    0.0
    """

    _told_anew = frozenset({"edits"})
    edits: nn.ModuleList
    missing: str
    _layers: LayerSpec
    _asked: dict[str, list[EditLike]]
    _listed: list[list[EditLike]]  # the edits of each place
    _editing: tuple[Editing, list[OwnHook]] | None
    _asking: list[tuple[Edit, Site]]  # edits that may want other runs
    _preparing: list[tuple[Edit, list[str]]]  # edits that run the model themselves, with their sites
    _captures: dict[tuple[str, ...], Capture]

    def __init__(
        self,
        model: nn.Module,
        edits: Mapping[str, EditLike | Sequence[EditLike]],
        *,
        layers: LayerSpec = "all",
        model_outputs: str | Sequence[str] = "logits",
        keep_graph: bool = False,
        withhold: Sequence[str] = (),
        in_keys: InKeys | None = None,
        out_keys: Sequence[Key] | None = None,
        missing: str = "warn",
        calls: CallsSpec = None,
        threads: str = "own",
        classes: Sequence[type[nn.Module]] = (),
        skip_classes: Sequence[type[nn.Module]] = (),
    ) -> None:
        if missing not in ("warn", "raise", "ignore"):
            raise ValueError(f"missing= expects 'warn', 'raise' or 'ignore', got {missing!r}.")
        if not isinstance(edits, Mapping):
            raise ValueError(
                f"Intervene expects a mapping from sites to edits, such as {{'residual_output.3': edit}}, got {edits!r}."
            )
        self._set_plain(
            missing=missing,
            _classes=tuple(classes),
            _skipped=tuple(skip_classes),
            _layers=layers,
            _asked={
                _place(model, name): list(e) if isinstance(e, list | tuple) else [e]
                for name, e in edits.items()
            },
        )
        for name, listed in self._asked.items():
            for edit in listed:
                _check_edit(name, edit)
        super().__init__(
            model,
            model_outputs=model_outputs,
            keep_graph=keep_graph,
            withhold=withhold,
            in_keys=in_keys,
            calls=calls,
            threads=threads,
        )
        modules = [edit for listed in self._asked.values() for edit in listed if isinstance(edit, nn.Module)]
        # registered, so that vectors follow .to() and trained ones show among the parameters
        held = self._modules["edits"] = nn.ModuleList()
        held._modules.update((str(number), edit) for number, edit in enumerate(dict.fromkeys(modules)))
        self._set_plain(sites=list(dict.fromkeys(entry.site for entry in self._bound.sites)))
        self._set_keys(out_keys=list(self.model_outputs if out_keys is None else out_keys))
        if len(self.out_keys) != len(self.model_outputs):
            raise ValueError(f"out_keys= expected {len(self.model_outputs)} keys, got {len(self.out_keys)}.")

    def resolve(self, model: nn.Module) -> list[ResolvedSite]:
        """The places of the edits, in the order of the mapping."""
        chosen: dict[str, Any] = {"classes": self._classes, "skip_classes": self._skipped}
        paths = {name: site_by_path(model, name, layers=self._layers, **chosen) for name in self._asked}
        found = {name: [entry] for name, entry in paths.items() if entry is not None}
        if len(found) < len(paths):
            named = {name: sites_meant(model, name) for name in self._asked}
            applied = any(takes_layers(one) for meant in named.values() for one in meant)
            for name, meant in named.items():  # a concrete name beside kinds has its own layer
                own = self._layers if any(map(takes_layers, meant)) or not applied else "all"
                found[name] = resolve_sites(model, meant, layers=own, **chosen)
            found = {name: found[name] for name in self._asked}
        refuse_edits(model, (entry for entries in found.values() for entry in entries))
        self._set_plain(_listed=[self._asked[name] for name, entries in found.items() for _ in entries])
        return [entry for entries in found.values() for entry in entries]

    def _take(self, bound: Bound) -> None:
        super()._take(bound)
        asking = [
            (edit, entry.site)
            for entry, edits in self.plan
            for edit in edits
            if isinstance(edit, Edit) and type(edit).wanted_runs is not Edit.wanted_runs
        ]
        preparing: dict[Edit, list[str]] = {}
        for entry, edits in self.plan:
            for edit in edits:
                if isinstance(edit, Edit) and type(edit).prepare is not Edit.prepare:
                    preparing.setdefault(edit, []).append(str(entry.site))
        self._set_plain(_editing=None, _captures={}, _asking=asking, _preparing=list(preparing.items()))

    def _further_inputs(self) -> tuple[Sequence[Key], Sequence[Key]]:
        return [wanted for *_, wanted in self._wanted() if isinstance(wanted, str | tuple)], [_SPECIAL]

    def _current(self) -> dict[str, Any]:
        """The settings, with the edits as they are now: a coefficient may have been set since."""
        edits = {name: es[0] if len(es) == 1 else es for name, es in self._asked.items()}
        return {**super()._current(), "edits": plain_setting(edits)}

    @property
    def plan(self) -> list[tuple[ResolvedSite, list[Any]]]:
        """Each place with its edits, in the order of the mapping."""
        return list(zip(self._bound.sites, self._listed))

    # ------------------------------------------------------------------------------------ other runs

    def _wanted(self) -> list[tuple[Edit, str, str, Any]]:
        return [
            (edit, name, str(site), wanted)
            for edit, site in self._asking
            for name, wanted in edit.wanted_runs().items()
        ]

    def _run_others(self, tensordict: TensorDictBase | None) -> None:
        """Run the model on the inputs that edits ask for, once each, and hand the activations over."""
        for edit, places in self._preparing:
            edit.prepare(self.model, places, tensordict)
        if not self._asking:
            return
        groups: dict[Any, tuple[TensorDictBase, list]] = {}
        group: Any
        for edit, name, site, wanted in self._wanted():
            if isinstance(wanted, str | tuple):
                if tensordict is None:
                    raise RuntimeError(
                        f"{type(edit).__name__} looks for the other run's inputs under the key {wanted!r}, which only the "
                        "module form has. Remedy: intervene(td), or give the inputs themselves."
                    )
                inputs, group = tensordict.get(wanted, None), wanted
                if not isinstance(inputs, TensorDictBase):
                    raise KeyError(
                        f"{type(edit).__name__} expected the other run's inputs, a TensorDict, at {wanted!r}."
                    )
            else:
                inputs = (
                    wanted if isinstance(wanted, TensorDictBase) else TensorDict(dict(wanted), batch_size=[])
                )
                group = id(wanted)
            groups.setdefault(group, (inputs, []))[1].append((edit, name, site))
        for inputs, readers in groups.values():
            sites = tuple(dict.fromkeys(site for *_, site in readers))
            if sites not in self._captures:
                self._captures[sites] = Capture(self.model, sites, keep_graph=self.keep_graph, clone=True)
            acts = self._captures[sites](inputs.copy().auto_batch_size_(0))
            for edit, name, site in readers:
                edit.receive(name, site, acts)

    def _forget_others(self) -> None:
        for edit, _ in self._preparing:
            edit.forget()
        if not self._asking:
            return
        for edit, name, site, _ in self._wanted():
            edit.receive(name, site, None)

    # ------------------------------------------------------------------------------------- the two forms

    @dispatch(auto_batch_size=False)
    @set_skip_existing(None)
    def forward(
        self, tensordict: TensorDictBase, tensordict_out: TensorDictBase | None = None, **named: torch.Tensor
    ) -> TensorDictBase:
        """Run the model on a batch with the edits; inputs can also be given by keyword."""
        model, source = self.model, self._with_named(tensordict, named)
        args, kwargs = self._arguments(source)
        with eval_mode(modules_within(model)), self._grad_mode():
            self._enter(source)
            try:
                output = model(*args, **kwargs)
            except BaseException:
                self._leave()
                raise
            self._leave(stacklevel=3)
        values = map(self._kept, read_named_outputs(output, self.model_outputs).values())
        target = tensordict if tensordict_out is None else tensordict_out
        write_entries(target, dict(zip(self.out_keys_source, values, strict=True)), "Intervene")
        return target

    def __enter__(self) -> Intervene:
        self._enter(None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._leave(stacklevel=3 if kind is None else 0)

    def _enter(self, tensordict: TensorDictBase | None) -> None:
        self._bound.refuse_compiled(self)
        self._refuse_entered()
        special = None if tensordict is None else tensordict.get(_SPECIAL, None)
        if self._editing is None:  # made once, however often the context is entered
            plan = EditPlan(self._bound.places, self._listed)
            session = Editing(plan, calls=self.calls, totals=self._totals(), threads=self.threads)
            self._set_plain(_editing=(session, session.make()))
        session, hooks = cast(Any, self._editing)
        try:
            self._run_others(tensordict)
            session.special = special
            session.open(hooks)
            self._use(session)
        except BaseException:
            self._forget_others()
            raise

    def _totals(self) -> dict[Place, int]:
        """How often each place fires, where that tells which call is the last."""
        if self.calls != "last":
            return {}
        known = {place: self._bound.firings(place) for place in self._bound.places.at}
        unknown = [path for (path, _), count in known.items() if count is None]
        if unknown:
            raise RuntimeError(
                f"calls='last' needs to know how often {unknown[0]!r} runs in a pass, which nobody has counted. Remedy: call "
                "Capture(model, <the site>, calls='last')(batch) once, or give the number of the call."
            )
        return {place: count for place, count in known.items() if count is not None}

    def _leave(self, stacklevel: int = 0) -> None:
        """Take the hooks away; with a ``stacklevel``, say what had no effect."""
        session = self._session
        self._use(None)
        if not isinstance(session, Editing):
            return
        try:
            session.close()
            said = session.without_effect()
        finally:
            self._forget_others()
        if not stacklevel:
            return
        if not session.called:
            self._refuse_foreign(session)
        if said and self.missing != "ignore":
            what = f"no call of {self._bound.name} was seen" if not session.called else "; ".join(said[:5])
            text = (
                f"edits of {self._bound.name} had no effect in this block: {what}. Modules run without hooks where they are "
                "skipped, or where compiled code (a torch.compile around the model, called before) runs in their place. "
                "Remedy: call the model that Intervene was given, other sites or positions=, or missing='ignore'."
            )
            if self.missing == "raise":
                raise RuntimeError(text)
            warnings.warn(text, stacklevel=stacklevel)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_editing": None, "_captures": {}}

    def __deepcopy__(self, memo: dict) -> Intervene:
        raise TypeError(
            "an Intervene is not copied: its edits refer to places of one model. Remedy: make a second one."
        )


def _place(model: nn.Module, name: Any) -> Any:
    """The name that a key of the mapping stands for: modules are not kept, their paths are."""
    listed = listed_sites(model, name)
    return listed[0] if len(listed) == 1 else name


def _check_edit(name: str, edit: Any) -> None:
    refuse_class(f"the edit of {name!r}", edit)
    if not callable(edit):
        raise TypeError(f"the edit of {name!r} is no module or function: {edit!r}.")
    reads = getattr(edit, "in_keys", None)
    if isinstance(edit, nn.Module) and reads and "activation" not in reads:
        kind = type(edit).__name__
        raise ValueError(
            f"the edit {kind} of {name!r} reads {list(reads)}, and edits are given 'activation'. Remedy: "
            f"{kind}(..., in_keys='activation')."
        )
