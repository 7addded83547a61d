"""Argument names of the seed and of earlier versions, kept beside the names that everything here has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["also_called"]

Given = ParamSpec("Given")
Result = TypeVar("Result")


def also_called(**names: str) -> Callable[[Callable[Given, Result]], Callable[Given, Result]]:
    """Take keyword arguments under a second name too: ``also_called(old="new")``.

    Raises:
        TypeError (when called): an argument is given under both of its names.

        >>> rows = also_called(max_tokens="max_rows")(lambda *, max_rows=10: max_rows)
        >>> rows(), rows(max_rows=2), rows(max_tokens=3)
        (10, 2, 3)
    """

    def decorate(function: Callable[Given, Result]) -> Callable[Given, Result]:
        @functools.wraps(function)
        def renamed(*args: Given.args, **given: Given.kwargs) -> Result:
            for other in names.keys() & given.keys():
                if names[other] in given:
                    raise TypeError(
                        f"{function.__name__}: {other}= is another name of {names[other]}=; got both. Give one of them."
                    )
                given[names[other]] = given.pop(other)
            return function(*args, **given)

        return renamed

    return decorate
