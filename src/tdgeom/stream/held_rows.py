"""What stages that hold the same rows of several sites share: their keys, and the check that the rows are the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from tdgeom.core.keys import Key, as_key, site_key
from tdgeom.core.streaming_stage import StreamingStage

__all__: list[str] = []


def row_keys(
    owner: str, root: str, sites: Iterable[Any] | None, also: Sequence[str]
) -> tuple[list[Key], list[Key]]:
    """What such a stage reads, sites and carried values and ``"row_id"`` last, and where it writes them under its root."""
    if isinstance(sites, str) or isinstance(also, str):
        raise TypeError(f"{owner}: sites and also are lists of names, got {sites!r} and {also!r}.")
    if sites is None and also:
        raise ValueError(f"{owner}: also={list(also)} needs sites=; without sites it reads 'tokens' alone.")
    parts = [()] if sites is None else [site_key(site) for site in sites]
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
