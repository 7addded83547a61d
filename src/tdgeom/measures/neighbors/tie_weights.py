"""Membership in a neighbourhood as a weight, so that equally near rows share what places are left instead of being ordered.

With r places left at the distance of the k-th neighbour and a rows at that distance, each of them has weight r/a; nearer rows
have weight 1. Weights add up to k, and unrelated sides share k/(N-1) of them on average, however many ties there are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tdgeom.core.warnings import tell
from tdgeom.measures.neighbors.neighbor_table import Neighbors
from tdgeom.numerics.centring import occurs
from tdgeom.numerics.copies import SAME

__all__ = ["common_weight", "tie_weights", "warn_of_ties", "warn_of_ties_beyond", "weighted_table"]

_CELLS = 2**24  # of a dense block of weights


def tie_weights(
    distance: Tensor, k: int | Tensor, tied_beyond: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Weights of the neighbours in a table: 1 nearer than the k-th, r/a for each of the a rows as near as the k-th.

    Args:
        distance: (\*B, N, K) ascending, over all rows. Distances are equal if they agree to 1e-12.
        k: neighbours a row, at most K; one number or (\*B, N).
        tied_beyond: (\*B, N) whether a row outside the table is as near as its last; None: it may be where the last two are
            equally near.

    Returns:
        (\*B, N, K) float64, which add up to k, and (\*B, N) whether rows outside the table belong to those that share.

    >>> weight, beyond = tie_weights(torch.tensor([[1.0, 2.0, 2.0, 2.0, 3.0]]), 2)
    >>> weight.tolist()
    [[1.0, 0.3333333333333333, 0.3333333333333333, 0.3333333333333333, 0.0]]
    """
    if isinstance(k, int):
        last, places = distance[..., k - 1 : k], torch.full_like(distance[..., :1], k, dtype=torch.float64)
    else:
        last, places = distance.gather(-1, k.unsqueeze(-1) - 1), k.unsqueeze(-1).double()
    inside = distance * SAME < last
    tied = ~inside & (distance <= last * SAME)
    sharing = tied.sum(-1, keepdim=True).double()
    share = (places - inside.sum(-1, keepdim=True).double()) / sharing
    weight = inside.double() + torch.where(tied, share, 0.0)
    may = tied[..., -2:].sum(-1) > 1 if tied_beyond is None else tied_beyond
    return weight, tied[..., -1] & may


def weighted_table(
    search: Callable[[int], Neighbors], k: int | Tensor, most: int, n: int, skip: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Indices (\*B, N, K) and weights of every neighbour that shares in the first ``k``, K >= ``most`` as wide as that takes.

    ``search(K)`` makes a table of the K nearest of ``n`` rows; ``most`` is the largest ``k``; ``skip`` (\*B,): data sets for
    which it need be no wider.
    """
    width = most
    while True:
        table = search(width)
        weight, beyond = tie_weights(table.distance, k, table.tied_beyond)
        if width == n - 1 or not occurs(beyond & ~skip.unsqueeze(-1)):
            return table.index, weight
        width = min(16 * width, n - 1)


def common_weight(index_a: Tensor, weight_a: Tensor, index_b: Tensor, weight_b: Tensor) -> Tensor:
    r"""Σ_j w_ij·w'_ij of every row, (\*B, N) float64, from tables of any widths; leading dimensions spread."""
    n = index_a.shape[-2]
    rows = torch.broadcast_shapes(index_a.shape[:-1], index_b.shape[:-1])
    index_a, weight_a, index_b, weight_b = (
        part.expand(*rows, part.shape[-1]) for part in (index_a, weight_a, index_b, weight_b)
    )
    step = max(1, _CELLS // max(1, n * rows[:-1].numel()))
    found = []
    for start in range(0, n, step):
        here = (..., slice(start, start + step), slice(None))
        dense = weight_a.new_zeros(*rows[:-1], weight_a[here].shape[-2], n)
        dense = dense.scatter(-1, index_a[here], weight_a[here])
        found.append((dense.gather(-1, index_b[here]) * weight_b[here]).sum(-1))
    return torch.cat(found, -1)


def warn_of_ties(ceiling: Tensor, measure: str) -> None:
    """Say that a side's overlap with itself is below 0.98: a tie here and there moves no number that anyone reads."""
    if not occurs(ceiling < 0.98):
        return
    try:
        value = f"{float(ceiling.min()):.2g}"
    except RuntimeError:  # vmap
        value = "below 0.98"
    tell(
        f"{measure}: rows have more equally near neighbours than places for them, which these share, so that even equal sides "
        f"overlap in part: the ceiling (a side with itself) is {value}, not 1. Compare with it, or take rows with fewer ties "
        f"(more features, no binary or one-hot rows, no repeated rows).",
        UserWarning,
    )


def warn_of_ties_beyond(beyond: Tensor, width: int, measure: str) -> None:
    """Say that a table ends within a group of equally near rows."""
    if occurs(beyond):
        tell(
            f"{measure}: the table ends among equally near rows: some rows beyond its {width} columns are as near as the last "
            f"neighbour looked at, and have no part in the number. Use NearestNeighbors(k=...) with a larger k, or "
            f"source='sample', which searches as far as ties reach.",
            UserWarning,
        )
