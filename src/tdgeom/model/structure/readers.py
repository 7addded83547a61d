"""What a hook sees, turned into the one tensor that a site names, and back.

Every reader has a writer that puts another tensor in the same place and leaves everything else as it was. Containers are
tensors' mappings, tuples, lists and dataclasses, inside each other as they come.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

# A model output is asked for these first; any other output gives its first tensor.
HIDDEN_NAMES = ("last_hidden_state", "hidden_states")
Element = tuple[int | str, ...]  # the way to a tensor inside containers: indices, keys, names of fields


def locate(value: Any, like: Tensor | None = None) -> Element | None:
    """Path of the first tensor inside a module's output: ``()`` for a tensor, ``(0,)`` for a tuple, ... .

    Of a dataclass it is the one floating point tensor, or the one of the shape of ``like``; where there are several, an
    error lists their fields.
    """
    if isinstance(value, Tensor):
        return ()
    if _is_record(value):
        return _locate_field(value, like)
    for key, item in _items(value):
        inner = locate(item, like)
        if inner is not None:
            return (key, *inner)
    return None


def tensors(value: Any, path: Element = ()) -> Iterator[tuple[Element, Tensor]]:
    """Every tensor inside containers, with the way to it."""
    if isinstance(value, Tensor):
        yield path, value
        return
    for key, item in _items(value):
        yield from tensors(item, (*path, key))


def take(value: Any, element: Element) -> Any:
    """What lies at an element; ``None`` where there is nothing of that name or number.

    >>> take({"a": (1, 2)}, ("a", 1))
    2
    """
    for key in element:
        if _is_record(value):
            value = getattr(value, str(key), None)
        elif isinstance(value, Mapping) and (key in value or not isinstance(key, int)):
            value = value.get(key)
        elif isinstance(value, Mapping | tuple | list) and isinstance(key, int):
            listed = list(value.values()) if isinstance(value, Mapping) else value
            value = listed[key] if -len(listed) <= key < len(listed) else None
        else:
            return None
    return value


def spelled(element: Element) -> str:
    """An element as a site's name has it.

    >>> spelled((1, "hidden"))
    "[1]['hidden']"
    """
    return "".join(f"[{key!r}]" for key in element)


def read_output(args: tuple, kwargs: dict, output: Any, element: Element | None = None) -> Tensor | None:
    """The first tensor of a module's output, or the one at ``element``; never an item of a batch."""
    if isinstance(output, Tensor) and not element:
        return output
    where = locate(output, _given(args, kwargs)) if element is None else element
    found = None if where is None else take(output, where)
    return found if isinstance(found, Tensor) else None


def write_output(
    args: tuple, kwargs: dict, output: Any, value: Tensor, element: Element | None = None
) -> Any:
    """The output with ``value`` where :func:`read_output` reads."""
    if element is None:
        element = locate(output, _given(args, kwargs)) or ()
    return _replace(output, element, value)


def read_input(
    args: tuple, kwargs: dict, output: Any = None, element: Element | None = None
) -> Tensor | None:
    """The tensor a module is called with, positionally or by keyword (``hidden_states`` before others).

    ``element`` counts the arguments: a number for a positional one, a name for a keyword.
    """
    if element is None and args and isinstance(args[0], Tensor):
        return args[0]
    where = _locate_input(args, kwargs) if element is None else element
    if where is None:
        return None
    found = take(kwargs if isinstance(where[0], str) else args, where)
    return found if isinstance(found, Tensor) else None


def write_input(
    args: tuple, kwargs: dict, output: Any, value: Tensor, element: Element | None = None
) -> tuple[tuple, dict]:
    """The arguments with ``value`` where :func:`read_input` reads."""
    where = (_locate_input(args, kwargs) or (0,)) if element is None else element
    if isinstance(where[0], str):
        return args, _replace(kwargs, where, value)
    return _replace(args, where, value), kwargs


def _locate_input(args: tuple, kwargs: dict) -> Element | None:
    if args and isinstance(args[0], Tensor):
        return (0,)
    for name in ("hidden_states", "query", *kwargs):
        if isinstance(kwargs.get(name), Tensor):
            return (name,)
    for given in (args, kwargs):
        if (found := locate(given)) is not None:
            return found
    return None


def _given(args: tuple, kwargs: dict) -> Tensor | None:
    """The tensor among the arguments themselves: its shape tells which of several outputs goes on."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _locate_field(value: Any, like: Tensor | None) -> Element | None:
    found = [path for path, item in tensors(value) if item.is_floating_point()]
    for narrower in (
        [path for path in found if like is not None and take(value, path).shape == like.shape],
        [path for path in found if path[0] in HIDDEN_NAMES],
    ):
        if len(found) > 1 and narrower:
            found = narrower
    if len(found) > 1:
        raise ValueError(
            f"{type(value).__name__} holds several tensors that could be meant: {', '.join(map(spelled, found))}. Remedy: say "
            f'which, such as sites="module_output:<path>{spelled(found[0])}".'
        )
    return found[0] if found else None


def _is_record(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type | Mapping)


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        names = [name for name in HIDDEN_NAMES if name in value] + list(value.keys())
        return [(name, value[name]) for name in names]
    if isinstance(value, tuple | list):
        return list(enumerate(value))
    return [(f.name, getattr(value, f.name, None)) for f in fields(value)] if _is_record(value) else []


def _replace(value: Any, path: Element, new: Tensor) -> Any:
    if not path:
        return new
    key, rest = path[0], path[1:]
    if isinstance(value, Mapping):
        key = key if key in value or not isinstance(key, int) else list(value)[key]
        inner = _replace(value[key], rest, new)
        if not isinstance(value, dict):
            return {**value, key: inner}
        changed = value.copy()
        changed[key] = inner
        return changed
    if _is_record(value):
        changed = copy.copy(value)
        object.__setattr__(changed, str(key), _replace(getattr(value, str(key)), rest, new))
        return changed
    index = int(key) % len(value)
    items = [_replace(item, rest, new) if i == index else item for i, item in enumerate(value)]
    if isinstance(value, list):
        return items
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
