"""Globs of module paths."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

__all__ = ["match_path"]


def match_path(path: str, pattern: str) -> bool:
    """Whether a glob matches a whole module path: ``*`` within one component, ``**`` over any number of them.

    >>> match_path("h.1", "h.1"), match_path("h.10", "h.1"), match_path("h.10.mlp", "h.*.mlp")
    (True, False, True)
    """
    return _match(path.split("."), pattern.split("."))


def _match(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_match(parts[i:], patterns[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], patterns[0]) and _match(parts[1:], patterns[1:])
