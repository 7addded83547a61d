"""Intervene: change a model's activations, as a TensorDict module or around the user's own calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey
from torch import nn

from tdgeom.model.calls.bound_model import Bound, eval_mode, refuse_compiled
from tdgeom.model.calls.call_entries import write_entries
from tdgeom.model.calls.model_inputs import input_keys, model_inputs
from tdgeom.model.calls.reading import read_named_outputs
from tdgeom.model.capture import Capture
from tdgeom.model.edits.edit import Edit
from tdgeom.model.edits.writing import EditSession
from tdgeom.model.sites import LayerSpec, Site
from tdgeom.model.structure.resolve import resolve_sites
from tdgeom.model.calls.structure_check import verify

EditLike = nn.Module | Callable[[torch.Tensor], torch.Tensor]


class Intervene(TensorDictModuleBase):
    """Edits named places of a model: a TensorDict module, and a context manager around the user's own calls.

    **Context form**, ``with intervene:``: every call of the model (each step of ``generate``) runs with the edits; nothing
    else about the call changes, and everything is as it was when the block ends, whatever ended it.

    **Module form**, ``intervene(td)``: runs the model on the batch as :class:`Capture` does, with the edits, and writes the
    ``model_outputs``.

    **Order.** Edits of one place run in the order of the mapping and of the lists in it; an edit sees what earlier edits left.
    Places are met in the order in which the model reaches them. Several contexts act in the order in which they were entered:
    a ``Capture`` entered inside reads what the edits left, one entered outside reads what came in (later sites show the
    consequences in both). Contexts unwind in reverse.

    Args:
        model: any ``nn.Module`` that is not compiled. It stays the user's.
        edits: site or kind -> edit or list of edits. An edit is a stage that reads and writes ``"activation"``
            (:class:`Steer`, :class:`Patch`, ...), or any module or function from the site's tensor to the new one.
        layers: which layers kinds stand for, as for :class:`Capture`.
        model_outputs: the model's outputs that the module form writes.
        keep_graph: keep the autograd graph in module form (to train a steering vector, say).
        withhold, in_keys: as for :class:`Capture`.
        out_keys: a list of keys for ``model_outputs``.

    Positions of edits count attended tokens of the whole sequence, also in cached steps. An edit never changes tensors in
    place, and one that does is an error. Other runs that edits ask for (``Patch(inputs=)``, ``ActivationAddition``) are made
    when the context is entered, without its own edits.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> with Intervene(model, {"residual_output.1": lambda x: 0 * x}):
    ...     model(torch.ones(1, 2)).abs().sum().item()
    0.0
    """

    def __init__(
        self,
        model: nn.Module,
        edits: Mapping[str, EditLike | Sequence[EditLike]],
        *,
        layers: LayerSpec = "all",
        model_outputs: str | Sequence[str] = "logits",
        keep_graph: bool = False,
        withhold: Sequence[str] = (),
        in_keys: Sequence[NestedKey] | Mapping[str, NestedKey] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"Intervene expects an nn.Module, got {type(model).__name__}.")
        if not isinstance(edits, Mapping) or not edits:
            raise ValueError(f"Intervene expects a mapping from sites to edits, got {edits!r}.")
        refuse_compiled(model, ())
        plan, found = [], []
        for name, given in edits.items():
            listed = list(given) if isinstance(given, list | tuple) else [given]
            for edit in listed:
                if not callable(edit):
                    raise TypeError(f"the edit of {name!r} is no module or function: {edit!r}.")
                reads = getattr(edit, "in_keys", None)
                if isinstance(edit, nn.Module) and reads and "activation" not in reads:
                    kind = type(edit).__name__
                    raise ValueError(
                        f"the edit {kind} of {name!r} reads {list(reads)}, and edits are given 'activation'. Remedy: "
                        f"{kind}(..., in_keys='activation')."
                    )
            for entry in resolve_sites(model, name, layers=layers):
                plan.append((entry, listed))
                found.append(entry)
        self.plan = plan
        # registered, so that vectors follow .to() and trained ones show among the parameters
        self.edits = nn.ModuleList(unique(e for _, es in plan for e in es if isinstance(e, nn.Module)))
        self.sites: list[Site] = unique(entry.site for entry in found)
        self.model_outputs = [model_outputs] if isinstance(model_outputs, str) else list(model_outputs)
        self.keep_graph, self.withhold = keep_graph, tuple(withhold)
        verify(model, found)
        self._bound = Bound(model, found)
        self._session: EditSession | None = None
        self._input_keys = input_keys(model, self._bound.signature, in_keys)
        self.in_keys = [*self._input_keys.values(), *self._batch_keys()]
        self.out_keys = list(self.model_outputs if out_keys is None else out_keys)
        if len(self.out_keys) != len(self.model_outputs):
            raise ValueError(f"out_keys= expected {len(self.model_outputs)} keys, got {len(self.out_keys)}.")

    @property
    def model(self) -> nn.Module:
        """The model; an error if this Intervene was unpickled."""
        return self._bound.require()

    # ------------------------------------------------------------------------------------ other runs

    def _wanted(self) -> list[tuple[Edit, str, str, Any]]:
        return [
            (edit, name, str(entry.site), wanted)
            for entry, edits in self.plan
            for edit in edits
            if isinstance(edit, Edit)
            for name, wanted in edit.wanted_runs().items()
        ]

    def _batch_keys(self) -> list[NestedKey]:
        return unique(wanted for *_, wanted in self._wanted() if isinstance(wanted, str | tuple))

    def _run_others(self, tensordict: TensorDictBase | None) -> None:
        """Run the model on the inputs that edits ask for, once each, and hand the activations over."""
        groups: dict[Any, tuple[TensorDictBase, list]] = {}
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
            sites = unique(site for *_, site in readers)
            capture = Capture(self.model, sites, keep_graph=self.keep_graph, clone=True)
            acts = capture(inputs.copy().auto_batch_size_(0))
            for edit, name, site in readers:
                edit.receive(name, site, acts)

    def _forget_others(self) -> None:
        for edit, name, site, _ in self._wanted():
            edit.receive(name, site, None)

    # ------------------------------------------------------------------------------------- the two forms

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase, **entries: torch.Tensor) -> TensorDictBase:
        """Run the model on a batch with the edits; further tensors (``attention_mask=``) can be given by keyword."""
        model, bound = self._bound.require(), self._bound
        source = tensordict.copy().update(entries) if entries else tensordict
        args, kwargs = model_inputs(
            model,
            bound.signature,
            source,
            self._input_keys,
            withhold=self.withhold,
            number_positions=bound.number_positions,
        )
        grad = nullcontext() if self.keep_graph else torch.no_grad()
        with eval_mode(list(model.modules())), grad:
            self._enter(source)
            try:
                output = model(*args, **kwargs)
            finally:
                self._leave()
        named = read_named_outputs(output, self.model_outputs, lambda v: v if self.keep_graph else v.detach())
        write_entries(tensordict, dict(zip(self.out_keys, named.values(), strict=True)))
        return tensordict

    def __enter__(self) -> Intervene:
        self._enter(None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._leave()

    def _enter(self, tensordict: TensorDictBase | None) -> None:
        model, bound = self._bound.require(), self._bound
        if self._session is not None:
            raise RuntimeError(
                "this Intervene is already in use (entered, or running). Remedy: leave the with block first, or use a "
                "second Intervene of the same model."
            )
        refuse_compiled(model, bound.modules)
        try:
            self._run_others(tensordict)
            special = None if tensordict is None else tensordict.get("special_tokens_mask", None)
            self._session = EditSession(model, self.plan, special)
        except BaseException:
            self._forget_others()
            raise

    def _leave(self) -> None:
        session, self._session = self._session, None
        try:
            if session is not None:
                session.close()
        finally:
            self._forget_others()

    def __getstate__(self) -> dict:
        state = {**self.__dict__, "_session": None}
        return state

    def __deepcopy__(self, memo: dict) -> Intervene:
        raise TypeError(
            "an Intervene is not copied: its edits refer to places of one model. Remedy: make a second one."
        )


def unique(values: Iterable[Any]) -> list[Any]:
    """Each value once, in order."""
    seen, kept = set(), []
    for value in values:
        mark = value if isinstance(value, str | tuple) else id(value)
        if mark not in seen:
            seen.add(mark)
            kept.append(value)
    return kept
