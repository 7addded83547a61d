"""What stages that hold rows share: keys of several sites, and the checks that rows are the same and of one kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from tdgeom.core.keys import Key, as_key, site_key
from tdgeom.core.streaming_stage import StreamingStage
from tdgeom.core.wrong_objects import site_list

__all__: list[str] = []


def row_keys(
    owner: str, root: str, sites: Iterable[Any] | None, also: Sequence[str]
) -> tuple[list[Key], list[Key]]:
    """What such a stage reads, sites and carried values and ``"row_id"`` last, and where it writes them under its root."""
    if isinstance(sites, str) or isinstance(also, str):
        raise TypeError(f"{owner}: sites and also are lists of names, got {sites!r} and {also!r}.")
    if sites is None and also:
        raise ValueError(f"{owner}: also={list(also)} needs sites=; without sites it reads 'tokens' alone.")
    parts = [()] if sites is None else [site_key(site) for site in site_list(owner, sites)]
    carried = [str(name) for name in also]
    reads = [as_key(("tokens", *site)) for site in parts] + [("carried", name) for name in carried]
    writes = [as_key((root, *site)) for site in parts] + [(f"{root}_carried", name) for name in carried]
    return [*reads, "row_id"], [*writes, f"{root}_row_id"]


def named_rows(stage: StreamingStage, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """The inputs by the names that the state has for them, ``ids`` and ``rows_0``, ``rows_1``, ...

    Raises:
        ValueError: inputs that do not share their first dimension, or of another width than the state's.
    """
    *rows, row_id = inputs
    found = {f"rows_{number}": value for number, value in enumerate(rows)}
    for key, (name, value) in zip(stage.in_keys, found.items()):
        held = value if stage.is_empty else stage.state()[name]
        if value.shape[:1] != row_id.shape or value.shape[1:] != held.shape[1:]:
            raise ValueError(
                f"{type(stage).__name__} expects {key!r} of shape ({row_id.shape[0]}, {', '.join(map(str, held.shape[1:]))}) "
                f"beside {stage.in_keys[-1]!r} of shape {tuple(row_id.shape)}, got {tuple(value.shape)}. Rows of all sites must "
                f"come from one selection (SelectTokens)."
            )
    return {"ids": row_id.long(), **found}


def same_kind(owner: str, what: object, held: Tensor, came: Tensor) -> None:
    """An error unless rows have the width of those held, and are whole numbers or not as they are."""
    if held.shape[1:] != came.shape[1:] or held.is_floating_point() != came.is_floating_point():
        raise ValueError(
            f"{owner} has seen {what} of shape {tuple(held.shape[1:])} a row and {held.dtype}, and now gets "
            f"{tuple(came.shape[1:])} and {came.dtype}. Give every batch the same kind, or reset()."
        )
