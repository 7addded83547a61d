"""What ``metrics=`` of an analysis was given: names and stages, or what to write."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from tdgeom.core.wrong_objects import refuse_class
from tdgeom.measures.registry import known_measures

__all__ = ["listed_measures"]


def listed_measures(owner: str, given: Any) -> list[Any]:
    """What ``metrics=`` was given, as a list of names and stages.

    Raises:
        TypeError: a class in place of an object, a function that has a name here, a mapping, or no list.

        >>> listed_measures("compare", "cka"), listed_measures("compare", (name for name in ["rsa"]))
        (['cka'], ['rsa'])
    """
    if given is None or isinstance(given, str | nn.Module):
        return [] if given is None else [given]
    refuse_class(f"{owner}: metrics", given)
    given = [given] if inspect.isroutine(given) else given
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise TypeError(
            f"{owner}: metrics takes a name, a stage such as tg.TwoNN(), or a list of them, got {given!r:.80}. A stage's columns "
            f"are named by its out_keys."
        )
    listed = list(given)
    for one in listed:
        refuse_class(f"{owner}: metrics", one)
        name = getattr(one, "__name__", "")
        if inspect.isroutine(one) and name in known_measures():
            raise TypeError(
                f"{owner}: metrics takes names and stages, got the function {name}. Write {name!r}."
            )
    return listed
