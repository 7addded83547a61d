"""Keys of a TensorDict, and how a stage's ``in_keys`` and ``out_keys`` are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

__all__ = ["Key", "as_key", "key_tuple", "resolve_keys"]

Key: TypeAlias = "str | tuple[str, ...]"
Keys: TypeAlias = "Key | list[Key] | None"  # what in_keys= and out_keys= take


def key_tuple(key: Key) -> tuple[str, ...]:
    """``"a"`` as ``("a",)``; a tuple stays. Never splits on a dot."""
    return (key,) if isinstance(key, str) else tuple(key)


def as_key(parts: tuple[str, ...]) -> Key:
    """``("a",)`` as ``"a"``; the form in which TensorDict lists its keys."""
    return parts[0] if len(parts) == 1 else parts


def _is_key(value: object) -> bool:
    return isinstance(value, str) or (
        isinstance(value, tuple) and len(value) > 0 and all(isinstance(part, str) for part in value)
    )


def resolve_keys(
    given: Key | Sequence[Key] | None, defaults: Sequence[Key], *, what: str, owner: str
) -> list[Key]:
    """Every leaf key, from a list (all leaves), a single key (the root or the only leaf) or None (the defaults)."""
    names = [key_tuple(key)[-1] for key in defaults]
    if given is None:
        keys = list(defaults)
    elif _is_key(given):
        root = key_tuple(given)  # type: ignore[arg-type]
        unnamed = len(defaults) == 1 and (what == "in_keys" or isinstance(defaults[0], str))
        keys = [as_key(root)] if unnamed or what == "in_keys" else [(*root, name) for name in names]
    elif isinstance(given, list) and all(_is_key(key) for key in given):
        keys = [as_key(key_tuple(key)) for key in given]
    else:
        raise TypeError(
            f"{owner}: {what} takes a list of keys (one per leaf: {names}) or a single key (a string or a tuple of "
            f"strings), got {given!r}."
        )
    if len(set(keys)) != len(keys):
        # dispatch hands the second tensor to both entries, so CKA(x, y) would silently become CKA(y, y).
        raise ValueError(f"{owner}: {what} names a key twice: {keys}. Give every leaf a key of its own.")
    return keys
