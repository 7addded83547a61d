"""The same sequences with padding and without it, and how far apart what a model makes of the two lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tdgeom.core.devices import doubled
from tdgeom.numerics.on_host import on_host

Given = Mapping[str, Any]
Seen = list[tuple[str, Tensor]]  # where something was seen, and what


def padding_kinds(mask: Tensor) -> tuple[str, ...]:
    """Where the rows of a (B, T) mask are padded: some of "left", "right" and "inside".

    >>> padding_kinds(torch.tensor([[0, 1, 1], [1, 0, 1]]))
    ('left', 'inside')
    """
    here = on_host(mask).bool()
    if bool(here.all()):
        return ()  # the usual case, told at once
    first, last = here.int().argmax(-1), here.shape[-1] - 1 - here.flip(-1).int().argmax(-1)
    some = here.any(-1)
    found = ~here[:, 0] & some, ~here[:, -1] & some, (last - first + 1 > here.sum(-1)) & some
    told = torch.stack([kind.any() for kind in found]).tolist()
    return tuple(name for name, there in zip(("left", "right", "inside"), told) if there)


@dataclass
class PaddedAndAlone:
    """Sequences with and without padding: two sets of model inputs, and the masks of both, by name.

    ``rows`` are compared, at their attended tokens; ``decisive`` says whether they are long enough to tell; ``seen`` is what the
    model made of the sequences alone.
    """

    alone: dict[str, Any]
    padded: dict[str, Any]
    masks: dict[str, tuple[Tensor, Tensor]]
    rows: Tensor
    decisive: bool
    seen: Seen = field(default_factory=list)


def padded_and_alone(
    given: Given, masks: Mapping[str, Tensor], kinds: Mapping[str, Sequence[str]]
) -> list[PaddedAndAlone]:
    """For every kind of padding in a batch one of its sequences, as it lies there and cut to its attended tokens.

    Where the inputs of all sequences lie in one tensor (images), the whole batch with more padding and with less; none at all
    where that would say nothing.
    """
    batch = next(iter(masks.values())).shape[0]
    apart = all(v.shape[:1] == (batch,) for v in given.values() if isinstance(v, Tensor) and v.ndim)
    if not apart:  # the images of all sequences lie in one tensor
        return _whole(given, masks, kinds)
    chosen: dict[int, None] = {}
    for name, found in kinds.items():
        mask = masks[name]
        length = mask.sum(-1)
        for kind in found:
            # enough tokens to tell, then as much padding as there is
            missing = mask.shape[1] - length
            fits = _has_kind(mask, kind) & (length > 0)
            score = length.clamp(max=8) * (2 * mask.shape[1]) + missing
            chosen[int(torch.where(fits, score, -1).argmax())] = None
    probes = []
    for row in chosen:
        padded = {k: v[row : row + 1] if isinstance(v, Tensor) and v.ndim else v for k, v in given.items()}
        alone, pairs = dict(padded), {}
        for name, mask in masks.items():
            own = mask[row].nonzero().flatten()
            alone.update(_columns(alone, name, mask.shape[1], own))
            pairs[name] = mask[row, own][None], mask[row : row + 1]
        tokens = min(short.shape[1] for short, _ in pairs.values())
        if tokens:
            probes.append(PaddedAndAlone(alone, padded, pairs, torch.zeros(1, dtype=torch.long), tokens > 1))
    return probes


def _whole(
    given: Given, masks: Mapping[str, Tensor], kinds: Mapping[str, Sequence[str]]
) -> list[PaddedAndAlone]:
    """The whole batch, of which only common padding can be cut: its longest sequences, with padding and without."""
    alone, padded, pairs = dict(given), dict(given), {}
    reference = None
    for name, mask in masks.items():
        common = mask.any(0).nonzero().flatten()
        length, kept = mask.shape[1], mask[:, common]
        alone.update(_columns(alone, name, length, common))
        full = kept.all(-1)
        reference = full if reference is None else reference & full
        extra = int((kept.shape[1] - kept.sum(-1)).max()) if len(common) == length else 0
        if extra:
            padded.update(_extended(padded, name, mask, extra, kinds.get(name, ())))
        pairs[name] = kept, _extended({name: mask}, name, mask, extra, kinds.get(name, ()))[name]
    if reference is None or not bool(reference.any()) or any("inside" in kind for kind in kinds.values()):
        return []
    return [PaddedAndAlone(alone, padded, pairs, reference.nonzero().flatten(), True)]


def _columns(given: Given, name: str, length: int, keep: Tensor) -> dict[str, Tensor]:
    """The entries of one side's tokens, (B, T, ...), at some of their columns."""
    return {k: v[:, keep.to(v.device)] for k, v in given.items() if _of_tokens(k, v, name, length)}


def _extended(given: Given, name: str, mask: Tensor, extra: int, kinds: Sequence[str]) -> dict[str, Tensor]:
    """The entries of one side's tokens with more padding, filled with what stands at padding."""
    if not extra:
        return dict(given)
    row, column = (~mask).nonzero()[0].tolist()
    result = {}
    for key, value in given.items():
        if _of_tokens(key, value, name, mask.shape[1]):
            more = value[row, column].expand(value.shape[0], extra, *value.shape[2:])
            parts = [more if "left" in kinds else None, value, more if "right" in kinds else None]
            result[key] = torch.cat([part for part in parts if part is not None], 1)
    return result


def _of_tokens(key: str, value: Any, name: str, length: int) -> bool:
    same_side = key.startswith("decoder_") == name.startswith("decoder_")
    return isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == length and same_side


def _has_kind(mask: Tensor, kind: str) -> Tensor:
    if kind == "left":
        return ~mask[:, 0]
    if kind == "right":
        return ~mask[:, -1]
    first, last = mask.int().argmax(-1), mask.shape[-1] - 1 - mask.flip(-1).int().argmax(-1)
    return last - first + 1 > mask.sum(-1)


def difference(probe: PaddedAndAlone, side: str, alone: Tensor, padded: Tensor) -> float:
    """Root mean square over tokens of |a - b| / |a|; 0 where the tensors cannot be laid side by side."""
    found = []
    if alone.shape == padded.shape:  # what knows nothing of the tokens, such as an image
        found.append(_relative(*(v.flatten(1) if v.ndim > 1 else v[None] for v in (alone, padded))))
    names = sorted(probe.masks, key=lambda name: ("dec" in name) != ("dec" in side))
    for name in names:
        mask, whole = probe.masks[name]
        short, long = _by_token(alone, mask), _by_token(padded, whole)
        if short is not None and long is not None:
            parts = [
                value[probe.rows.to(value.device)][here[probe.rows].to(value.device)]
                for value, here in ((short, mask), (long, whole))
            ]
            found.append(_relative(*parts))
            break
    return min(found, default=0.0)


def _by_token(value: Tensor, mask: Tensor) -> Tensor | None:
    """(B, T, D) from (B, T, ...), (T, B, ...) or (B·T, ...), padding of the model's own behind left out; else None."""
    batch, length = mask.shape
    if value.ndim > 2 and value.shape[0] == batch and value.shape[1] >= length:
        return value[:, :length].flatten(2)
    if value.ndim > 2 and value.shape[1] == batch and value.shape[0] >= length:
        return value[:length].transpose(0, 1).flatten(2)
    if value.ndim > 1 and value.shape[0] == mask.numel():
        return value.reshape(*mask.shape, -1)
    return None


def _relative(alone: Tensor, padded: Tensor) -> float:
    """(N, D) beside (N, D)."""
    a, b = doubled(alone), doubled(padded)
    known = a.isfinite().all(-1)  # what is no number alone says nothing
    a, b = a[known], b[known]
    if not len(a):
        return 0.0
    size = a.norm(dim=-1)
    size = size.clamp(min=float(size.mean()) * 1e-3)
    error = torch.where(size > 0, (a - b).norm(dim=-1) / size, (a - b).norm(dim=-1))
    found = float(error.square().mean().sqrt())
    return found if found == found else float("inf")
