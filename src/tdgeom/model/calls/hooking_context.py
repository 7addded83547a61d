"""What ``Capture`` and ``Intervene`` share: a model that stays the user's, its inputs, and one use at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from tdgeom.core.keys import Key
from tdgeom.core.stage_settings import Configured
from tdgeom.model.calls.bound_model import Bound, refuse_compiled
from tdgeom.model.calls.forward_signature import on_one_device
from tdgeom.model.calls.input_device import where_inputs_go
from tdgeom.model.calls.known_places import known_places
from tdgeom.model.calls.model_inputs import InKeys, ModelInputs
from tdgeom.model.calls.position_numbering import SIDES, is_unnumbered, number_padded, on_all_ranks
from tdgeom.model.calls.repeated_calls import CallsSpec, check_calls
from tdgeom.model.calls.site_hooks import SiteHooks
from tdgeom.model.sites import Site
from tdgeom.model.structure.resolved_site import ResolvedSite


class HookingContext(Configured, TensorDictModuleBase):
    """The base of contexts on a model: settings, the model's inputs, and hooks that are open in one place at a time.

    A subclass defines ``resolve``, the sites in a model, in the order in which they are met.
    """

    sites: list[Site]
    calls: CallsSpec
    threads: str
    model_outputs: list[str]
    keep_graph: bool
    withhold: tuple[str, ...]
    optional_in_keys: list[Key]
    module_paths: dict[Site, str]
    _asked_in_keys: InKeys | None
    _bound: Bound
    _session: SiteHooks | None

    def __init__(
        self,
        model: nn.Module,
        *,
        model_outputs: str | Sequence[str] | None,
        keep_graph: bool,
        withhold: Sequence[str],
        in_keys: InKeys | None,
        calls: CallsSpec = None,
        threads: str = "own",
    ) -> None:
        super().__init__()
        if threads not in ("own", "all"):
            raise ValueError(f"threads= expects 'own' or 'all', got {threads!r}.")
        self._set_plain(
            calls=check_calls(calls),
            threads=threads,
            model_outputs=[model_outputs] if isinstance(model_outputs, str) else list(model_outputs or ()),
            keep_graph=keep_graph,
            withhold=tuple(withhold),
            _asked_in_keys=in_keys,
            _session=None,
        )
        self._take(self._bind(model))
        self._name_inputs()

    def _name_inputs(self) -> None:
        """``in_keys``: the model's own inputs and further ones, those that must be there first."""
        inputs, (demanded, optional) = self._bound.inputs, self._further_inputs()
        self._set_plain(optional_in_keys=list(dict.fromkeys([*inputs.optional_keys, *optional])))
        keys: list[Any] = [*inputs.demanded.values(), *demanded, *self.optional_in_keys]
        self._set_keys(in_keys=keys)

    def _further_inputs(self) -> tuple[Sequence[Key], Sequence[Key]]:
        """Keys beside the model's inputs that must be in a batch, and those that may."""
        return (), ()

    def resolve(self, model: nn.Module) -> list[ResolvedSite]:
        """The sites that are meant, in a model."""
        raise NotImplementedError

    def _bind(self, model: nn.Module) -> Bound:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{type(self).__name__} expects an nn.Module, got {type(model).__name__}.")
        refuse_compiled(model, ())
        places = known_places(model, self.resolve(model))
        return Bound(model, places, ModelInputs(model, self, self._asked_in_keys, self.withhold))

    def bind(self, model: nn.Module) -> Any:
        """Give an unpickled context its model again, or another one with the same sites. Returns itself."""
        self._refuse_entered()
        bound, before = self._bind(model), getattr(self, "_all_sites", self.sites)
        if list(dict.fromkeys(entry.site for entry in bound.sites)) != before:
            raise ValueError(f"expected a model with the sites {before}, {type(model).__name__} has others.")
        self._take(bound)
        return self

    def _take(self, bound: Bound) -> None:
        self._set_plain(_bound=bound, module_paths={entry.site: entry.module_path for entry in bound.sites})

    @property
    def model(self) -> nn.Module:
        """The model; an error if pickling has dropped it and no other was given since."""
        return self._bound.require(self)

    @property
    def device(self) -> torch.device | None:
        """Where batches go: to the model's first parameter, or to where it is loaded; None for a model without parameters."""
        return where_inputs_go(self.model)

    @property
    def pad_token_id(self) -> int | None:
        """The padding id that the model's configuration names."""
        return getattr(getattr(self._bound.inputs.called, "config", None), "pad_token_id", None)

    def _arguments(self, tensordict: TensorDictBase) -> tuple[list[Any], dict[str, Any]]:
        model, inputs = self.model, self._bound.inputs
        given: Mapping[str, Any] = inputs.given(tensordict)
        if "position_ids" not in self.withhold:

            def call(entries: Mapping[str, Any]) -> Any:
                args, kwargs = inputs.arguments(entries, tensordict)
                return on_one_device(model)(*args, **kwargs)

            if told := self._masks(given, tensordict):
                given = number_padded(model, given, told, call, inputs.position_names, inputs.owner)
        return inputs.arguments(given, tensordict)

    def _masks(self, given: Mapping[str, Any], tensordict: TensorDictBase) -> dict[str, Any]:
        told = {name: given[name] if name in given else tensordict.get(name, None) for name in SIDES}
        return {name: mask for name, mask in told.items() if mask is not None and name not in self.withhold}

    def is_unnumbered(self, tensordict: TensorDictBase) -> bool:
        """Whether a call on this batch would run the model more often than once, to see how it numbers positions."""
        given: Mapping[str, Any] = self._bound.inputs.given(tensordict)
        masks = {} if "position_ids" in self.withhold else self._masks(given, tensordict)
        return bool(masks) and is_unnumbered(self.model, given, masks)

    def number_on_all_ranks(self, tensordict: TensorDictBase) -> None:
        """See how the model numbers the positions of this batch, which all ranks have been given."""
        with on_all_ranks():
            self._arguments(tensordict)

    def _grad_mode(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.keep_graph else torch.no_grad()

    def _use(self, session: SiteHooks | None) -> None:
        """Note whose hooks are open."""
        self._set_plain(_session=session)

    def _refuse_entered(self) -> None:
        kind = type(self).__name__
        if self._session is not None:
            raise RuntimeError(
                f"this {kind} is already in use (entered, or running): its calls would mix. Remedy: leave the with block "
                f"first, or use a second {kind} of the same model."
            )

    def _refuse_foreign(self, session: SiteHooks) -> None:
        """Raise where other threads have made calls in a block, and its own thread none."""
        if session.foreign:
            kind = type(self).__name__
            raise RuntimeError(
                f"this {kind} was left without one call of its own thread, while another thread called "
                f"{self._bound.name} or parts of it: those calls pass untouched. Remedy: enter the {kind} in the thread "
                f"that calls the model, or {kind}(..., threads='all'); of replicas, give it the DataParallel around the model."
            )

    def _with_named(self, tensordict: TensorDictBase, named: Mapping[str, Tensor]) -> TensorDictBase:
        """A batch with the tensors that were given by keyword."""
        if not named:
            return tensordict
        unknown = sorted(set(named) - set(self.in_keys))
        if unknown:
            raise TypeError(
                f"{type(self).__name__} takes a TensorDict, or the model's inputs by keyword: {self.in_keys}; got {unknown}."
            )
        return tensordict.copy().update(named)

    def _kept(self, value: Tensor) -> Tensor:
        return value if self.keep_graph else value.detach()

    def __getstate__(self) -> dict[str, Any]:
        # hooks belong to the with block, not to copies of this module
        return {**self.__dict__, "_session": None}
