"""What the running call of a (part of a) model says of its tokens: which are attended, and how many came before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdgeom.core.keys import Key
from tdgeom.model.calls.cached_tokens import CachedTokens, find_cache, told_length
from tdgeom.model.calls.call_tensors import call_tensors
from tdgeom.model.calls.forward_signature import read_signature
from tdgeom.model.padding_masks import UNCOUNTED, UNSEEN, token_mask, unknown_mask

_PADDING = ("src_key_padding_mask", "key_padding_mask")  # true (or -inf) at padding
_NO_PADDING_MASKS = (
    "head_mask",
    "special_tokens_mask",
    "encoder_attention_mask",
    "perm_mask",
    "global_attention_mask",
)


def mask_tellers(model: nn.Module, paths: Iterable[str]) -> dict[str, tuple[tuple[str, ...], list[str]]]:
    """Modules on the way to places at ``paths`` that are given masks; none where the model itself is.

    Path -> names of all arguments, and of those that hold masks.

    >>> class Wrapper(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.inner = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2), 1, enable_nested_tensor=False)
    ...     def forward(self, batch):
    ...         return self.inner(batch["x"], src_key_padding_mask=batch["padding"])
    >>> sorted(mask_tellers(Wrapper(), ["inner.layers.0"])["inner"][1])
    ['mask', 'src_key_padding_mask']
    """
    if _mask_names(model):
        return {}
    found: dict[str, tuple[tuple[str, ...], list[str]]] = {}
    for path in paths:
        parts = path.split(".") if path else []
        for depth in range(1, len(parts) + 1):
            here = ".".join(parts[:depth])
            if here not in found:
                module = model.get_submodule(here)
                found[here] = read_signature(module).names, _mask_names(module)
    return {path: told for path, told in found.items() if told[1]}


def hear(
    infos: Iterable[CallInfo],
    names: Sequence[str],
    masks: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> None:
    """A module inside is called: note the masks among its arguments."""
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    for info in infos:
        info.heard += [(name, named.get(name)) for name in masks]


def _mask_names(module: nn.Module) -> list[str]:
    names = read_signature(module).names
    return [name for name in names if "mask" in name and name not in _NO_PADDING_MASKS]


class CallInfo:
    """One call after another: ``tensors``, what it was given; ``past``, tokens in its cache; ``history``, ids of the whole.

    ``attended`` is (B, past + T), true at attended tokens; ``None`` where nothing speaks of padding, and not a tensor where
    something does that cannot be read.
    """

    def __init__(self) -> None:
        self.tensors: dict[Key, Any] = {}
        self.past: int | None = 0
        self.history: Tensor | None = None
        self.attended: Any = None
        self.side = ""
        self.caches = CachedTokens()
        self.shape: tuple[int, int] | None = None
        self.expects, self.heard = False, list[tuple[str, Any]]()

    def begin(
        self,
        names: Sequence[str],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        expects: bool = False,
    ) -> None:
        """A call starts. ``expects`` says that a mask, if the call itself has none, reaches a module inside (:func:`hear`)."""
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        simple = _only_tensors(named) if len(args) <= len(names) else None
        self.tensors = call_tensors(names, args, kwargs) if simple is None else simple
        self.expects, self.heard = expects, []
        self.side = "decoder_" if "decoder_input_ids" in names else ""
        tokens = [self.tensors.get(self.side + name) for name in ("input_ids", "inputs_embeds")]
        first = next((value for value in tokens if isinstance(value, Tensor) and value.ndim > 1), None)
        self.shape = None if first is None else (first.shape[0], first.shape[1])
        if simple is not None:  # neither a mask nor a cache
            self.past, self.history, self.attended = 0, None if first is None else tokens[0], None
            return
        cache = find_cache(named)
        mask = self.tensors.get(self.side + "attention_mask")
        if self.shape is None:
            self.past, self.history, self.attended = told_length(cache), None, None
            return
        width = mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 2 else None
        position = named.get("cache_position")
        start = int(position.flatten()[0]) if isinstance(position, Tensor) and position.numel() else None
        self.past = self.caches.past(cache, told_length(cache), self.shape[1], width, start)
        self.caches.holds(cache, None if self.past is None else self.past + self.shape[1])
        self._remember(tokens[0])
        self.attended = self._attended(mask)

    def returned(self, output: Any) -> None:
        """The call is over: a cache that it has made holds its tokens."""
        if self.past is not None and self.shape is not None:
            self.caches.holds(find_cache(output), self.past + self.shape[1])

    def _remember(self, ids: Tensor | None) -> None:
        past, history = self.past, self.history
        if ids is not None and past and history is not None and history.shape == (ids.shape[0], past):
            self.history = torch.cat([history, ids], 1)  # pivots may lie in cached tokens
        else:
            self.history = ids

    def _attended(self, mask: Any) -> Any:
        if self.shape is None:
            return None
        batch, length = self.shape
        before = self.attended
        known = before is None or isinstance(before, Tensor)
        if self.past is None:
            return unknown_mask(UNCOUNTED)
        for name in _PADDING:
            padding = self.tensors.get(name)
            if isinstance(padding, Tensor) and padding.shape == self.shape:
                return ~padding if padding.dtype == torch.bool else padding == 0
        found = token_mask(mask, batch, length, self.past)
        if self.past and isinstance(before, Tensor) and before.shape == (batch, self.past):
            new = before.new_ones(batch, length) if found is None else found[:, self.past :]
            return torch.cat(
                [before, new.to(before.device)], 1
            )  # a window hides the first ones from the last
        if found is not None:
            return found
        if mask is not None or (self.past and not known):
            return unknown_mask(UNSEEN)
        if not self.past:
            return None
        first = next(value for value in self.tensors.values() if isinstance(value, Tensor))
        return torch.ones(batch, self.past + length, dtype=torch.bool, device=first.device)

    def told(self, batch: int, length: int) -> Any:
        """``attended`` beside ``length`` tokens of ``batch`` sequences, from what modules inside were given where need be."""
        mask = self.tensors.get(self.side + "attention_mask")
        if self.shape is not None and self.shape != (batch, length):
            return None  # other places than the call's tokens: an image's patches
        if self.attended is not None or mask is not None:
            return self.attended if self.shape is not None else token_mask(mask, batch, length, self.past)
        unread = [name for name in self.tensors if _may_be_padding(name, self.tensors[name], (batch, length))]
        if not self.expects:
            return unknown_mask(UNSEEN) if unread else None
        for name, value in self.heard:
            if value is None:
                continue
            found = self._heard(name, value, batch, length)
            if found is not None:
                return found
            unread.append(name)
        return unknown_mask(UNSEEN) if unread or not self.heard else None

    def _heard(self, name: str, value: Any, batch: int, length: int) -> Tensor | None:
        if name in _PADDING:
            fits = isinstance(value, Tensor) and value.shape == (batch, length)
            return (~value if value.dtype == torch.bool else value == 0) if fits else None
        additive = isinstance(value, Tensor) and value.ndim > 2 and value.is_floating_point()
        return token_mask(value, batch, length, self.past) if additive or name == "attention_mask" else None

    def tokens(self, side: str) -> tuple[int, int] | None:
        """How many sequences and tokens the call has, for the prefix of a site's token ids; ``None`` where it has none."""
        if side == self.side:
            return self.shape
        given = [self.tensors.get(side + name) for name in ("input_ids", "inputs_embeds")]
        return next(((v.shape[0], v.shape[1]) for v in given if isinstance(v, Tensor) and v.ndim > 1), None)

    def mask(self, value: Tensor, side: str) -> Any:
        """``attended`` beside an activation (B, T, ...), for the prefix of a site's token ids."""
        if side == self.side:
            return self.told(value.shape[0], value.shape[1])
        return token_mask(self.tensors.get(side + "attention_mask"), value.shape[0], value.shape[1], 0)

    def recorded(self, read: Iterable[Tensor], keep: Iterable[Key] | None = None) -> dict[Key, Any]:
        """What a record of the call holds beside what was ``read``: its tensors, or those to ``keep``; masks as (B, S)."""
        found = {
            key: value for key, value in self.tensors.items() if isinstance(value, Tensor) or "mask" in key
        }
        shape = self.shape or next(((v.shape[0], v.shape[1]) for v in read if v.ndim > 2), None)
        name = self.side + "attention_mask"
        mask = found.get(name)
        attended = None if shape is None else self.told(*shape)
        if isinstance(mask, Tensor) and isinstance(attended, Tensor) and attended.shape == mask.shape:
            attended = mask  # the user's own
        if attended is not None and any(n in self.tensors for n in _PADDING) and mask is None:
            attended = None  # told by another mask, which is there
        if attended is not None:
            found[name] = attended
        found = {key: value for key, value in found.items() if isinstance(value, Tensor) or key == name}
        return found if keep is None else {key: found[key] for key in (*keep, name) if key in found}


def _only_tensors(named: Mapping[str, Any]) -> dict[Key, Any] | None:
    """The tensors of a call that was given no masks and nothing that holds tensors; ``None`` for every other call."""
    found: dict[Key, Any] = {}
    for name, value in named.items():
        if value is None or value is True or value is False:
            continue
        if not isinstance(value, Tensor) or "mask" in name or name == "cache_position":
            return None
        found[name] = value
    return found


def _may_be_padding(name: Key, value: Any, shape: tuple[int, int]) -> bool:
    own = name if isinstance(name, str) else name[-1]
    return (
        "mask" in own and own not in _NO_PADDING_MASKS and isinstance(value, Tensor) and value.shape == shape
    )
