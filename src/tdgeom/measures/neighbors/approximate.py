"""Approximate nearest neighbours through FAISS, with the recall measured rather than assumed."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tdgeom.measures.neighbors.distance_blocks import centred
from tdgeom.measures.neighbors.distance_gradient import found_by
from tdgeom.measures.neighbors.neighbor_table import (
    Found,
    Neighbors,
    check_rows,
    empty_leaves,
    leaves_from,
)
from tdgeom.measures.neighbors.search import search_rows_exactly
from tdgeom.numerics.copies import SAME
from tdgeom.numerics.differences import pair_distances
from tdgeom.numerics.opaque import opaque

__all__ = ["approximate_neighbors"]

_PROBED = 512  # rows whose neighbours are searched exactly to measure the recall
_SPARE = 8  # candidates beyond k that are re-ranked in float64


def approximate_neighbors(
    x: Tensor, k: int, *, metric: str | float = "euclidean", recall: float = 0.99, memory: int | None = None
) -> tuple[Neighbors, Tensor]:
    r"""As ``nearest_neighbors``, from a FAISS inverted-file index that is probed until ``recall`` is reached.

    Rows are grouped into about 4√N cells by k-means; a row's neighbours are sought in the cells nearest to
    it, in float32, and the candidates' distances are computed again in float64. Starting from few cells,
    their number is doubled until the neighbours of 512 rows spread over the data agree with an exact search
    of these rows to the share ``recall``. All cells probed is an exhaustive search, so the target is always
    met. Distances are exact for the neighbours named; only the choice of neighbours is approximate, and a
    missed one makes distances larger.

    FAISS is optional (``pip install tdgeom[approximate]``): it is maintained, has wheels for every supported
    Python, and its cells are compared with blocked matrix products, which suits a table of *all* rows'
    neighbours.

    Args:
        x: (\*B, N, D) rows. k: neighbours a row, 1 <= k < N.
        metric: ``"euclidean"`` or ``"cosine"`` (1 - cos).
        recall: share of true neighbours to reach, in (0, 1].
        memory: bytes that the float64 re-rank and the exact check may take (default 256 MiB).

    Returns:
        The ``Neighbors`` of ``nearest_neighbors``, and the recall measured (\*B,), float64: the share of the
        k places of the rows checked that hold a neighbour no farther than the true k-th.

    Raises:
        ImportError: FAISS is missing. ValueError: as ``nearest_neighbors``, and for other metrics.

    Johnson, Douze, Jégou: "Billion-scale similarity search with GPUs", IEEE Transactions on Big Data 7 (2021).
    """
    if metric not in ("euclidean", "cosine"):
        raise ValueError(
            f"the approximate search takes metric 'euclidean' or 'cosine', got {metric!r}. The exact one takes any p."
        )
    if not 0 < recall <= 1:
        raise ValueError(f"recall is a share in (0, 1], got {recall!r}.")
    _faiss()
    rows, radius = check_rows(x, k)
    distance, index, distinct, _, *counts, reached = found_by(
        faiss_neighbors, rows, 2.0, metric == "cosine", k, radius, recall, memory
    )
    return Neighbors(distance, index, distinct, *counts), reached


def _empty(x: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    return *empty_leaves(x, *settings), x.new_empty(x.shape[:-2], dtype=torch.float64)


@opaque(_empty)
def faiss_neighbors(
    x: Tensor, p: float, cosine: bool, k: int, radius: float, recall: float, memory: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The leaves of an approximate search, from float32 or float64 rows (*B, N, D), and the recall measured."""
    reached = torch.ones(x.shape[:-2], dtype=torch.float64, device=x.device)

    def search(rows: Tensor, number: int, item: Tensor) -> Found:
        near, at, tied, reached.view(-1)[item] = _search(rows[0], number, recall, memory)
        return near.unsqueeze(0), at.unsqueeze(0), tied.unsqueeze(0)

    return *leaves_from(search, x, cosine, k, radius, True, together=1), reached


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "backend='approximate' needs FAISS, which is not installed: pip install 'tdgeom[approximate]' (or "
            "faiss-cpu). backend='exact' needs nothing."
        ) from error
    return faiss


def _search(x: Tensor, k: int, recall: float, memory: int | None) -> tuple[Tensor, Tensor, Tensor, float]:
    """Distances, indices, ties at the edge and recall of the k nearest among the distinct rows ``x`` (n, D)."""
    faiss, n = _faiss(), len(x)
    rows, _ = centred(x.unsqueeze(0))
    small = rows[0].cpu().contiguous().numpy()
    cells = max(1, min(int(4 * n**0.5), n // 39))  # FAISS asks for 39 rows a cell to train
    index = faiss.index_factory(small.shape[1], f"IVF{cells},Flat")
    index.train(small)
    index.add(small)
    probed = torch.linspace(0, n - 1, min(_PROBED, n), dtype=torch.float64, device=x.device).long().unique()
    true, *_ = search_rows_exactly(x, probed, k, p=2.0, memory=memory)
    want = min(n, k + 1 + _SPARE)  # the row itself is among them

    def nearest(which: Tensor) -> Found:
        """The k nearest among the candidates of the rows ``which``, by float64 distance, and whether the next is as near."""
        found = torch.from_numpy(index.search(small[which.cpu().numpy()], want)[1]).to(x.device)
        usable = (found >= 0) & (found != which.unsqueeze(-1))  # -1: nothing more in the cells probed
        row, place = usable.nonzero(as_tuple=True)
        distance = torch.full(found.shape, torch.inf, dtype=torch.float64, device=x.device)
        distance[row, place] = pair_distances(x, which[row], found[row, place], memory=memory)
        found, order = found.clamp(min=0).sort(-1)
        distance, order = distance.gather(-1, order).sort(dim=-1, stable=True)
        tied = (distance[:, k : k + 1] <= SAME * distance[:, k - 1 : k]).any(-1)
        return distance[:, :k].contiguous(), found.gather(-1, order)[:, :k].contiguous(), tied

    def reached(near: Tensor) -> float:
        return float((near <= SAME * true[:, -1:]).double().mean())

    index.nprobe = min(8, cells)
    while reached(nearest(probed)[0]) < recall and index.nprobe < cells:
        index.nprobe = min(2 * index.nprobe, cells)
    near, at, tied = nearest(torch.arange(n, device=x.device))
    while index.nprobe < cells and not bool(torch.isfinite(near).all()):
        index.nprobe = min(2 * index.nprobe, cells)  # some row lies in cells with too few rows
        near, at, tied = nearest(torch.arange(n, device=x.device))
    return near, at, tied & torch.isfinite(near[:, -1]), reached(near[probed])
