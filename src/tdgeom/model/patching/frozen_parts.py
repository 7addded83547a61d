"""Passes in which the parts of a model give what they gave before, so that a change travels along one path alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdgeom.model.calls.checked_sites import available_sites
from tdgeom.model.capture import Capture
from tdgeom.model.edits.edit import Edit
from tdgeom.model.edits.edit_call import EditCall
from tdgeom.model.intervene import EditLike, Intervene
from tdgeom.model.patching.stream_sums import check_sums
from tdgeom.model.positions import attended_tokens, positions_second
from tdgeom.model.sites import Site, is_pattern, token_side
from tdgeom.model.structure.resolved_site import ADDED_KINDS

# what a sender may be, and the part of its block that gives it to the stream
PART_OF = {
    "z": "attn_output",
    "attn_output": "attn_output",
    "cross_z": "cross_attn_output",
    "cross_attn_output": "cross_attn_output",
    "mlp_act": "mlp_output",
    "mlp_output": "mlp_output",
    "embed": None,
}
THROUGH = ("residual", "mlp")


class Held(Edit):
    """What a site held in an earlier pass, in every row that is not ``free``; ``example`` says whose row each is."""

    def __init__(self, values: Tensor, **settings: Any) -> None:
        super().__init__(**settings)
        self.values = values
        self.example: Tensor | None = None
        self.free: Tensor | None = None

    def replace(self, value: Tensor, call: EditCall) -> Tensor:
        """The earlier values, or in free rows those that came."""
        held = self.values if self.example is None else self.values[self.example.to(self.values.device)]
        if held.shape != value.shape:
            raise ValueError(
                f"path patching at {call.site!r} expected {tuple(held.shape)}, as in the pass before, got {tuple(value.shape)}."
            )
        if self.free is None:
            return held.to(value)
        free = self.free.to(value.device).reshape(-1, *[1] * (value.ndim - 1))
        return torch.where(free, value, held.to(value))


class FrozenParts:
    """One batch, read once; then passes in which nothing but senders changes what the parts of blocks add to the stream.

    ``through="mlp"`` lets MLPs compute anew from what they are given. That streams are the sums of their parts in such a pass is
    checked in the first of them: whatever else could carry a change is an error.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: TensorDictBase,
        senders: Sequence[str],
        receivers: Sequence[str],
        *,
        through: str = "residual",
        model_outputs: str | None = None,
    ) -> None:
        if through not in THROUGH:
            raise ValueError(f"through= expects 'residual' or 'mlp', got {through!r}.")
        self.model, self.inputs, self.checked = model, inputs, False
        found = [entry.site for entry in available_sites(model)]
        self.senders = list(Capture(model, list(senders)).sites)
        self.receivers = list(Capture(model, list(receivers)).sites) if receivers else []
        self.parts = {site: _part_of(site, found, type(model).__name__) for site in self.senders}
        self.streams = [s for s in found if s.kind in ("residual_input", "residual_output", *ADDED_KINDS)]
        self.streams = [s for s in self.streams if self.is_behind(s)]
        held = [
            s for s in self.streams if s.kind in ADDED_KINDS and (s.kind, through) != ("mlp_output", "mlp")
        ]
        read = list(dict.fromkeys([*self.senders, *self.receivers, *self.streams]))
        # some models add to what a part gave in place
        self.capture = Capture(model, read, model_outputs=model_outputs, clone=True)
        self.clean = self.capture(inputs.copy())
        self.held = {site: Held(positions_second(self.clean["acts", site], site)) for site in held}
        self.own = {site: Held(positions_second(self.clean["acts", site], site)) for site in self.senders}

    def is_behind(self, site: Site) -> bool:
        """Whether a site lies in the layer of the first sender or behind it; other stacks may be reached as well."""
        layers = [sender.layer for sender in self.senders if sender.stack == site.stack]
        return site.layer is None or site.layer >= min((-1 if n is None else n for n in layers), default=-1)

    def run(
        self,
        sent: Mapping[str, Sequence[EditLike]],
        inputs: TensorDictBase | None = None,
        example: Tensor | None = None,
        free: Mapping[Site, Tensor] | None = None,
    ) -> TensorDictBase:
        """A pass with edits at senders, everything else held: receivers, streams and outputs, as :class:`Capture` gives them.

        Args:
            sent: sender -> its edits, which get what it held in the first pass.
            inputs: the batch with other rows, of which ``example`` (n,) says whose they are.
            free: sender -> (n,), in which rows it acts; default all.
        """
        acting: dict[Site, Tensor | None] = {}
        for site, part in self.parts.items():
            rows = None if free is None else free[site]
            if part is not None:
                before = acting.get(part, rows)
                acting[part] = None if before is None or rows is None else before | rows
        edits: dict[str, list[EditLike]] = {}
        for site, held in self.held.items():
            if site not in acting or acting[site] is not None:
                held.example, held.free = example, acting.get(site)
                edits[str(site)] = [held]
        for site, own in self.own.items():
            own.example = example
            edits[str(site)] = [*edits.get(str(site), []), own, *sent.get(str(site), [])]
        given = self.inputs if inputs is None else inputs
        with Intervene(self.model, edits, missing="raise"):
            td = self.capture(given.copy())
            if not self.checked:
                whose = None if example is None else example.to(next(iter(self.own.values())).values.device)
                check_sums(self.model, self.streams, td, self.clean, given, whose)
                self.checked = True
        return td

    def changed(self, td: TensorDictBase, site: Site) -> Tensor:
        """(B,), whether a site holds anything else at attended places of a pass of the same rows than it did in the first."""
        before, after = self.clean["acts", site], td["acts", site]
        different = before != after
        if after.ndim > 2 and not is_pattern(site):
            mask = attended_tokens(td.get(token_side(site) + "attention_mask", None), after)
            if mask.shape == after.shape[:2]:
                different = different & mask.reshape(*mask.shape, *[1] * (after.ndim - 2))
        return different.flatten(1).any(1)


def _part_of(site: Site, found: Sequence[Site], name: str) -> Site | None:
    """The part of a block that gives a sender to the stream; ``None`` for the stream's beginning."""
    if site.kind not in PART_OF:
        raise ValueError(
            f"a sender is what a part gives: {', '.join(PART_OF)}, got {str(site)!r}, from which there are several ways. Remedy: "
            "one of these, such as 'z' with heads=."
        )
    kind = PART_OF[site.kind]
    part = None if kind is None else Site.of(kind, site.layer, stack=site.stack)
    if part is not None and part not in found:
        raise ValueError(
            f"path patching from {str(site)!r}: {name} has no {str(part)!r}, which gives it to the stream."
        )
    return part
