"""Names of the seed and of earlier versions, of arguments and in metadata, kept beside the names that everything here has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

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


def seed_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What the seed wrote down under other names, or at the top, from an analysis' own metadata.

    >>> own = {"max_rows": 9, "settings": {"sample_size": 4, "novelty_k": 2, "metrics": ["spectrum"], "diagnostics": []}}
    >>> seed_metadata({**own, "runtime_seconds": {"batch": 1.0, "finish": 0.5}})["runtime_sec"]
    1.5
    """
    settings = metadata["settings"]
    return {
        "max_tokens": metadata["max_rows"],
        "sample_limit": settings["sample_size"],
        **{name: settings[name] for name in ("novelty_k", "metrics", "diagnostics")},
        "runtime_sec": sum(metadata["runtime_seconds"].values()),
        "save_mode": None,
    }
