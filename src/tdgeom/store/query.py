"""Questions to the catalogue: names, tags and times as SQL whose every value is bound, details as they are read."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, datetime, time, timedelta, timezone
from typing import Any

from torch import nn

from tdgeom.files.json_text import plain
from tdgeom.model.loading import model_identity
from tdgeom.store.run_description import DETAILS, capture_of

__all__ = ["condition", "names"]

Moment = str | float | date | timedelta
_COLUMNS = ("model", "revision", "dataset", "experiment", "kind")
_WHERE = re.compile(
    r"""\s*\$?\.?(?P<path>[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*|\."[^"]+"|\[\d+\])*)\s*"""
    r"""(?:(?P<sign>=|!=|<=|>=|<|>)\s*(?P<value>.+))?\s*"""
)
_STEP = re.compile(r"""([A-Za-z_][A-Za-z0-9_]*)|"([^"]+)"|\[(\d+)\]""")
_ORDERS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def condition(
    *,
    tag: str | Sequence[str] | None = None,
    since: Moment | None = None,
    until: Moment | None = None,
    where: str | Sequence[str] | None = None,
    **wanted: Any,
) -> tuple[str, list[Any], Callable[[Mapping[str, Any]], bool]]:
    """A condition on the runs (``r``) and its values, for ``Catalogue.records``; and whether a run's details fit.

    Args:
        tag: a tag, or several that a run must all have.
        since, until: created at or after, at or before: an ISO date or time (UTC unless it says otherwise), a datetime or date,
            a timedelta (so long ago), or seconds since 1970.
        where: conditions on the details, each ``"capture.layers"`` (it is there) or ``"metadata.loss < 0.5"``, with =, !=,
            <, <=, >, >= and a JSON value.
        wanted: model (a name, or the module), revision, dataset, experiment, kind: a value, or several of which one
            must match. And positions, interventions, capture, config, metadata: JSON values that the run's own must hold: a
            mapping matches where every entry of it does, however deep; a single value also matches inside a list; a list
            matches whole. A ``Capture`` stands for its sites and their module paths, as in ``save``.

    Raises:
        ValueError: a question that cannot be asked.

        >>> condition(model="gpt2", tag="a")[1]
        ['gpt2', 'a']
    """
    parts: list[str] = []
    values: list[Any] = []
    asked = {}
    for name, one in wanted.items():
        if name not in (*_COLUMNS, *DETAILS):
            raise ValueError(
                f"query knows no {name!r}; it takes {[*_COLUMNS, 'state', 'tag', 'since', 'until', 'where']} and details."
            )
        if one is not None and name in DETAILS:
            asked[name] = plain(capture_of(one))
        elif one is not None:
            several = names(one, name)
            parts.append(f"r.{name} IN ({','.join('?' * len(several))})")
            values += several
    for one in names(() if tag is None else tag, "tag"):
        parts.append("EXISTS (SELECT 1 FROM tags t WHERE t.run = r.id AND t.tag = ?)")
        values.append(one)
    for sign, moment in ((">=", since), ("<=", until)):
        if moment is not None:
            parts.append(f"r.created {sign} ?")
            values.append(_seconds(moment))
    comparisons = [_comparison(one) for one in ([where] if isinstance(where, str) else where or ())]

    def fits(details: Mapping[str, Any]) -> bool:
        return (not asked or _holds(details, asked)) and all(met(details) for met in comparisons)

    return " AND ".join(f"({part})" for part in parts) or "1", values, fits


def names(wanted: Any, what: str) -> list[str]:
    """One text or several; a module stands for its name."""
    if isinstance(wanted, nn.Module):
        wanted = model_identity(wanted)[1]
    several = (
        [wanted] if isinstance(wanted, str) else list(wanted) if isinstance(wanted, Iterable) else [wanted]
    )
    odd = [one for one in several if not isinstance(one, str)]
    if odd:
        raise ValueError(f"query: {what}= takes a text or several, got {odd[0]!r:.80}.")
    try:
        "".join(several).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"query: {what}={several[0]!r:.80} is no valid Unicode text: {error}.") from error
    return several


def _seconds(moment: Moment) -> float:
    try:
        if isinstance(moment, timedelta):
            moment = datetime.now(timezone.utc) - abs(moment)
        elif isinstance(moment, date) and not isinstance(moment, datetime):
            moment = datetime.combine(moment, time())
        if isinstance(moment, datetime | str):
            read = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
            return (read if read.tzinfo else read.replace(tzinfo=timezone.utc)).timestamp()
        if isinstance(moment, bool):
            raise TypeError
        return float(moment)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"since= and until= take an ISO date or time, such as '2026-11-21' or '2026-11-21T08:00', a datetime, a date or a "
            f"timedelta, got {moment!r}."
        ) from error


def _holds(own: Any, wanted: Any) -> bool:
    """A mapping holds one that has some of its entries, however deep; a list holds a single value that is in it."""
    if isinstance(wanted, dict) and wanted:
        return isinstance(own, dict) and all(key in own and _holds(own[key], wanted[key]) for key in wanted)
    inside = own if isinstance(own, list) and not isinstance(wanted, dict | list) else []
    return any(_same(one, wanted) for one in [own, *inside])


def _same(one: Any, other: Any) -> bool:
    """Equality of JSON values: true is not 1, 1 is 1.0."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _comparison(text: str) -> Callable[[Any], bool]:
    """Whether details meet a condition such as ``"metadata.loss < 0.5"``."""
    match = _WHERE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(
            f"where= takes a path in the details, such as 'capture.layers', or a comparison, such as 'metadata.loss < 0.5'; got "
            f"{text!r}."
        )
    steps = [name or quoted or int(place) for name, quoted, place in _STEP.findall(match["path"])]
    sign = match["sign"]
    if sign is None:
        return lambda details: bool(_found(details, steps))
    try:
        wanted = json.loads(match["value"])
    except ValueError:
        wanted = match["value"].strip()  # a bare word is a text
    if isinstance(wanted, dict | list):
        raise ValueError(
            f"where= compares with a single value, got {match['value']!r}. Use metadata= for nested ones."
        )
    if sign in ("=", "!="):
        return lambda details: any(_same(own, wanted) == (sign == "=") for own in _found(details, steps))
    if wanted is None or isinstance(wanted, bool):
        raise ValueError(f"where=: {match['value']!r} has no order; compare it with = or !=.")
    kinds: Any = str if isinstance(wanted, str) else (int, float)
    return lambda details: any(
        isinstance(own, kinds) and not isinstance(own, bool) and _ORDERS[sign](own, wanted)
        for own in _found(details, steps)
    )


def _found(details: Any, steps: Sequence[str | int]) -> list[Any]:
    """The value at a path, or nothing."""
    for step in steps:
        entries = dict(enumerate(details)) if isinstance(details, list) else details
        if not isinstance(entries, dict) or step not in entries:
            return []
        details = entries[step]
    return [details]
