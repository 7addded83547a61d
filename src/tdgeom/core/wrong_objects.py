"""Objects that were given in place of what is meant: a class for an object, a capture for its sites, a list for a mapping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor, nn

__all__ = ["named_functions", "refuse_class", "refuse_no_number", "site_list"]


def refuse_class(owner: str, given: object) -> None:
    """Raise where the class of a stage, an edit or an estimator was given in place of an object.

    >>> refuse_class("ForEach", dict)
    Traceback (most recent call last):
    TypeError: ForEach takes an object, got the class dict. Write dict(...).
    """
    if isinstance(given, type):
        own = given.__module__.partition(".")[0] == "tdgeom"
        name = f"tg.{given.__name__}" if own else given.__name__
        raise TypeError(f"{owner} takes an object, got the class {given.__name__}. Write {name}(...).")


def refuse_no_number(owner: str, name: str, given: object) -> None:
    """Raise where what is multiplied by is no number and no tensor.

    >>> refuse_no_number("Steer", "coefficient", "3")
    Traceback (most recent call last):
    TypeError: Steer(coefficient=) is a number, got the str '3'.
    """
    if not isinstance(given, Real | Tensor):
        raise TypeError(f"{owner}({name}=) is a number, got the {type(given).__name__} {given!r:.80}.")


def site_list(owner: str, sites: Any) -> list[Any]:
    """Sites as a list; what has sites is no list of them.

    >>> site_list("SelectTokens", (name for name in ["embed"]))
    ['embed']
    """
    if isinstance(sites, nn.Module) or not isinstance(sites, Iterable):
        meant = "capture.sites" if hasattr(sites, "sites") else "a list of names, such as capture.sites"
        raise TypeError(f"{owner}: sites are names, got {type(sites).__name__}. Write {meant}.")
    return list(sites)


def named_functions(owner: str, given: Any) -> dict[str, Callable[..., Any]]:
    """Functions by name: of a mapping as they are, of a list by their own names.

    >>> list(named_functions("LinearProbe: metrics", {"share": sum})), list(named_functions("LinearProbe: metrics", [max]))
    (['share'], ['max'])
    """
    if given is None or isinstance(given, Mapping):
        return dict(given or {})
    listed = (
        [given]
        if callable(given) or not isinstance(given, Iterable) or isinstance(given, str)
        else list(given)
    )
    named = {
        getattr(one, "__name__", "<"): one for one in listed if callable(one) and not isinstance(one, type)
    }
    if len(named) < len(listed) or any(name.startswith("<") for name in named):
        raise TypeError(
            f"{owner} is a mapping from names to functions (or a list of functions with names of their own), got {given!r:.80}. "
            f"Write {{'mine': function}}."
        )
    return named
