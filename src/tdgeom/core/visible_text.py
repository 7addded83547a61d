"""Text of others, shown: what moves a cursor, hides letters or turns their order stands as its escape."""

from __future__ import annotations

__all__ = ["visible"]


def visible(text: object) -> str:
    r"""The text with every control and direction character (and whatever else has no glyph) written as its escape.

    Line breaks, tabs and spaces of any width stay.

    >>> print(visible("a\x1b[2J\u202eb"))
    a\x1b[2J\u202eb
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() or one in "\n\t" or (one.isspace() and one not in _BREAKS) else _escape(one)
        for one in text
    )


# what str.isspace counts as space and a terminal or a browser takes for a command
_BREAKS = "\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\u2028\u2029"


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
