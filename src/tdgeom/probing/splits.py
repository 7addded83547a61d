"""Which rows train and which are held out: decided by a hash of their group, so that groups stay together."""

from __future__ import annotations

import torch  # noqa: F401 (for the examples)
from torch import Tensor

from tdgeom.core.row_ids import POSITION_BITS
from tdgeom.numerics.hashing import hash_ids

__all__ = ["fold_index", "holdout_mask", "row_groups"]

_RESOLUTION = 1 << 53


def row_groups(row_id: Tensor, document_id: Tensor | None = None) -> Tensor:
    """The group of each row, which splits keep together: its document; where none is told its sequence, ``row_id >> 20``.

    int64 (N,) and (N,) -> int64 (N,).

    >>> row_groups(torch.tensor([5, (1 << 20) + 5])).tolist()
    [0, 1]
    """
    if document_id is None:
        return row_id >> POSITION_BITS
    if document_id.shape != row_id.shape or document_id.is_floating_point() or document_id.is_complex():
        raise ValueError(
            f"row_groups expects document_id, one whole number a row, {tuple(row_id.shape)}, got {document_id.dtype} of shape "
            f"{tuple(document_id.shape)}. Number documents first: torch.unique(names, return_inverse=True)."
        )
    return document_id.to(row_id.device).long()


def holdout_mask(group: Tensor, share: float, seed: int = 0) -> Tensor:
    """True for the groups held out: each with probability ``share``, from (group, seed) alone. (N,) -> bool (N,).

    The same group is on the same side in every batch, pass, site and process.

    >>> held = holdout_mask(torch.arange(10_000), 0.25)
    >>> abs(float(held.double().mean()) - 0.25) < 0.02
    True
    """
    if not 0 <= share < 1:
        raise ValueError(f"holdout is a share of the groups, at least 0 and below 1, got {share}.")
    return (hash_ids(group, seed) >> 10).double() / _RESOLUTION < share


def fold_index(group: Tensor, folds: int, seed: int = 0) -> Tensor:
    """The fold 0..folds-1 of each group, from (group, seed) alone and independent of ``holdout_mask``. (N,) -> (N,).

    >>> sorted(set(fold_index(torch.arange(100), 3).tolist()))
    [0, 1, 2]
    """
    if folds < 1:
        raise ValueError(f"folds must be at least 1, got {folds}.")
    return hash_ids(group, ~seed) % folds
