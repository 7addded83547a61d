"""A run's id: the only text of a catalogue that ever becomes part of a path."""

from __future__ import annotations

import re
import secrets

__all__ = ["id_of", "new_id", "number_of", "valid_id"]


def new_id() -> str:
    """A run's id: ``r`` and 12 hexadecimal digits, drawn at random."""
    return "r" + secrets.token_hex(6)


def number_of(run: str) -> int:
    """An id as a number, which a tensor can hold.

    >>> id_of(number_of("r00000000ffff"))
    'r00000000ffff'
    """
    return int(run[1:], 16)


def id_of(number: int) -> str:
    """The id of a number."""
    return f"r{number:012x}"


def valid_id(text: object) -> bool:
    """Whether this is an id."""
    return isinstance(text, str) and re.fullmatch(r"r[0-9a-f]{12}", text) is not None
