"""Questions to the catalogue, as SQL whose every value is bound."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from torch import nn

from tdgeom.files.json_text import canonical_json, plain
from tdgeom.model.loading import model_identity
from tdgeom.store.run_description import capture_of

__all__ = ["condition", "names"]

_COLUMNS = ("model", "revision", "dataset", "experiment", "kind")
_STEP = r"""(?:\.[A-Za-z_][A-Za-z0-9_]*|\."[^"]+"|\[\d+\])"""
_WHERE = re.compile(
    rf"\s*\$?\.?(?P<path>[A-Za-z_][A-Za-z0-9_]*{_STEP}*)\s*(?:(?P<op>=|!=|<=|>=|<|>)\s*(?P<value>.+))?\s*"
)


def condition(
    *,
    tag: str | Sequence[str] | None = None,
    since: str | float | datetime | None = None,
    until: str | float | datetime | None = None,
    positions: Any = None,
    interventions: Any = None,
    capture: Any = None,
    config: Any = None,
    metadata: Any = None,
    where: str | Sequence[str] | None = None,
    **columns: str | Sequence[str] | None,
) -> tuple[str, list[Any]]:
    """A condition on the runs (``r``) and its values, for ``Catalogue.records``.

    Args:
        tag: a tag, or several that a run must all have.
        since, until: created at or after, at or before: an ISO date or time (UTC unless it says otherwise), a datetime, or
            seconds since 1970.
        positions, interventions, capture, config, metadata: JSON values that the run's own must hold: a mapping matches where
            every entry of it does, however deep; a single value also matches inside a list; a list matches whole. A ``Capture``
            stands for its sites and their module paths, as in ``save``.
        where: conditions on the details, each ``"capture.layers"`` (it is there) or ``"metadata.loss < 0.5"``, with =, !=,
            <, <=, >, >= and a JSON value.
        columns: model (a name, or the module), revision, dataset, experiment, kind: a value, or several of which one
            must match.

    Raises:
        ValueError: a question that cannot be asked.

        >>> condition(model="gpt2", tag="a")[1]
        ['gpt2', 'a']
    """
    parts: list[str] = []
    values: list[Any] = []
    for name, wanted in columns.items():
        if name not in _COLUMNS:
            raise ValueError(
                f"query knows no {name!r}; it takes {[*_COLUMNS, 'state', 'tag', 'since', 'until', 'where']} and details."
            )
        if wanted is not None:
            several = names(wanted, name)
            parts.append(f"r.{name} IN ({','.join('?' * len(several))})")
            values += several
    for one in names(() if tag is None else tag, "tag"):
        parts.append("EXISTS (SELECT 1 FROM tags t WHERE t.run = r.id AND t.tag = ?)")
        values.append(one)
    for sign, moment in ((">=", since), ("<=", until)):
        if moment is not None:
            parts.append(f"r.created {sign} ?")
            values.append(_seconds(moment))
    capture = capture_of(capture)
    details = {"positions": positions, "interventions": interventions, "capture": capture, "config": config}
    for name, wanted in {**details, "metadata": metadata}.items():
        if wanted is not None:
            _holds(plain(wanted), f'$."{name}"', parts, values)
    for one in [where] if isinstance(where, str) else list(where or ()):
        _compared(one, parts, values)
    return " AND ".join(f"({part})" for part in parts) or "1", values


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


def _seconds(moment: str | float | datetime) -> float:
    try:
        if isinstance(moment, datetime | str):
            read = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
            return (read if read.tzinfo else read.replace(tzinfo=timezone.utc)).timestamp()
        if isinstance(moment, bool):
            raise TypeError
        return float(moment)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"since= and until= take an ISO date or time, such as '2026-11-21' or '2026-11-21T08:00', got {moment!r}."
        ) from error


def _holds(wanted: Any, path: str, parts: list[str], values: list[Any]) -> None:
    """The details at ``path`` hold ``wanted``."""
    if isinstance(wanted, Mapping) and wanted:
        for key, inner in wanted.items():
            if '"' in key or "\\" in key:
                raise ValueError(
                    f"query: the key {key!r} has a quote or a backslash, which no JSON path can name."
                )
            _holds(inner, f'{path}."{key}"', parts, values)
        return
    if isinstance(wanted, Mapping | list):
        parts.append("json_extract(r.details, ?) = json(?)")
        values += [path, canonical_json(wanted)]
        return
    equal, bound = _equals("json_type(r.details, ?)", "json_extract(r.details, ?)", wanted, path)
    inside, bound_inside = _equals("e.type", "e.value", wanted)
    parts.append(
        f"({equal}) OR (json_type(r.details, ?) = 'array' AND EXISTS "
        f"(SELECT 1 FROM json_each(r.details, ?) e WHERE {inside}))"
    )
    values += [*bound, path, path, *bound_inside]


def _equals(kind_of: str, value_of: str, wanted: Any, *path: str) -> tuple[str, list[Any]]:
    """A single value is this one, and of its type."""
    kind, value = _typed(wanted)
    if value is None:
        return f"{kind_of} IN {kind}", [*path]
    return f"{kind_of} IN {kind} AND {value_of} = ?", [*path, *path, value]


def _typed(value: Any) -> tuple[str, Any]:
    """The JSON types that a value may have in SQLite, and what to compare it with (None: the type says it all)."""
    if value is None:
        return "('null')", None
    if isinstance(value, bool):
        return ("('true')" if value else "('false')"), None
    if isinstance(value, str):
        return "('text')", value
    if (
        isinstance(value, int) and not -(2**63) <= value < 2**63
    ):  # SQLite reads larger ones as floating point numbers
        value = float(value) if abs(value) < 2**1023 else math.inf * (1 if value > 0 else -1)
    return "('integer', 'real')", value


def _compared(text: str, parts: list[str], values: list[Any]) -> None:
    match = _WHERE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(
            f"where= takes a path in the details, such as 'capture.layers', or a comparison, such as 'metadata.loss < 0.5'; got "
            f"{text!r}."
        )
    path = f"$.{match['path']}"
    if match["op"] is None:
        parts.append("json_type(r.details, ?) IS NOT NULL")
        values.append(path)
        return
    try:
        value = json.loads(match["value"])
    except ValueError:
        value = match["value"].strip()  # a bare word is a text
    if isinstance(value, dict | list):
        raise ValueError(
            f"where= compares with a single value, got {match['value']!r}. Use metadata= for nested ones."
        )
    if match["op"] in ("=", "!="):
        equal, bound = _equals("json_type(r.details, ?)", "json_extract(r.details, ?)", value, path)
        is_equal = match["op"] == "="
        parts.append(equal if is_equal else f"json_type(r.details, ?) IS NOT NULL AND NOT ({equal})")
        values += bound if is_equal else [path, *bound]
        return
    kind, number = _typed(value)
    if number is None:
        raise ValueError(f"where=: {match['value']!r} has no order; compare it with = or !=.")
    parts.append(f"json_type(r.details, ?) IN {kind} AND json_extract(r.details, ?) {match['op']} ?")
    values += [path, path, number]
