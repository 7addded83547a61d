"""Two runs of a model, paired example by example: what each site holds in both, laid out as in the run to patch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdgeom.model.calls.named_outputs import has_named_output, read_named_outputs
from tdgeom.model.capture import Capture
from tdgeom.model.edits.attended_layout import match_keys, take_ranks
from tdgeom.model.edits.edit_call import EditCall
from tdgeom.model.edits.other_runs import check_align, counted_from_start
from tdgeom.model.positions import Positions, is_position, position_mask, positions_second
from tdgeom.model.sites import LayerSpec, Site, token_side
from tdgeom.model.structure.resolved_site import ResolvedSite


@dataclass(frozen=True)
class Paired:
    """A site in both runs, positions second: ``own`` and ``other`` (B, T, ...), and where there is an ``other`` (B, T).

    ``mask`` (B, T) is true at attended positions of the run to patch. Sites without positions are (B, 1, ...).
    """

    own: Tensor
    other: Tensor
    present: Tensor
    mask: Tensor

    def differs(self) -> Tensor:
        """(B, T, ...), true where the other run holds another number than the own."""
        present = self.present.reshape(*self.present.shape, *[1] * (self.own.ndim - 2))
        return (self.own != self.other) & present


class PairedRuns:
    """A clean and a corrupted run, read once; ``base`` is the one that is patched, with values of ``other``.

    ``output`` names what metrics are functions of: "logits", those at ``logits_at`` (B, V); another output of the model, whole;
    ``None``, what the model gives.
    """

    def __init__(
        self,
        model: nn.Module,
        clean: TensorDictBase,
        corrupted: TensorDictBase,
        sites: Any,
        *,
        layers: LayerSpec = "all",
        direction: str = "denoise",
        align: str | Mapping[int, int] | None = None,
        output: str | None = "logits",
        logits_at: Positions = "last",
    ) -> None:
        self.model, self.output, self.align = model, output, check_align(align)
        self.logits_at = logits_at
        self.batches = {"clean": clean, "corrupted": corrupted}
        self.direction, (self.base, self.other) = direction, direction_runs(direction)
        self.capture = Capture(model, sites, layers=layers, model_outputs=output, clone=True)
        self.read = {name: self.capture(batch.copy()) for name, batch in self.batches.items()}
        counts = [self._count(name) for name in self.batches]
        if counts[0] != counts[1]:
            raise ValueError(
                f"clean and corrupted are paired example by example, got {counts[0]} and {counts[1]} examples."
            )
        self.examples = counts[0]
        self.decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.final = {name: self._final(name) for name in self.batches}

    @property
    def device(self) -> torch.device:
        """Where the model's inputs lie."""
        return next(
            (v.device for v in self.batches[self.base].values() if isinstance(v, Tensor)), torch.device("cpu")
        )

    # ------------------------------------------------------------------------------------------ what metrics see

    def _count(self, name: str) -> int:
        td = self.read[name]
        known = [td.get(key, None) for key in (self.output or "", "decoder_input_ids", "input_ids")]
        first = next((value for value in known if isinstance(value, Tensor)), None)
        if first is None:
            first = next(iter(td["acts"].values()))
        return int(first.shape[0])

    def _final(self, name: str) -> Any:
        if self.output is None:
            with torch.no_grad():
                return self.capture.call_model(self.batches[name].copy())
        value = self.read[name][self.output]
        return value if self.output != "logits" else self.at_place(value, self.places(name))

    def places(self, name: str) -> Tensor | None:
        """(B,), the columns at which logits are read in a run; ``None`` where logits have none."""
        logits = self.read[name][self.output] if self.output == "logits" else None
        if logits is None or logits.ndim != 3:
            return None
        mask = self.tokens(name, "decoder_" if self.decodes else "")
        if mask is None:
            mask = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
        if mask.shape != logits.shape[:2]:
            raise ValueError(
                f"activation patching: the logits {tuple(logits.shape)} are not those of the tokens {tuple(mask.shape)}: which "
                "is the last? Remedy: output=None, and a metric that reads them."
            )
        side = "decoder_" if self.decodes else ""
        keep, _ = position_mask(
            mask,
            self.logits_at,
            input_ids=self.batches[name].get(f"{side}input_ids", None),
            special=self.batches[name].get("special_tokens_mask", None),
        )
        if bool((keep.sum(1) != 1).any()):
            raise ValueError(
                f"logits_at={self.logits_at!r} is one position of each example, got {keep.sum(1).tolist()[:12]}."
            )
        return keep.int().argmax(1)

    def at_place(self, logits: Tensor, places: Tensor | None) -> Tensor:
        """The logits at one position of each row, (n, T, V) -> (n, V); (n, V) stays."""
        if places is None:
            return logits
        return logits[torch.arange(len(logits), device=logits.device), places.to(logits.device)]

    def final_of(self, output: Any, places: Tensor | None) -> Any:
        """What metrics are functions of, from what the model gave for rows whose logits are read at ``places``."""
        if self.output is None:
            return output
        if not isinstance(output, Tensor) and not has_named_output(output, self.output):
            raise ValueError(f"the model gave no {self.output!r} in a patched pass.")
        value = read_named_outputs(output, [self.output])[self.output]
        return value if self.output != "logits" else self.at_place(value, places)

    # ------------------------------------------------------------------------------------------------- tokens

    def tokens(self, name: str, side: str) -> Tensor | None:
        """(B, S), true at the attended tokens of a run; ``None`` where the batch does not tell."""
        mask, ids = (self.batches[name].get(side + key, None) for key in ("attention_mask", "input_ids"))
        if mask is not None and mask.ndim == 2:
            return mask.bool()
        embeds = self.batches[name].get(f"{side}inputs_embeds", None)
        known = next((v for v in (ids, embeds) if isinstance(v, Tensor) and v.ndim > 1), None)
        return None if known is None else torch.ones(known.shape[:2], dtype=torch.bool, device=known.device)

    def is_of_tokens(self, name: str, site: Site, length: int) -> bool:
        """Whether a site's positions are the tokens of the batch: those of an image, or of sound, are its own."""
        mask = None if site.image else self.tokens(name, self.side(site))
        return mask is not None and mask.shape[1] == length

    def side(self, site: Site) -> str:
        """What the names of the mask and ids begin with that a site's positions are counted over."""
        return "" if EditCall(site).is_elsewhere else token_side(site)

    def mask_beside(self, name: str, site: Site, acts: Tensor) -> Tensor:
        """(B, T), true at the attended positions of an activation (B, T, ...)."""
        if self.is_of_tokens(name, site, acts.shape[1]):
            mask = self.tokens(name, self.side(site))
            if mask is not None:
                return mask.to(acts.device)
        return torch.ones(acts.shape[:2], dtype=torch.bool, device=acts.device)

    def words_beside(self, site: Site, length: int) -> dict[str, Any]:
        """Ids and special tokens of the run to patch, where a site's positions are its tokens."""
        batch = self.batches[self.base]
        if not self.is_of_tokens(self.base, site, length):
            return {"input_ids": None, "special": None, "image": site.image}
        ids = batch.get(f"{self.side(site)}input_ids", None)
        special = batch.get("special_tokens_mask", None) if not self.side(site) else None
        return {"input_ids": ids, "special": special, "image": site.image}

    def positions_meant(self, positions: Any) -> Any:
        """Positions, or what a key of the batch holds of them."""
        if isinstance(positions, str) and not is_position(positions):
            held = self.batches[self.base].get(positions, None)
            return positions if held is None else held.bool()
        return positions

    # -------------------------------------------------------------------------------------------------- sites

    def pair(self, entry: ResolvedSite, positions: Any) -> Paired:
        """A site in both runs. Raises where lengths differ, and neither ``positions`` nor ``align`` says what is what."""
        site = entry.site
        own, other = (positions_second(self.read[n]["acts", site], site) for n in (self.base, self.other))
        for name, acts in ((self.base, own), (self.other, other)):
            if acts.ndim < 2 or acts.shape[0] != self.examples:
                raise ValueError(
                    f"activation patching: {str(site)!r} is {tuple(acts.shape)} in the {name} run of {self.examples} examples: "
                    "whose row is whose? Remedy: other sites."
                )
        if own.ndim == 2:
            every = torch.ones(self.examples, 1, dtype=torch.bool, device=own.device)
            return Paired(own[:, None], other[:, None], every, every)
        mask, theirs = self.mask_beside(self.base, site, own), self.mask_beside(self.other, site, other)
        lengths, their_lengths = mask.sum(1, keepdim=True), theirs.sum(1, keepdim=True)
        rank = (mask.cumsum(1) - 1).masked_fill(~mask, -1)
        if bool((lengths != their_lengths).any()):
            if self.align is None and not counted_from_start(positions):
                raise ValueError(
                    f"activation patching at {str(site)!r}: the {self.base} texts have {lengths.flatten().tolist()[:12]} tokens, "
                    f"the {self.other} ones {their_lengths.flatten().tolist()[:12]}: which position is which? Remedy: "
                    f"align='start', align='end' or align={{{self.base} position: {self.other} position}}."
                )
            if EditCall(site).is_pattern and self.align not in (None, "start"):
                raise ValueError(
                    f"activation patching at {str(site)!r}: keys of patterns of unequal lengths are matched from the start. "
                    "Remedy: align='start'."
                )
        there = self._there(rank, lengths, their_lengths)
        present = mask & (there >= 0) & (there < their_lengths)
        if EditCall(site).is_pattern:
            own_keys = self._keys(self.base, site, mask, own)
            their_keys = self._keys(self.other, site, theirs, other)
            used = theirs & (theirs.cumsum(1) <= lengths)
            scores = EditCall(site).is_scores
            other = match_keys(
                other, their_keys, own_keys, own.shape[-1], used, scores=scores, owner="activation patching"
            )
        if not torch.equal(there, theirs.cumsum(1) - 1) or own.shape[1] != other.shape[1]:
            other = take_ranks(other, theirs, there)
        if own.shape != other.shape:
            raise ValueError(
                f"activation patching: {str(site)!r} is {tuple(own.shape)} in one run and {tuple(other.shape)} in the other."
            )
        return Paired(own, other.to(own), present, mask)

    def _keys(self, name: str, site: Site, mask: Tensor, acts: Tensor) -> Tensor:
        """The mask of a pattern's keys: those of its queries, or the other sequence's."""
        if not EditCall(site).keys_elsewhere:
            return mask
        keys = self.tokens(name, "")
        whole = torch.ones(acts.shape[0], acts.shape[-1], dtype=torch.bool, device=acts.device)
        return whole if keys is None or keys.shape != whole.shape else keys.to(acts.device)

    def _there(self, rank: Tensor, lengths: Tensor, their_lengths: Tensor) -> Tensor:
        """(B, T), the rank in the other run that belongs to each position; -1 where none does."""
        if isinstance(self.align, Mapping):
            found = torch.full_like(rank, -1)
            for here, there in self.align.items():
                at = rank == torch.where(lengths * 0 + here >= 0, lengths * 0 + here, lengths + here)
                if not bool(at.any(1).all()):
                    raise ValueError(
                        f"activation patching: an example has no position {here} of align={self.align}."
                    )
                found = torch.where(at, there if there >= 0 else their_lengths + there, found)
            return found
        if self.align == "end":
            return torch.where(rank >= 0, rank + their_lengths - lengths, -1)
        return rank


def direction_runs(direction: str) -> tuple[str, str]:
    """The run that is patched, and the one that values are taken from.

    >>> direction_runs("denoise")
    ('corrupted', 'clean')
    """
    if direction in ("denoise", "denoising"):
        return "corrupted", "clean"
    if direction in ("noise", "noising"):
        return "clean", "corrupted"
    raise ValueError(f"direction= expects 'denoise' or 'noise', got {direction!r}.")


def kinds_of(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """Sites by what their grid is called: kind, with the stack where there are several; or the site itself, of a path."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        kind = f"{site.stack}.{site.kind}" if site.stack else str(site) if site.path else site.kind
        found.setdefault(kind, []).append(site)
    return found
