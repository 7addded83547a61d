"""Edits that take activations from other runs of the model: patching and activation addition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.core.wrong_objects import refuse_no_number
from tdgeom.model.edits.attended_layout import (
    Donor,
    find_acts,
    is_donor,
    match_keys,
    take_ranks,
    whole_heads,
)
from tdgeom.model.edits.edit import Edit, Inputs
from tdgeom.model.edits.edit_call import EditCall
from tdgeom.model.positions import Positions, attended_tokens, check_positions, position_mask

__all__ = ["ActivationAddition", "Patch", "check_align", "counted_from_start"]


class _FromOtherRuns(Edit):
    """An edit that keeps what :class:`Intervene` has run for it, until the context ends."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._runs: dict[tuple[str, str], TensorDictBase] = {}

    def receive(self, name: str, site: str, acts: TensorDictBase | None) -> None:
        """Keep the activations of a run."""
        if acts is None:
            self._runs.pop((name, site), None)
        else:
            self._runs[name, site] = acts

    def run(self, name: str, call: EditCall) -> TensorDictBase:
        """The activations of a run."""
        found = self._runs.get((name, call.site or ""))
        if found is None:
            raise RuntimeError(
                f"{type(self).__name__} at {call.site!r} has no other run: Intervene runs its inputs. Remedy: enter Intervene "
                "(or Patch(source=), activations that you have)."
            )
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_runs": {}}


def _unordered(positions: Any) -> bool:
    """Whether a list of positions has one twice, or one before a smaller one."""
    if not isinstance(positions, list | tuple) or not all(type(one) is int for one in positions):
        return False
    split = [one for one in positions if one >= 0], [one for one in positions if one < 0]
    return any(part != sorted(set(part)) for part in split)


class Patch(_FromOtherRuns):
    """Put another run's activations in place (causal mediation: Vig et al. 2020; Meng et al. 2022).

    Positions are counted over attended tokens, so the two runs may be padded differently. Where their texts have different
    lengths, ``align`` says which positions belong together. Positions that the other run does not have are an error, except in
    cached steps of ``generate``, where they stay.

    Args:
        source: the other run: what ``with Capture(...) as source`` gives (of one call), a TensorDict with the keys of
            ``Capture``, or a tensor (B or 1, T, ...) for one site. A run captured with ``heads=`` goes with the same ``heads=``
            here.
        inputs: instead, the other run's model inputs (a mapping or TensorDict); the context runs them when it is entered.
        key: instead, where the module form finds the other run's inputs in the batch.
        source_positions: take the values from these positions of the other run, in order, instead of the same ones.
        align: between texts of different lengths: ``"start"``, a position of one is that of the same number in the other;
            ``"end"``, counted from the last token; or a mapping of positions of this run to positions of the other (negative
            ones from the end), which is then all that is replaced. Needed where lengths differ, unless ``positions`` are plain
            numbers from 0 on (which are those of both) or ``source_positions`` is given.
        patch_fn: ``patch_fn(own, other) -> new``, both (B, T, ...); default ``other``.

    >>> other = torch.tensor([[[1.0], [2.0]]])
    >>> Patch(other, positions="last")(activation=torch.zeros(1, 2, 1)).flatten()
    tensor([0., 2.])
    """

    def __init__(
        self,
        source: Donor | None = None,
        *,
        inputs: Inputs | None = None,
        key: Key | None = None,
        source_positions: Positions | None = None,
        align: str | Mapping[int, int] | None = None,
        patch_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if (source is not None) + (inputs is not None) + (key is not None) != 1:
            raise ValueError("Patch expects one of source=, inputs= and key=.")
        self.source, self.inputs, self.key, self.patch_fn = source, inputs, key, patch_fn
        self.source_positions = None if source_positions is None else check_positions(source_positions)
        self.align = check_align(align)
        if align is not None and source_positions is not None:
            raise ValueError(
                "Patch takes source_positions=, values in order, or align=, which position is which; not both."
            )
        for name, given in (("positions", settings.get("positions")), ("source_positions", source_positions)):
            if source_positions is not None and _unordered(given):
                raise ValueError(
                    f"Patch(source_positions=) fills positions in ascending order, got {name}={given!r}. Remedy: "
                    "align={position: other position} says which is which."
                )
        if isinstance(align, Mapping) and self.selects():
            raise ValueError(
                "Patch(align={own: other}) says itself which positions are replaced. Remedy: leave positions= out."
            )

    def wanted_runs(self) -> dict[str, Inputs | Key]:
        """The other run, unless it was given."""
        wanted = self.inputs if self.key is None else self.key
        return {} if wanted is None else {"source": wanted}

    def replace(self, value: Tensor, call: EditCall) -> Tensor:
        """The other run's activations where they are wanted."""
        source = self.run("source", call) if self.source is None else self.source
        other, other_mask = find_acts(source, call.site, "Patch")
        other = other.to(value)
        if other.shape[0] == 1 and value.shape[0] > 1:
            other = other.expand(value.shape[0], *other.shape[1:])
            other_mask = None if other_mask is None else other_mask.expand(value.shape[0], -1)
        if self.heads is not None and value.ndim == other.ndim == 4:
            other = whole_heads(other, value.shape[2], self.heads_here(call), call.groups, "Patch", call.site)
        features = other.shape[2:-1] if call.is_pattern else other.shape[2:]  # keys are matched below
        if (
            other.ndim != value.ndim
            or other.shape[0] != value.shape[0]
            or features != value.shape[2 : 2 + len(features)]
        ):
            raise ValueError(
                f"Patch at {call.site!r} expected activations ({value.shape[0]}, T, {', '.join(map(str, value.shape[2:]))}), "
                f"got {tuple(other.shape)}."
            )
        aligned = self._align(value, call, other, other_mask)
        return aligned if self.patch_fn is None else self.patch_fn(value, aligned)

    def _align(self, value: Tensor, call: EditCall, other: Tensor, other_mask: Tensor | None) -> Tensor:
        if value.ndim < 3:
            return other
        same = call.mask is None and other_mask is None and value.shape == other.shape
        if same and self.source_positions is None and not isinstance(self.align, Mapping):
            return other
        mask, other_mask = call.attended(value), attended_tokens(other_mask, other)
        steps = mask.shape[1] - value.shape[1]
        own = mask[:, steps:] if call.keep is None else call.keep
        if self.source_positions is not None:
            theirs, _ = position_mask(
                other_mask, self.source_positions, image=getattr(call.site, "image", None)
            )
            rank, used = own.cumsum(1) - 1, theirs
        else:
            theirs = other_mask
            own, rank = self._matched(own, call.rank(value), mask, other_mask, steps, call)
            used = other_mask & (other_mask.cumsum(1) <= mask.sum(1, keepdim=True))
        if call.is_pattern:
            other = match_keys(
                other, other_mask, mask, value.shape[-1], used, scores=call.is_scores, owner="Patch"
            )
        count = theirs.sum(1, keepdim=True)
        missing = own & ((rank >= count) | (rank < 0))
        if missing.any() and not steps:
            raise ValueError(
                f"Patch at {call.site!r}: the other run has {count.flatten().tolist()} positions to take from, and none for the "
                f"positions {call.rank(value)[missing].unique().tolist()[:12]} of this run{self._matching()}. Remedy: choose "
                "positions= that have one in both runs."
            )
        usable = (own & ~missing).reshape(*own.shape, *[1] * (value.ndim - 2))
        return torch.where(usable, take_ranks(other, theirs, rank), value)

    def _matching(self) -> str:
        if self.source_positions is not None:
            return ", taken in order"
        return {"end": ", counted from the last token"}.get(str(self.align), "")

    def _matched(
        self, own: Tensor, rank: Tensor, mask: Tensor, theirs: Tensor, steps: int, call: EditCall
    ) -> tuple[Tensor, Tensor]:
        """The positions to replace, (B, T), and the rank in the other run that belongs to each."""
        lengths = mask.sum(1, keepdim=True), theirs.sum(1, keepdim=True)
        if isinstance(self.align, Mapping):
            wanted, moved = torch.zeros_like(own), rank.clone()
            for here, there in self.align.items():
                at = own & (rank == (here if here >= 0 else lengths[0] + here))
                if not steps and not bool(at.any(1).all()):
                    raise ValueError(
                        f"Patch at {call.site!r}: a text has no position {here} of align={self.align!r}."
                    )
                wanted, moved = (
                    wanted | at,
                    torch.where(at, there if there >= 0 else lengths[1] + there, moved),
                )
            return wanted, moved
        if self.align == "end":
            return own, rank + lengths[1] - lengths[0]
        if (
            self.align is None
            and not steps
            and not counted_from_start(self.positions)
            and bool((lengths[0] != lengths[1]).any())
        ):
            raise ValueError(
                f"Patch at {call.site!r}: the texts of this run have {lengths[0].flatten().tolist()} tokens, those of the other "
                f"{lengths[1].flatten().tolist()}: which position is which? Remedy: align='start', align='end' or align={{own "
                "position: other position}; or source_positions=."
            )
        return own, rank


def check_align(align: Any) -> str | dict[int, int] | None:
    """``None``, "start", "end" or a mapping of positions; anything else is an error."""
    if isinstance(align, Mapping) and align and all(type(p) is int for pair in align.items() for p in pair):
        return dict(align)
    if align in (None, "start", "end") and not isinstance(align, Mapping):
        return align
    raise ValueError(f"align= expects 'start', 'end' or a mapping of positions, own to other, got {align!r}.")


def counted_from_start(positions: Positions) -> bool:
    """Whether positions are numbers counted from the first token, the same in texts of any length.

    >>> counted_from_start([0, 3]), counted_from_start("last"), counted_from_start(slice(1, None))
    (True, False, False)
    """
    if isinstance(positions, int):
        return positions >= 0
    if isinstance(positions, slice):
        return (positions.start or 0) >= 0 and positions.stop is not None and positions.stop >= 0
    if isinstance(positions, list | tuple | range):
        return all(isinstance(p, int) and p >= 0 for p in positions)
    return isinstance(positions, str) and positions in ("first", "cls")


class ActivationAddition(_FromOtherRuns):
    """Add the difference of two prompts' activations: ``x + coefficient * (positive - negative)`` (Turner et al. 2023).

    The context runs both prompts when it is entered (or, by key, finds them in the batch of the module form); what has been
    captured of them is taken as it is.

    Args:
        positive, negative: model inputs (a mapping or TensorDict), keys of the batch, or activations as for :class:`Patch`;
            batches of several prompts are averaged.
        reduce: ``"positions"`` adds the difference at each position, matched from the front (both prompts need one length;
            later positions stay); ``"last"`` and ``"mean"`` add one vector, of the last token or the mean over tokens.
        coefficient: what the difference is multiplied by.
    """

    def __init__(
        self,
        positive: Inputs | Key | Donor,
        negative: Inputs | Key | Donor,
        *,
        coefficient: float = 1.0,
        reduce: str = "last",
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if reduce not in ("positions", "last", "mean"):
            raise ValueError(
                f"ActivationAddition: reduce= expects 'positions', 'last' or 'mean', got {reduce!r}."
            )
        refuse_no_number("ActivationAddition", "coefficient", coefficient)
        self.positive, self.negative, self.coefficient, self.reduce = positive, negative, coefficient, reduce

    def wanted_runs(self) -> dict[str, Inputs | Key]:
        """Those of the two prompts that nobody has run."""
        sides: dict[str, Any] = {"positive": self.positive, "negative": self.negative}
        return {name: side for name, side in sides.items() if not is_donor(side)}

    def direction(self, call: EditCall) -> Tensor:
        """The difference at a site: (D,), or (T, D) with ``reduce="positions"``."""
        positive, negative = (self._side(name, call) for name in ("positive", "negative"))
        if positive.shape != negative.shape:
            raise ValueError(
                f"ActivationAddition(reduce='positions') needs prompts of one length, got {positive.shape[0]} and "
                f"{negative.shape[0]} tokens. Remedy: pad the texts with spaces, or reduce='last' or 'mean'."
            )
        return positive - negative

    def _side(self, name: str, call: EditCall) -> Tensor:
        given: Any = getattr(self, name)
        source = given if is_donor(given) else self.run(name, call)
        acts, mask = find_acts(source, call.site, "ActivationAddition")
        if acts.ndim < 3:
            return acts.mean(0)
        whole = attended_tokens(mask, acts)
        if self.reduce == "positions":
            if not whole.all():
                raise ValueError("ActivationAddition(reduce='positions') needs prompts without padding.")
            return acts.mean(0)
        keep, _ = position_mask(whole, "last" if self.reduce == "last" else "all")
        weight = (keep / keep.sum(1, keepdim=True)).reshape(*keep.shape, *[1] * (acts.ndim - 2))
        return (acts * weight.to(acts)).sum(1).mean(0)

    def replace(self, value: Tensor, call: EditCall) -> Tensor:
        """``x + coefficient * (positive - negative)``."""
        vector = self.direction(call).to(value)
        if (
            vector.shape[-(value.ndim - 2) :] != value.shape[2:]
            if value.ndim > 2
            else vector.shape != value.shape[1:]
        ):
            raise ValueError(
                f"ActivationAddition expected activations of {tuple(value.shape[min(2, value.ndim - 1) :])} a position at "
                f"{call.site!r}, got a difference of shape {tuple(vector.shape)}."
            )
        if self.reduce != "positions" or value.ndim < 3:
            return value + self.coefficient * vector
        rank = call.rank(value)
        inside = ((rank >= 0) & (rank < vector.shape[0])).reshape(*rank.shape, *[1] * (value.ndim - 2))
        added = self.coefficient * vector[rank.clamp(0, vector.shape[0] - 1)]
        return torch.where(inside, value + added, value)
