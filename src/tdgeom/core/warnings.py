"""Warnings of the package: said at the user's line, naming the site at which a stage was called."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import FrameType
from typing import Any, NamedTuple

import tensordict
import torch

from tdgeom.core.visible_text import visible

__all__ = [
    "FewRowsWarning",
    "Gathered",
    "UndefinedMeasureWarning",
    "UnresolvedMeasureWarning",
    "at_site",
    "from_line",
    "gathered",
    "gathering",
    "tell",
    "tell_few_rows",
    "users_line",
]

_INSIDE = tuple(
    os.path.dirname(str(file)) + os.sep
    for file in (os.path.dirname(__file__), torch.__file__, tensordict.__file__)
)
_SITES = 6  # named in one warning
_site: ContextVar[str | None] = ContextVar("site", default=None)
_gathered: ContextVar[Gathered | None] = ContextVar("gathered", default=None)
_started: ContextVar[Line | None] = ContextVar("started", default=None)


class UndefinedMeasureWarning(UserWarning):
    """A measure is not defined on its input (no variance, too few rows); its value is NaN."""


class FewRowsWarning(UserWarning):
    """A number that the rows decide more than what they were drawn from: they are few, or vary in few directions."""


class UnresolvedMeasureWarning(UserWarning):
    """A number that eigenvalues under the rounding of their products could have moved."""


def tell_few_rows(stage: str, measures: str, rows: Any, needed: str, remedy: str) -> None:
    """Warn that a stage's measures are of few rows: how many there are, how many are called for, what helps.

    >>> with warnings.catch_warnings(record=True) as told:
    ...     warnings.simplefilter("always")
    ...     tell_few_rows("CCA", "cca_mean", 5, "more than the 8 features", "Give more rows")
    >>> str(told[0].message)
    'CCA: few rows, 5: cca_mean calls for more than the 8 features. Give more rows.'
    """
    least = int(torch.as_tensor(rows).min())
    tell(f"{stage}: few rows, {least}: {measures} calls for {needed}. {remedy}.", FewRowsWarning)


def tell(message: str, category: type[Warning] = UndefinedMeasureWarning, *, at_once: bool = False) -> None:
    """Warn at the user's line (``at_once``: also where warnings are gathered), naming the site. A traced graph tells nothing."""
    if torch.compiler.is_compiling():
        return
    where, gathered = _site.get(), _gathered.get()
    if gathered is None or at_once:
        _say(message if where is None else f"{message} [at {where}]", category)
    else:
        gathered.add(message, category, where)


def _say(text: str, category: type[Warning]) -> None:
    line, text = users_line(), visible(text)
    registry = line.space.setdefault("__warningregistry__", {})
    warnings.warn_explicit(text, category, line.file, line.number, line.space.get("__name__"), registry)


class Gathered:
    """What was told, once each, with the sites it was told of."""

    def __init__(self) -> None:
        self._told: dict[tuple[type[Warning], str], list[str]] = {}

    def add(self, message: str, category: type[Warning], where: str | None) -> None:
        """Once more, of another site."""
        sites = self._told.setdefault((category, message), [])
        if where is not None and where not in sites:
            sites.append(where)

    def texts(self) -> list[str]:
        """Every message with its sites; those of few rows are one."""
        return [text for _, text in self.warnings()]

    def warnings(self) -> list[tuple[type[Warning], str]]:
        """Category and text of each."""
        few, found = [], []
        for (category, message), sites in self._told.items():
            more = f" and {len(sites) - _SITES} more" if len(sites) > _SITES else ""
            text = f"{message} [at {', '.join(sites[:_SITES])}{more}]" if sites else message
            if category is FewRowsWarning:
                few.append(text)
            else:
                found.append((category, text))
        return [*found, (FewRowsWarning, "\n".join(few))] if few else found


@contextmanager
def gathered(into: Gathered | None = None) -> Iterator[Gathered]:
    """What is told inside is told at its end, each message once with all its sites: once a run, not once a site.

    Inside another it is the other that tells. ``into``: in a thread of our own, what the thread that started it gathers in.

    >>> with warnings.catch_warnings(record=True) as told, gathered():
    ...     warnings.simplefilter("always")
    ...     for site in ("x.0", "x.1"):
    ...         with at_site(site):
    ...             tell("rankme is undefined.")
    >>> [str(one.message) for one in told]
    ['rankme is undefined. [at x.0, x.1]']
    """
    outer = _gathered.get()
    held = into or outer or Gathered()
    token = _gathered.set(held)
    try:
        yield held
    finally:
        _gathered.reset(token)
    if outer is None and into is None:
        for category, text in held.warnings():
            _say(text, category)


def gathering() -> Gathered | None:
    """Where what is told here is gathered, if it is."""
    return _gathered.get()


class Line(NamedTuple):
    """A line of code: its file and number, and the globals of its module."""

    file: str
    number: int
    space: dict[str, Any]


def users_line() -> Line:
    """The nearest line on the stack outside of this package and those that call it (torch, tensordict, Python's own)."""
    frame: FrameType = sys._getframe(1)
    while _inside(frame):
        if frame.f_back is None:
            return _started.get() or Line(frame.f_code.co_filename, frame.f_lineno, frame.f_globals)
        frame = frame.f_back
    return Line(frame.f_code.co_filename, frame.f_lineno, frame.f_globals)


def _inside(frame: FrameType) -> bool:
    package = str(frame.f_globals.get("__name__")).partition(".")[0]
    return frame.f_code.co_filename.startswith(_INSIDE) or package in sys.stdlib_module_names


@contextmanager
def from_line(line: Line) -> Iterator[None]:
    """In a thread of our own: what is told is told at ``line``, from which the thread was started."""
    token = _started.set(line)
    try:
        yield
    finally:
        _started.reset(token)


def at_site(where: str) -> AbstractContextManager[None]:
    """What is told inside names the site (or pair of sites) ``where``.

    >>> with warnings.catch_warnings(record=True) as told, at_site("residual_output.3"):
    ...     warnings.simplefilter("always")
    ...     tell("twonn is undefined.")
    >>> str(told[0].message)
    'twonn is undefined. [at residual_output.3]'
    """
    return nullcontext() if torch.compiler.is_compiling() else _at_site(where)


@contextmanager
def _at_site(where: str) -> Iterator[None]:
    token = _site.set(where)
    try:
        yield
    finally:
        _site.reset(token)
