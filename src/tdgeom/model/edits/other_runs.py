"""Edits that take activations from other runs of the model: patching and activation addition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.model.edits.attended_layout import find_acts, match_keys, take_ranks
from tdgeom.model.edits.edit import Edit, Inputs
from tdgeom.model.edits.edit_call import EditCall
from tdgeom.model.positions import Positions, attended_tokens, check_positions, position_mask

__all__ = ["ActivationAddition", "Patch"]


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


class Patch(_FromOtherRuns):
    """Put another run's activations in place (causal mediation: Vig et al. 2020; Meng et al. 2022).

    Positions are matched by their rank among attended tokens, so the two runs may be padded differently. Positions that the
    other run does not have are an error, except in cached steps of ``generate``, where they stay.

    Args:
        source: the other run: a TensorDict with the keys of ``Capture``, or a tensor (B or 1, T, ...) for one site.
        inputs: instead, the other run's model inputs (a mapping or TensorDict); the context runs them when it is entered.
        key: instead, where the module form finds the other run's inputs in the batch.
        source_positions: take the values from these positions of the other run, in order, instead of the same ones.
        patch_fn: ``patch_fn(own, other) -> new``, both (B, T, ...); default ``other``.

    >>> other = torch.tensor([[[1.0], [2.0]]])
    >>> Patch(other, positions="last")(activation=torch.zeros(1, 2, 1)).flatten()
    tensor([0., 2.])
    """

    def __init__(
        self,
        source: TensorDictBase | Tensor | None = None,
        *,
        inputs: Inputs | None = None,
        key: Key | None = None,
        source_positions: Positions | None = None,
        patch_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if (source is not None) + (inputs is not None) + (key is not None) != 1:
            raise ValueError("Patch expects one of source=, inputs= and key=.")
        self.source, self.inputs, self.key, self.patch_fn = source, inputs, key, patch_fn
        self.source_positions = None if source_positions is None else check_positions(source_positions)

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
        features = other.shape[2:-1] if call.is_pattern else other.shape[2:]  # keys are matched below
        if other.shape[0] != value.shape[0] or features != value.shape[2 : 2 + len(features)]:
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
        if same and self.source_positions is None:
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
            theirs, rank = other_mask, call.rank(value)
            used = other_mask & (other_mask.cumsum(1) <= mask.sum(1, keepdim=True))
        if call.is_pattern:
            other = match_keys(
                other, other_mask, mask, value.shape[-1], used, scores=call.is_scores, owner="Patch"
            )
        count = theirs.sum(1, keepdim=True)
        missing = own & (rank >= count)
        if missing.any() and not steps:
            raise ValueError(
                f"Patch at {call.site!r}: the other run has {count.flatten().tolist()} positions to take from, but positions "
                f"up to {int(rank[own].max()) + 1} are to be replaced. Remedy: choose positions= that both runs have."
            )
        usable = (own & ~missing).reshape(*own.shape, *[1] * (value.ndim - 2))
        return torch.where(usable, take_ranks(other, theirs, rank), value)


class ActivationAddition(_FromOtherRuns):
    """Add the difference of two prompts' activations: ``x + coefficient * (positive - negative)`` (Turner et al. 2023).

    The context runs both prompts when it is entered (or, by key, finds them in the batch of the module form).

    Args:
        positive, negative: model inputs (a mapping or TensorDict) or keys of the batch; batches of several prompts are
            averaged.
        reduce: ``"positions"`` adds the difference at each position, matched from the front (both prompts need one length;
            later positions stay); ``"last"`` and ``"mean"`` add one vector, of the last token or the mean over tokens.
        coefficient: what the difference is multiplied by.
    """

    def __init__(
        self,
        positive: Inputs | Key,
        negative: Inputs | Key,
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
        self.positive, self.negative, self.coefficient, self.reduce = positive, negative, coefficient, reduce

    def wanted_runs(self) -> dict[str, Inputs | Key]:
        """The two prompts."""
        return {"positive": self.positive, "negative": self.negative}

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
        acts, mask = find_acts(self.run(name, call), call.site, "ActivationAddition")
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
        if self.reduce != "positions" or value.ndim < 3:
            return value + self.coefficient * vector
        rank = call.rank(value)
        inside = ((rank >= 0) & (rank < vector.shape[0])).reshape(*rank.shape, *[1] * (value.ndim - 2))
        added = self.coefficient * vector[rank.clamp(0, vector.shape[0] - 1)]
        return torch.where(inside, value + added, value)
