"""What a hook sees, turned into the one tensor that a site names, and back.

Every reader has a writer that puts another tensor in the same place and leaves everything else as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# A model output is asked for these first; any other output gives its first tensor.
HIDDEN_NAMES = ("last_hidden_state", "hidden_states")


def locate(value: Any) -> tuple[Any, ...] | None:
    """Path of the first tensor inside a module's output: ``()`` for a tensor, ``(0,)`` for a tuple, ... ."""
    if isinstance(value, Tensor):
        return ()
    if isinstance(value, Mapping):
        names = [name for name in HIDDEN_NAMES if name in value] + list(value)
        items = [(name, value[name]) for name in names]
    elif isinstance(value, tuple | list):
        items = list(enumerate(value))
    else:
        return None
    for key, item in items:
        inner = locate(item)
        if inner is not None:
            return (key, *inner)
    return None


def read_output(args: tuple, kwargs: dict, output: Any) -> Tensor | None:
    """The first tensor of a module's output; never an item of a batch."""
    path = locate(output)
    for key in path or ():
        output = output[key]
    return None if path is None else output


def write_output(args: tuple, kwargs: dict, output: Any, value: Tensor) -> Any:
    """The output with ``value`` where :func:`read_output` reads."""
    return _replace(output, locate(output) or (), value)


def read_input(args: tuple, kwargs: dict, output: Any = None) -> Tensor | None:
    """The tensor a module is called with, positionally or by keyword (``hidden_states`` before others)."""
    where = _locate_input(args, kwargs)
    if where is None:
        return None
    return args[where] if isinstance(where, int) else kwargs[where]


def write_input(args: tuple, kwargs: dict, output: Any, value: Tensor) -> tuple[tuple, dict]:
    """The arguments with ``value`` where :func:`read_input` reads."""
    where = _locate_input(args, kwargs)
    if isinstance(where, int):
        return (*args[:where], value, *args[where + 1 :]), kwargs
    return args, {**kwargs, where: value}


def _locate_input(args: tuple, kwargs: dict) -> int | str | None:
    if args and isinstance(args[0], Tensor):
        return 0
    for name in ("hidden_states", "query", *kwargs):
        if isinstance(kwargs.get(name), Tensor):
            return name
    return next((i for i, arg in enumerate(args) if isinstance(arg, Tensor)), None)


def _replace(value: Any, path: tuple, new: Tensor) -> Any:
    if not path:
        return new
    inner = _replace(value[path[0]], path[1:], new)
    if isinstance(value, dict):
        copy = value.copy()
        copy[path[0]] = inner
        return copy
    if isinstance(value, Mapping):
        return {**value, path[0]: inner}
    items = [inner if i == path[0] else item for i, item in enumerate(value)]
    if isinstance(value, list):
        return items
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
