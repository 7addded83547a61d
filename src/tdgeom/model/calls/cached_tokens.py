"""How many tokens came before those of a call, where a model is called with a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import ref

from torch import Tensor

from tdgeom.model.calls.call_tensors import CACHES


def find_cache(arguments: Any) -> Any:
    """The cache among a call's arguments or a model's outputs (a mapping, or an object's attributes); None without one."""
    named = isinstance(arguments, dict | Mapping)
    for name in CACHES:
        has = arguments.get(name) if named else getattr(arguments, name, None)
        if has is not None and not isinstance(has, Tensor | bool | int | str):
            return has
    return None


def told_length(cache: Any) -> int | None:
    """How many tokens a cache says that it holds; None where it says nothing.

    A cache of attention counts its keys. One of states only (Mamba) knows no more than whether it has any.

    >>> import torch
    >>> told_length(None), told_length(((torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4)),)), told_length([torch.zeros(2)])
    (0, 5, None)
    """
    if cache is None:
        return 0
    if isinstance(cache, tuple | list):
        keys = [layer[0] for layer in cache if isinstance(layer, tuple | list) and layer]
        lengths = {key.shape[-2] for key in keys if isinstance(key, Tensor) and key.ndim == 4}
        return lengths.pop() if len(lengths) == 1 and len(keys) == len(cache) else None
    count = getattr(cache, "get_seq_length", None)
    if callable(count):
        try:
            return int(count())
        except (ValueError, TypeError, AttributeError, IndexError):
            pass  # it has layers of states only
    begun = getattr(cache, "has_previous_state", None)
    try:
        return 0 if begun is not None and not (begun() if callable(begun) else begun) else None
    except (ValueError, TypeError):
        return None


class CachedTokens:
    """How many tokens each cache of a context's calls held when the context last saw it."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Callable[[], Any], int]] = {}

    def past(
        self, cache: Any, told: int | None, length: int, width: int | None, position: int | None
    ) -> int | None:
        """Tokens before the ``length`` ones of a call; None where that is not known, or what tells it does not agree.

        Args:
            cache: the call's cache, ``told`` what it says of itself.
            width: columns of the call's (B, S) mask, where it has one; ``position``: the call's own first cache position.
        """
        if cache is None:
            return 0
        if position is not None:
            return position
        here, counted = self.seen.get(id(cache), (None, None))
        counted = counted if here is not None and here() is cache else None
        beside = None if width is None or width < length else width - length
        if told is None:
            known = {number for number in (counted, beside) if number is not None}
            return known.pop() if len(known) == 1 else None
        if told == 0 and counted and beside != 0 and (beside == counted or length == 1):
            return counted if beside == counted else None  # its first layer has no keys to count
        return told

    def holds(self, cache: Any, total: int | None) -> None:
        """Note how many tokens a cache holds after a call."""
        if cache is None or isinstance(
            cache, tuple
        ):  # memories of hidden states: a model reads some tokens again
            return
        self.seen.pop(id(cache), None)
        if total is not None:
            while len(self.seen) >= 2:  # a list of states may be a new one at every step
                self.seen.pop(next(iter(self.seen)))
            try:
                self.seen[id(cache)] = (ref(cache), total)
            except TypeError:  # a list of states
                self.seen[id(cache)] = (lambda: cache, total)
