"""Keys of a TensorDict: how they are read, compared, and given to a stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from tensordict.nn import TensorDictSequential
from torch import nn

__all__ = [
    "NOT_WRITTEN",
    "Key",
    "KeyTable",
    "Keys",
    "as_key",
    "key_tuple",
    "optional_in_keys",
    "resolve_keys",
    "site_key",
    "touches",
]

Key: TypeAlias = "str | tuple[str, ...]"
Keys: TypeAlias = "Key | list[Key] | None"  # what in_keys= and out_keys= take


NOT_WRITTEN = "_"  # TensorDict's name for an output that goes nowhere


def key_tuple(key: Key) -> tuple[str, ...]:
    """``"a"`` as ``("a",)``; a tuple stays. Never splits on a dot."""
    return (key,) if isinstance(key, str) else tuple(key)


def as_key(parts: tuple[str, ...]) -> Key:
    """``("a",)`` as ``"a"``; the form in which TensorDict lists its keys."""
    return parts[0] if len(parts) == 1 else parts


def site_key(site: object) -> tuple[str, ...]:
    """A site as the part of a key that it is: a name, a number, or a tuple of both (a model and its site, say).

    >>> site_key("embed"), site_key(3), site_key(("b", 3))
    (('embed',), ('3',), ('b', '3'))
    """
    parts = site if isinstance(site, tuple) else (site,)
    return tuple(str(part) for part in parts)


def touches(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """A key, its parent or its leaf: writing one is writing the other.

    >>> touches(("tokens",), ("tokens", "x")), touches(("tokens", "x"), ("tokens", "y"))
    (True, False)
    """
    return a[: len(b)] == b or b[: len(a)] == a


class KeyTable:
    """Values by key, found by every key that touches theirs; by first elements, to stay linear in the number of keys.

    >>> table = KeyTable(["tokens", ("moments", "x", "mean")])
    >>> list(table.touching(("tokens", "x"))), list(table.touching("moments")), list(table.touching("sample"))
    ([('tokens',)], [('moments', 'x', 'mean')], [])
    """

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self._by_root: dict[str, dict[tuple[str, ...], Any]] = {}
        self._by_place: dict[tuple[str, ...], dict[tuple[str, ...], Any]] = {}  # by two elements
        for key in keys:
            self.add(key)

    def add(self, key: Key, value: Any = None) -> None:
        """Enter a value, or a key alone."""
        parts = key_tuple(key)
        self._by_root.setdefault(parts[0], {})[parts] = value
        if len(parts) > 1:
            self._by_place.setdefault(parts[:2], {})[parts] = value

    def touching(self, key: Key) -> dict[tuple[str, ...], Any]:
        """What is entered under this very key, else under its parents and leaves."""
        parts = key_tuple(key)
        held = self._by_root.get(parts[0], {})
        if parts in held:
            return {parts: held[parts]}
        if len(parts) == 1:
            return dict(held)
        near = self._by_place.get(parts[:2], {})
        root = {parts[:1]: held[parts[:1]]} if parts[:1] in held else {}
        return root | {other: value for other, value in near.items() if touches(other, parts)}


def optional_in_keys(module: nn.Module) -> list[Key]:
    """Those of a module's ``in_keys`` that may be absent.

    A module of any library says so in an attribute of this name; of a sequence they are the keys that no part needs.
    """
    if type(module).__dict__.get("optional_in_keys") is None and isinstance(module, TensorDictSequential):
        held: Any = module.module
        parts: Any = held.values() if isinstance(held, nn.ModuleDict) else held
        needed: set[Key] = set()
        written: set[Key] = set()
        for part in parts:
            needed |= {
                key for key in part.in_keys if key not in written and key not in optional_in_keys(part)
            }
            written |= set(part.out_keys)
        return [key for key in module.in_keys if key not in needed]
    return list(getattr(module, "optional_in_keys", ()))


def _is_key(value: object) -> bool:
    return isinstance(value, str) or (
        isinstance(value, tuple) and len(value) > 0 and all(isinstance(part, str) for part in value)
    )


def resolve_keys(given: Any, defaults: Sequence[Key], *, what: str, owner: str) -> list[Any]:
    """Every leaf key, from a list (all leaves), a single key (the root or the only leaf) or None (the defaults)."""
    names = [key_tuple(key)[-1] for key in defaults]
    if given is None:
        keys = list(defaults)
    elif _is_key(given):
        root = key_tuple(given)
        unnamed = len(defaults) == 1 and (what == "in_keys" or isinstance(defaults[0], str))
        keys = [as_key(root)] if unnamed or what == "in_keys" else [(*root, name) for name in names]
    elif isinstance(given, list) and all(_is_key(key) for key in given):
        keys = [as_key(key_tuple(key)) for key in given]
    else:
        raise TypeError(
            f"{owner}: {what} takes a list of keys (one per leaf: {names}) or a single key (a string or a tuple of "
            f"strings), got {given!r}."
        )
    _refuse_twice(keys if what == "in_keys" else [key for key in keys if key != NOT_WRITTEN], what, owner)
    return keys


def _refuse_twice(keys: Iterable[Key], what: str, owner: str) -> None:
    keys = list(keys)
    if len(set(keys)) != len(keys):
        # dispatch hands the second tensor to both entries, so CKA(x, y) would silently become CKA(y, y).
        raise ValueError(f"{owner}: {what} names a key twice: {keys}. Give every leaf a key of its own.")
