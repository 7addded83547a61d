"""Edits: TensorDict stages that read an activation and write the one to go on with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache, reduce
from numbers import Real
from typing import Any, cast

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdgeom.core.devices import doubled
from tdgeom.core.keys import Key
from tdgeom.core.stage import Stage
from tdgeom.core.wrong_objects import refuse_no_number
from tdgeom.model.edits.edit_call import EditCall
from tdgeom.model.positions import Positions, attended_tokens, check_positions
from tdgeom.model.sites import Site
from tdgeom.model.structure.select_heads import HeadSpec, listed_heads
from tdgeom.numerics.array_arguments import tensor_of

__all__ = ["Edit", "Scale", "Steer", "refuse_other_shape"]

Inputs = Mapping[str, Tensor]
_CALLED = ("__call__", "forward", "with_named", "read", "computed", "write")


class Edit(Stage):
    """The base of all edits: ``edit(value) -> value``, at chosen positions, heads and features.

    Reads ``"activation"``, (B, T, D) or (B, T, H, Dh) at sites with heads, and where present ``"attention_mask"`` (B, S),
    ``"input_ids"``, ``"special_tokens_mask"``, and in words ``"site"`` and ``"groups"`` (query heads that share a head); S may
    exceed T in a step with a cache, and the last T columns are the activation's. Writes ``"activation"``; the tensor that came
    in is never written to. :class:`Intervene` calls edits with these keys, attention scores and patterns as (B, Tq, H, Tk).

    Args:
        positions: where to edit, in the vocabulary of :mod:`tdgeom.model.positions`; a boolean mask of a prompt selects
            nothing in later, cached steps.
        heads: query heads to edit, or a mapping from layers to heads (other layers are left as they are); where queries share
            key/value heads, ``k`` and ``v`` of a head belong to its group.
        features: features to edit: an int, a list of ints or a slice.

    A subclass defines ``edit``, or ``replace(value, call)`` where it has to know its :class:`EditCall`:

        >>> import torch, tdgeom as tg
        >>> class Negate(tg.Edit):
        ...     def edit(self, value):
        ...         return -value
        >>> Negate(positions="last")(activation=torch.ones(1, 3, 1)).flatten()
        tensor([ 1.,  1., -1.])
    """

    reads = ["activation", "attention_mask", "input_ids", "special_tokens_mask", "site", "groups"]
    writes = ["activation"]
    optional = frozenset({"attention_mask", "input_ids", "special_tokens_mask", "site", "groups"})
    shared = frozenset({"attention_mask", "input_ids", "special_tokens_mask"})

    positions: Positions
    heads: list[int] | dict[int, list[int]] | None
    features: Sequence[int] | slice | None

    def __init__(
        self,
        *,
        positions: Positions = "all",
        heads: HeadSpec = None,
        features: int | Sequence[int] | slice | None = None,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self._set_plain(
            positions=check_positions(positions),
            heads=listed_heads(heads),
            features=[features] if isinstance(features, int) else features,
        )

    def edit(self, value: Tensor) -> Tensor:
        """The new activation, everywhere; positions, heads and features are applied by the caller."""
        raise TypeError(f"{type(self).__name__} defines no edit(): return the new activation there.")

    def replace(self, value: Tensor, call: EditCall) -> Tensor:
        """The new activation, for edits that need to know the call; the default calls ``edit``."""
        return self.edit(value)

    def is_plain(self) -> bool:
        """Whether calling the stage is calling ``compute``: nothing is overridden, hooked or renamed."""
        hooked = self._forward_hooks or self._forward_pre_hooks
        named = self.in_keys == self.reads and self.out_keys == self.writes
        return named and not hooked and _calls_compute(cast(Any, type(self)))

    def read(self, tensordict: TensorDictBase) -> list[Any]:
        """The activation, and what the call says beside it."""
        values = [tensordict.get(key, None) for key in self.in_keys]
        if not isinstance(values[0], Tensor):
            return super().read(tensordict)  # says what is missing
        words = [getattr(value, "data", None) for value in values[4:]]
        return [*values[:4], *words, *[None] * (len(self.reads) - len(values))]

    def compute(
        self,
        value: Tensor,
        mask: Tensor | None = None,
        ids: Tensor | None = None,
        special: Tensor | None = None,
        site: str | None = None,
        groups: int | None = None,
    ) -> Tensor:
        """The activation with its new values where they are wanted."""
        call = EditCall(site, groups or 1, mask, ids, special)
        if not (isinstance(self.positions, str) and self.positions == "all"):
            if call.is_elsewhere:
                raise ValueError(
                    f"{type(self).__name__}(positions={self.positions!r}) at {call.site!r}: its positions are those of the other "
                    "sequence, whose mask and tokens this call does not tell. Remedy: positions='all', or a function."
                )
            keep = call.select(value, self.positions, self)
            self.note_selection(call, keep)
            call = dataclasses.replace(call, keep=keep)
        new = self.replace(value, call)
        if new.shape != value.shape:
            raise ValueError(
                f"{type(self).__name__} expected to give the activation's shape {tuple(value.shape)}, gave "
                f"{tuple(new.shape)}."
            )
        new, where = new.to(value.dtype), self.where(value, call)
        return new if where is None else torch.where(where, new, value)

    def where(self, value: Tensor, call: EditCall) -> Tensor | None:
        """True at what is edited, broadcast over the activation; ``None`` for everything."""
        parts = [] if call.keep is None else [call.keep.reshape(*call.keep.shape, *[1] * (value.ndim - 2))]
        if self.heads is not None:
            heads = self.heads_here(call)
            if value.ndim != 4:
                raise ValueError(
                    f"heads={self.heads} needs a site with heads, (B, T, H, Dh), got {tuple(value.shape)} at {call.site!r}. "
                    "Remedy: edit 'z' or 'head_output'."
                )
            count = value.shape[2]
            total = count * call.groups
            own = [(head if head >= 0 else head + total) // call.groups for head in heads]
            if any(not 0 <= head < count for head in own):
                raise IndexError(
                    f"heads={self.heads} is out of range: {call.site!r} has {total} query heads."
                )
            parts.append(_chosen(count, own, value).unsqueeze(-1))
        if self.features is not None:
            parts.append(_chosen(value.shape[-1], self.features, value))
        return reduce(torch.logical_and, parts) if parts else None

    def heads_here(self, call: EditCall) -> list[int]:
        """The query heads to edit at a site; none where ``heads`` says nothing."""
        if not isinstance(self.heads, dict):
            return self.heads or []
        layer = None if call.site is None else Site(call.site).layer
        if layer is None or min(self.heads) < 0:
            raise ValueError(
                f"{type(self).__name__}(heads={self.heads}) needs a site of one layer and layers counted from 0, got "
                f"{call.site!r}. Remedy: a list of heads."
            )
        return self.heads.get(layer, [])

    # ------------------------------------------------------------------------ whether anything was meant

    def selects(self) -> bool:
        """Whether the edit asks for some positions, of which there may be none."""
        return not (isinstance(self.positions, str) and self.positions == "all")

    def looks_at_tokens(self) -> bool:
        """Whether mask and tokens of its calls make a difference to the edit."""
        return self.selects() or not _ignores_tokens(cast(Any, type(self)))

    def selection(self) -> str:
        """The positions asked for, in words."""
        return f"positions={self.positions!r}"

    def note_selection(self, call: EditCall, selected: Tensor) -> None:
        """Note whether any position was selected, without waiting for the answer."""
        noted: dict[str | None, Tensor] | None = self.__dict__.get("_noted")
        if noted is not None:
            found, before = selected.any(), noted.get(call.site)
            noted[call.site] = found if before is None else before.to(found.device) | found

    def watch_selection(self, on: bool) -> dict[str | None, Tensor]:
        """Start or end noting which sites had a selected position; what was noted so far: site -> a boolean tensor."""
        noted = self.__dict__.get("_noted") or {}
        self.__dict__["_noted"] = {} if on else None
        return noted

    # -------------------------------------------------------------------- activations of other runs

    def wanted_runs(self) -> dict[str, Inputs | Key]:
        """Runs of the model that the edit needs beforehand: name -> model inputs, or their key in the batch."""
        return {}

    def receive(self, name: str, site: str, acts: TensorDictBase | None) -> None:
        """Take the activations of a run (a TensorDict of Capture), or forget them (``None``)."""

    def prepare(self, model: nn.Module, sites: Sequence[str], inputs: TensorDictBase | None) -> None:
        """Run what the edit needs to know of its ``sites`` before a context begins; ``inputs`` is the batch of module form."""

    def forget(self) -> None:
        """The context is over: let go of what was run for it."""


@lru_cache(1024)
def _calls_compute(kind: Any) -> bool:
    return all(getattr(kind, name) is getattr(Edit, name) for name in _CALLED)


@lru_cache(1024)
def _ignores_tokens(kind: Any) -> bool:
    """Whether an edit of this class that acts at all positions is known to look at nothing but the activation and the site."""
    usual = all(getattr(kind, name) is getattr(Edit, name) for name in ("compute", "where", "selects"))
    return usual and (kind.replace is Edit.replace or kind.replace is Steer.replace)


def _chosen(size: int, which: Any, value: Tensor) -> Tensor:
    """(size,), true at ``which``."""
    chosen = torch.zeros(size, dtype=torch.bool, device=value.device)
    chosen[which] = True
    return chosen


def refuse_other_shape(edit: Edit, what: str, given: Tensor, value: Tensor, site: str | None) -> None:
    """Raise for what does not lie as the activation does: (D,), (H, Dh) at heads, or as many axes as it has.

    Everything else would be broadcast to something: one number to all features, a vector a class to positions.
    """
    whole = given.ndim == value.ndim and all(a in (1, b) for a, b in zip(given.shape, value.shape))
    own = given.shape in (value.shape[-1:], value.shape[2:]) or whole
    if not given.ndim or given.shape[-1] != value.shape[-1] or not own:
        heads = f", or {tuple(value.shape[2:])} for heads" if value.ndim > 3 else ""
        raise ValueError(
            f"{type(edit).__name__} expected {what} of the {value.shape[-1]} features{heads} at {site!r}, got "
            f"{tuple(given.shape)}."
        )


class Steer(Edit):
    """Add a vector: ``x + coefficient * vector`` (Turner et al. 2023; Rimsky et al. 2023), or to a strength of its own.

    With u the vector at length 1 (along the last axis: at sites with heads each head's for itself):

    - ``coefficient=c``: x + c · vector, whatever x is (the default, c = 1);
    - ``share=s``: x + s · |x| · u, a share of each row's own length;
    - ``target=t``: x + (t - x·u) · u, so that the projection x·u is t everywhere; 0 takes the direction out, as ``ProjectOut``;
    - ``clamp=(low, high)``: the projection where it lies between the two, else the nearer of them (``None``: no end).

    Args:
        vector: (D,), a tensor or array such as ``probe.direction(1)``; at sites with heads also (H, Dh); or with as many axes
            as the activation, (1, T, D) say. A ``Parameter`` stays one, so that a steering vector can be trained.
        coefficient, share, target, clamp: the strength, one of them.
        per_position: ``vector`` is (P, ...), one for each selected position, in their order.

    Raises ``TypeError`` for what is no number, ``ValueError`` for a vector of another shape than the site's, and for a target in
    some ``features`` only.

    >>> Steer(torch.ones(2), coefficient=3.0, positions="first")(activation=torch.zeros(1, 2, 2))
    tensor([[[3., 3.],
             [0., 0.]]])
    >>> Steer(torch.tensor([2.0, 0.0]), target=5.0)(activation=torch.tensor([[[1.0, 7.0]]]))
    tensor([[[5., 7.]]])
    """

    vector: Tensor
    coefficient: float
    per_position: bool
    share: float | None
    target: float | None
    clamp: Any
    _strength: str

    def __init__(
        self,
        vector: Tensor,
        *,
        coefficient: float = 1.0,
        per_position: bool = False,
        share: float | None = None,
        target: float | None = None,
        clamp: tuple[float | None, float | None] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if isinstance(vector, nn.Parameter):
            self.vector = vector
        else:
            self.register_buffer("vector", tensor_of(vector, "Steer", "vector").detach().clone())
        for name, one in (("coefficient", coefficient), ("share", share), ("target", target)):
            if one is not None or name == "coefficient":
                refuse_no_number("Steer", name, one)
        self._set_plain(per_position=per_position, share=share, target=target, clamp=clamp)
        if type(coefficient) is float:
            self._set_plain(coefficient=coefficient)
        else:  # a Parameter is registered
            self.coefficient = coefficient
        own = [name for name in ("share", "target", "clamp") if getattr(self, name) is not None]
        if len(own) + (type(coefficient) is not float or coefficient != 1.0) > 1:
            raise ValueError(
                f"Steer has one strength: coefficient= or {' or '.join(f'{name}=' for name in own)}, not both."
            )
        self._set_plain(_strength=own[0] if own else "coefficient")
        if own and not bool(self.vector.any()):
            raise ValueError(f"Steer({own[0]}=) needs a vector with a direction, got zeros.")
        if clamp is not None:
            ends = [end for end in clamp if end is not None] if isinstance(clamp, tuple | list) else []
            numbers = bool(ends) and all(isinstance(end, Real) and math.isfinite(end) for end in ends)
            if not numbers or len(clamp) != 2 or ends != sorted(ends):
                raise ValueError(
                    f"Steer(clamp=) expects (low, high) with low <= high, one of which may be None, got {clamp!r}."
                )
        for name, one in (("coefficient", coefficient), ("share", share), ("target", target)):
            if isinstance(one, float) and not math.isfinite(one):
                raise ValueError(f"Steer({name}=) is a finite number, got {one!r}.")
        if self._strength in ("target", "clamp") and self.features is not None:
            raise ValueError(
                f"Steer({self._strength}=) sets the projection of whole rows, which features= would cut. Remedy: a vector that "
                "is zero elsewhere."
            )

    def replace(self, value: Tensor, call: EditCall) -> Tensor:
        """``x`` moved along the vector."""
        vector = self.vector.to(value)
        if self.per_position:
            keep = attended_tokens(call.keep, value)
            order = keep.cumsum(1) - 1
            if int(order.max()) >= vector.shape[0]:
                raise ValueError(
                    f"Steer(per_position=True) has {vector.shape[0]} vectors for {int(order.max()) + 1} selected positions."
                )
            refuse_other_shape(self, "vectors", vector[0], value, call.site)
            vector = vector[order.clamp(min=0)]
            if vector.ndim < value.ndim:  # (P, Dh): one for all heads of a position
                vector = vector.unsqueeze(2)
        else:
            refuse_other_shape(self, "a vector", vector, value, call.site)
        if self._strength == "coefficient":
            once = type(self.coefficient) is float and self.coefficient == 1.0
            return value + (vector if once else self.coefficient * vector)
        return value + self._step(doubled(value), doubled(vector)).to(value)

    def _step(self, value: Tensor, vector: Tensor) -> Tensor:
        unit = vector / vector.norm(dim=-1, keepdim=True).clamp(min=1e-300)
        if self.share is not None:
            return self.share * value.norm(dim=-1, keepdim=True) * unit
        along = (value * unit).sum(-1, keepdim=True)
        if self.target is not None:
            return (self.target - along) * unit
        low, high = self.clamp
        return (along.clamp(low, high) - along) * unit


class Scale(Edit):
    """Multiply by a factor: a number, a tensor (D,), (H, Dh) or (H, 1) for heads, or one with as many axes as the activation.

    >>> Scale(2.0, features=0)(activation=torch.ones(1, 1, 2))
    tensor([[[2., 1.]]])
    """

    def __init__(self, factor: float | Tensor, **settings: Any) -> None:
        super().__init__(**settings)
        if not isinstance(factor, np.ndarray | list):
            refuse_no_number("Scale", "factor", factor)
        self.factor = factor if isinstance(factor, Real) else tensor_of(factor, "Scale", "factor")

    def edit(self, value: Tensor) -> Tensor:
        """``factor * x``."""
        if not isinstance(self.factor, Tensor) or not self.factor.ndim:
            return value * self.factor
        factor = self.factor.to(value)
        each = (
            value[..., :1] if factor.shape[-1] == 1 else value
        )  # one number for all features of a head or position
        if factor.ndim > 1 or each is value:
            refuse_other_shape(self, "a factor", factor, each, None)
        return value * factor
