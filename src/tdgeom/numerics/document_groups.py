"""Which group of documents a row belongs to: by a hash of its document, so that rows of one document stay together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tdgeom.core.row_ids import POSITION_BITS
from tdgeom.numerics.hashing import hash_ids
from tdgeom.numerics.on_host import on_host

__all__ = ["GROUPED_BY", "document_groups", "rows_by_group"]

GROUPED_BY = ("document", "sequence", "row")
_SEED = 17  # apart from the seeds of row samples: a group is no part of a sample's order


def document_groups(
    row_id: Tensor, groups: int, document_id: Tensor | None = None, *, by: str = "document", seed: int = 0
) -> Tensor:
    """The group of every row, int64 (N,) -> int64 (N,) in [0, groups), on the CPU: rows are dealt out there.

    Args:
        row_id: ``sequence << 20 | position``.
        document_id: (N,) whole numbers; without it the sequence is the document.
        by: "document"; "sequence", whatever the documents; "row" deals single rows, as if they were independent.

    >>> groups = document_groups(torch.tensor([0, 1, 5 << 20, 5 << 20 | 1]), 4)
    >>> bool(groups[0] == groups[1]), bool(groups[2] == groups[3])
    (True, True)
    """
    if by not in GROUPED_BY:
        raise ValueError(f"by is one of {list(GROUPED_BY)}, got {by!r}.")
    row_id = on_host(row_id)
    units = row_id if by == "row" else row_id >> POSITION_BITS
    if by == "document" and document_id is not None:
        if document_id.shape != row_id.shape or document_id.is_floating_point() or document_id.is_complex():
            raise ValueError(
                f"document_id is one whole number a row, {tuple(row_id.shape)}, got {tuple(document_id.shape)} of "
                f"{document_id.dtype}. Number documents first: torch.unique(names, return_inverse=True)."
            )
        units = on_host(document_id)
    return hash_ids(units.long(), seed + _SEED) % groups


def rows_by_group(group: Tensor, groups: int) -> Iterator[tuple[int, Tensor]]:
    """Each group that has rows among these, and which they are, in order: (N,) -> (g, (n_g,)) ...

    >>> [(g, rows.tolist()) for g, rows in rows_by_group(torch.tensor([2, 0, 2]), 3)]
    [(0, [1]), (2, [0, 2])]
    """
    order = torch.argsort(group, stable=True)
    sizes = torch.bincount(group, minlength=groups).tolist()
    for g, rows in enumerate(order.split(sizes)):
        if len(rows):
            yield g, rows
