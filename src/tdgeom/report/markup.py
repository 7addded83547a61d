"""Markup made of text: every name that comes from outside is escaped on its way in."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from typing import Any

from tdgeom.core.visible_text import visible
from tdgeom.files.json_text import plain

__all__ = ["Html", "element", "json_block", "joined"]

VOID = {"meta", "input", "link", "br"}


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def element(name: str, *parts: Any, **attributes: Any) -> Html:
    """One element; what is no markup is escaped. ``class_`` is class, ``data_x`` is data-x, True an attribute without a value.

    >>> element("p", "1 < 2", class_="note")
    '<p class="note">1 &lt; 2</p>'
    """
    words = []
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(f" {key}")
        elif value is not None and value is not False:
            words.append(f' {key}="{escape(visible(value), quote=True)}"')
    opened = f"<{name}{''.join(words)}>"
    return Html(opened if name in VOID else f"{opened}{joined(parts)}</{name}>")


def joined(parts: Iterable[Any], between: str = "") -> Html:
    """Parts one after the other, each escaped unless it is markup; None is left out."""
    return Html(
        between.join(
            part if isinstance(part, Html) else escape(visible(part), quote=False)
            for part in parts
            if part is not None
        )
    )


def json_block(key: str, value: Any) -> Html:
    """Data for the page's script; no character in it can end the block.

    >>> json_block("d", {"a": "</script>"})
    '<script type="application/json" id="d">{"a":"\\\\u003c/script>"}</script>'
    """
    text = json.dumps(plain(value), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    if not text.isprintable():
        text = json.dumps(_shown(plain(value)), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for sign in "<\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Html(f'<script type="application/json" id="{escape(key, quote=True)}">{text}</script>')


def _shown(value: Any) -> Any:
    """Plain data whose texts, keys too, are visible."""
    if isinstance(value, dict):
        return {visible(key): _shown(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_shown(part) for part in value]
    return visible(value) if isinstance(value, str) else value
