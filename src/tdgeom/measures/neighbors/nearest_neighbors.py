"""k nearest neighbours of every row: exact by blocks, or approximate by an index."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from tdgeom.core.keys import Keys
from tdgeom.core.stage import Stage
from tdgeom.measures.neighbors.approximate import approximate_neighbors
from tdgeom.measures.neighbors.distance_gradient import found_by
from tdgeom.measures.neighbors.neighbor_table import (
    Found,
    Leaves,
    Neighbors,
    check_rows,
    empty_leaves,
    leaves_from,
    minkowski,
)
from tdgeom.measures.neighbors.search import search_distinct
from tdgeom.numerics.differences import budget
from tdgeom.numerics.opaque import opaque

__all__ = ["NearestNeighbors", "distinct_neighbors", "nearest_neighbors"]


def nearest_neighbors(
    x: Tensor,
    k: int,
    *,
    metric: str | float = "euclidean",
    block: int | None = None,
    memory: int | None = None,
) -> Neighbors:
    r"""The k nearest other rows of every row, exactly.

    Copies are found first and the search runs on distinct rows, in float32 products of centred,
    rescaled rows; the candidates' distances are then computed from differences in float64, and every row
    whose k-th neighbour float32 rounding could have hidden is searched again in float64. The result is that
    of a float64 search, whatever the unit or the offset of the data. Each pair of blocks is multiplied once;
    memory is O(N·k + block²) beyond the rows.

    Args:
        x: (\*B, N, D) rows, floating point or integer (half precision is upcast once; integers become
            float64).
        k: neighbours a row, 1 <= k < N. A row is never its own neighbour (dropped by index, not by distance).
        metric: ``"euclidean"``; ``"cosine"``, the distance 1 - cos; or a number p >= 1 (or ``math.inf``) for
            Minkowski's.
        block: rows a block; None: from ``memory``.
        memory: bytes that the working blocks may take (default 256 MiB).

    Returns:
        ``distance`` (\*B, N, k) float64, ascending, and ``index`` (\*B, N, k) int64 over all rows: copies are
        neighbours of each other at distance 0; ties stand in the order of the row's first occurrence.
        ``distinct_distance`` (\*B, N, k) float64 among distinct rows: on the first occurrence of a row its
        distances to the nearest *other distinct* rows, on a later copy NaN throughout (so that every distinct
        row counts once), and NaN where fewer than k other distinct rows exist. Copies up to rounding are no distinct
        rows: |x - y| <= c·eps|x| with eps of the dtype given, c = 64 in float32 and float64, 4 in half precision; the
        first row stands for all within that distance of it. ``duplicates`` (\*B,) int64: the number of later copies,
        ``near_duplicates`` (\*B,) int64: those among them that are copies up to rounding only. ``tied_beyond`` (\*B, N)
        bool: whether a row outside the table is as near as the last one in it (to 1e-12). ``distance`` and
        ``distinct_distance`` carry gradients to ``x`` where it asks for them.

    Raises:
        ValueError: fewer than two rows, k < 1, k >= N, a non-finite value, rows of a size whose square is no number
            (beyond 1e150, below 1e-140), or a zero row under ``"cosine"``.

    >>> import torch
    >>> table = nearest_neighbors(torch.tensor([[0.0], [1.0], [1.0], [3.0]]), 2)
    >>> table.distance
    tensor([[1., 1.],
            [0., 1.],
            [0., 1.],
            [2., 2.]], dtype=torch.float64)
    >>> table.index[1].tolist(), int(table.duplicates)
    ([2, 0], 1)
    >>> table.distinct_distance[2]
    tensor([nan, nan], dtype=torch.float64)
    """
    (rows, radius), (p, cosine) = check_rows(x, k), minkowski(metric)
    distance, index, distinct, _, *counts = found_by(
        exact_neighbors, rows, p, cosine, k, radius, True, block, memory
    )
    return Neighbors(distance, index, distinct, *counts)


def distinct_neighbors(
    x: Tensor,
    k: int,
    *,
    metric: str | float = "euclidean",
    block: int | None = None,
    memory: int | None = None,
) -> Neighbors:
    r"""The k nearest distinct rows of every distinct row, as the dimension estimators use them.

    As ``nearest_neighbors``, but ``distance`` is its ``distinct_distance``, and ``index`` (\*B, N, k) names
    first occurrences only (0 where ``distance`` is NaN).

    >>> import torch
    >>> table = distinct_neighbors(torch.tensor([[0.0], [1.0], [1.0], [3.0]]), 1)
    >>> table.distance.flatten().tolist(), table.index.flatten().tolist(), int(table.duplicates)
    ([1.0, 1.0, nan, 2.0], [1, 0, 0, 1], 1)
    """
    (rows, radius), (p, cosine) = check_rows(x, k), minkowski(metric)
    _, _, distance, index, *counts = found_by(
        exact_neighbors, rows, p, cosine, k, radius, False, block, memory
    )
    return Neighbors(distance, index, distance, *counts)


@opaque(empty_leaves)
def exact_neighbors(
    x: Tensor,
    p: float,
    cosine: bool,
    k: int,
    radius: float,
    over_all: bool,
    block: int | None,
    memory: int | None,
) -> Leaves:
    """The leaves of an exact search, from float32 or float64 rows (*B, N, D)."""
    # As many data sets at a time as the budget holds with one block each.
    together = max(1, budget(memory) // (8 * x.shape[-2] ** 2))

    def search(rows: Tensor, number: int, _: Tensor) -> Found:
        return search_distinct(rows, number, p=p, block=block, memory=memory)

    return leaves_from(search, x, cosine, k, radius, over_all, together)


class NearestNeighbors(Stage):
    r"""The k nearest neighbours of every row of a sample: one table for every neighbour-based measure.

    Distances are those of ``nearest_neighbors`` (exact, float64) or, with ``backend="approximate"``, of the
    neighbours that a FAISS index finds (distances re-computed in float64; the share of true neighbours is
    measured and written).

    Args:
        k: neighbours a row, 1 <= k < N; the row itself is no neighbour.
        metric: ``"euclidean"``, ``"cosine"`` (1 - cos) or a number p >= 1 for Minkowski's distance (exact
            backend only).
        backend: ``"exact"`` or ``"approximate"`` (for N beyond a few hundred thousand; needs ``pip install
            tdgeom[approximate]``).
        block: rows a block of the exact search; None: from ``memory``.
        memory: bytes that the working blocks may take (default 256 MiB).
        in_keys: the rows, default ``"sample"``: (N, D), (\*B, N, D) for a batch of data sets.
        out_keys: default root ``"neighbors"``.

    Writes ``distance``, ``index`` (N, k) over all rows, ``distinct_distance`` (N, k) among distinct rows,
    ``duplicates`` (), ``near_duplicates`` (), ``tied_beyond`` (N,) and, approximate only, ``recall`` (): see
    ``nearest_neighbors`` and ``approximate_neighbors``.

    >>> import torch, tdgeom as tg
    >>> table = tg.NearestNeighbors(1)
    >>> distance, index, *_ = table(sample=torch.tensor([[0.0], [1.0], [5.0]]))
    >>> index.flatten().tolist()
    [1, 0, 1]
    """

    reads: ClassVar = {"sample": "N D"}
    writes: ClassVar = [("neighbors", name) for name in Neighbors._fields]

    def __init__(
        self,
        k: int,
        *,
        metric: str | float = "euclidean",
        backend: str = "exact",
        block: int | None = None,
        memory: int | None = None,
        in_keys: Keys = None,
        out_keys: Keys = None,
    ) -> None:
        if backend not in ("exact", "approximate"):
            raise ValueError(f"backend is 'exact' or 'approximate', got {backend!r}.")
        writes = [*type(self).writes, ("neighbors", "recall")] if backend == "approximate" else None
        super().__init__(in_keys=in_keys, out_keys=out_keys, writes=writes)
        self.k, self.metric, self.backend, self.block, self.memory = k, metric, backend, block, memory

    def compute(self, sample: Tensor) -> dict[str, Tensor]:
        """The table, by name."""
        if self.backend == "approximate":
            table, recall = approximate_neighbors(sample, self.k, metric=self.metric, memory=self.memory)
            return {**table._asdict(), "recall": recall}
        table = nearest_neighbors(sample, self.k, metric=self.metric, block=self.block, memory=self.memory)
        return table._asdict()
