"""Ablation: an activation replaced by nothing, by a mean, or by another text's."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from tdgeom.core.devices import doubled
from tdgeom.model.edits.attended_layout import Donor, find_acts, match_keys, take_ranks, whole_heads
from tdgeom.model.edits.edit import Edit
from tdgeom.model.edits.edit_call import EditCall
from tdgeom.model.positions import attended_tokens

__all__ = ["Ablate"]


class Ablate(Edit):
    """Replace by zero, by a mean, or by values drawn from elsewhere.

    Args:
        how: ``"zero"``; ``"mean"``, the mean over all attended rows of the reference (of patterns, over its texts, query by
            query); ``"resample"``, for each sequence the values of another sequence (of the reference, if one is given) at
            the same position among attended tokens (Chan et al. 2022, causal scrubbing). Where that sequence is shorter it
            is gone through again from its first token.
        reference: what ``with Capture(...) as reference`` gives (of one call), a TensorDict with the keys of ``Capture``
            (``("acts", site)`` and, where there is padding, ``"attention_mask"``), or a tensor (B, T, ...); one captured with
            ``heads=`` goes with the same ``heads=`` here. ``"resample"`` without one draws from the batch itself.
        seed: of the draw.

    >>> Ablate("mean", reference=torch.tensor([[[1.0], [3.0]]]))(activation=torch.zeros(1, 1, 1))
    tensor([[[2.]]])
    """

    def __init__(
        self,
        how: str = "zero",
        *,
        reference: Donor | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if how not in ("zero", "mean", "resample"):
            raise ValueError(f"Ablate: how= expects 'zero', 'mean' or 'resample', got {how!r}.")
        if how == "mean" and reference is None:
            raise ValueError("Ablate('mean') needs reference=, activations to take the mean of.")
        if how == "zero" and reference is not None:
            raise ValueError(
                "Ablate('zero') takes no reference=: zeros come from nowhere. Remedy: how='mean'."
            )
        self.how, self.reference, self.seed = how, reference, seed

    def replace(self, value: Tensor, call: EditCall) -> Tensor:
        """Zeros, the reference's mean, or drawn sequences."""
        if self.how == "zero":
            return torch.zeros_like(value)
        if self.how == "resample" or self.reference is None:
            return self._drawn(value, call)
        acts, own = self._acts(value, call)
        if call.is_pattern:
            return self._mean_pattern(value, call, acts, own)
        if acts.shape[2:] != value.shape[2:]:
            raise ValueError(
                f"Ablate('mean') at {call.site} replaces values of shape {tuple(value.shape[2:])} a position, its reference "
                f"holds {tuple(acts.shape[2:])}. Remedy: capture the reference whole, or with the heads= that are ablated."
            )
        rows = acts.flatten(0, 1) if own is None or acts.ndim < 3 else acts[own.bool().to(acts.device)]
        return doubled(rows).mean(0).to(value).expand_as(value)

    def _acts(self, value: Tensor, call: EditCall) -> tuple[Tensor, Tensor | None]:
        """The reference's activations with all heads at their places, and its mask."""
        acts, own = find_acts(cast(Donor, self.reference), call.site, "Ablate")
        if self.heads is not None and value.ndim == acts.ndim == 4:
            acts = whole_heads(acts, value.shape[2], self.heads_here(call), call.groups, "Ablate", call.site)
        return acts, own

    def _mean_pattern(self, value: Tensor, call: EditCall, acts: Tensor, own: Tensor | None) -> Tensor:
        # a mean over queries would let the first ones attend to what comes after them
        padded = any(m is not None and not bool(m.bool().all()) for m in (call.mask, own))
        if padded or acts.shape[1:] != value.shape[1:]:
            raise ValueError(
                f"Ablate('mean') at {call.site} takes the mean over texts, query by query and key by key: it needs texts of one "
                f"length without padding, here {tuple(value.shape[1:2])} and in the reference {tuple(acts.shape[1:2])} positions"
                f"{', with padding' if padded else ''}. Remedy: such texts, how='resample', or ablate 'z'."
            )
        mean = doubled(acts).mean(0)
        if call.is_scores:
            blocked = (acts <= torch.finfo(acts.dtype).min / 2).any(0)
            mean = mean.masked_fill(blocked, torch.finfo(value.dtype).min)
        return mean.to(value).expand_as(value)

    def _drawn(self, value: Tensor, call: EditCall) -> Tensor:
        generator, mask = torch.Generator().manual_seed(self.seed), call.mask
        if self.reference is None:
            if value.shape[0] < 2:
                raise ValueError(
                    "Ablate('resample') from the batch itself needs two sequences or more. Remedy: reference=."
                )
            shift = int(torch.randint(1, value.shape[0], (1,), generator=generator, device="cpu"))
            acts, theirs = value, mask
            drawn, drawn_mask = value.roll(shift, 0), None if mask is None else mask.roll(shift, 0)
        else:
            acts, theirs = self._acts(value, call)
            chosen = torch.randint(acts.shape[0], (value.shape[0],), generator=generator, device="cpu")
            drawn, drawn_mask = acts.to(value)[chosen], None if theirs is None else theirs[chosen]
        free = 1 if value.ndim < 3 else 2  # axes that may differ: examples, and positions where there are any
        if drawn.ndim != value.ndim or (not call.is_pattern and drawn.shape[free:] != value.shape[free:]):
            raise ValueError(
                f"Ablate('resample') expected a reference (n, {', '.join(map(str, value.shape[1:]))}) at {call.site!r}, got "
                f"{tuple(acts.shape)}."
            )
        if value.ndim < 3 or (mask is None and drawn_mask is None and drawn.shape == value.shape):
            return drawn
        mask, drawn_mask = call.attended(value), attended_tokens(drawn_mask, drawn)
        if self.reference is None and mask.shape[1] > value.shape[1]:
            return drawn  # a step with a cache: every sequence is at its newest token
        count = drawn_mask.sum(1, keepdim=True).clamp(min=1)
        if call.is_pattern:
            rows = drawn_mask & (drawn_mask.cumsum(1) <= mask.sum(1, keepdim=True))
            drawn = match_keys(
                drawn, drawn_mask, mask, value.shape[-1], rows, scores=call.is_scores, owner="Ablate"
            )
        return take_ranks(drawn, drawn_mask, call.rank(value) % count)
