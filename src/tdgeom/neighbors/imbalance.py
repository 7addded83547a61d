"""Information imbalance: does nearness in one set of rows predict nearness in another?"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tdgeom.neighbors._search import (
    MEMORY,
    block_rows,
    centred,
    full_precision,
    half_squares,
    key_error,
    key_of,
    keys_of_blocks,
    pair_distances,
)
from tdgeom.neighbors.knn import flatten, nearest_neighbors, prepare_rows
from tdgeom.stage import Key, PairStage

__all__ = ["InformationImbalance", "conditional_ranks", "information_imbalance"]


def information_imbalance(
    x: Tensor, y: Tensor, *, k: int = 1, metric: str | float = "euclidean", memory: int | None = None
) -> tuple[Tensor, Tensor]:
    r"""Information imbalance in both directions, Δ(x→y) and Δ(y→x).

    Δ(A→B) = 2/N · mean rank in B (1..N-1) of the k nearest neighbours in A, over all rows: near 2/N if A's
    neighbours are B's, near 1 if A tells nothing about B.

    Exact over all ranks: a rank is one plus the number of rows nearer in B, counted block by block without
        sorting and
    without an N x N table; rows that float32 cannot place are compared in float64. Ties in B count half (the
    mean rank of the tied rows); ties in A go to the row that occurs first.

    Args:
        x, y: (\*B, N, D) and (\*B, N, E), rows matched. k: 1 <= k < N. metric: as in ``nearest_neighbors``.
        memory: bytes that the working blocks may take (default 256 MiB).

    Returns:
        Two tensors (\*B,), float64, in [2/N, 2(N-1)/N].

    Raises:
        ValueError: rows that do not match, and whatever ``nearest_neighbors`` refuses.

    Glielmo, Zeni, Cheng, Csányi, Laio: "Ranking the information content of distance measures", PNAS Nexus 1
        (2022).

    >>> import torch
    >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    >>> full_to_part, part_to_full = information_imbalance(x, x[:, :1])
    >>> bool(full_to_part < part_to_full)
    True
    """
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"information_imbalance compares matched rows, got {tuple(x.shape)} and {tuple(y.shape)}. Select the same "
            f"rows on both sides (RowSample does, by row_id)."
        )
    near = [nearest_neighbors(rows, k, metric=metric, memory=memory).index for rows in (x, y)]
    n = x.shape[-2]
    to_y = conditional_ranks(y, near[0], metric=metric, memory=memory)
    to_x = conditional_ranks(x, near[1], metric=metric, memory=memory)
    return tuple(2 / n * ranks.mean((-1, -2)) for ranks in (to_y, to_x))  # type: ignore[return-value]


def conditional_ranks(
    x: Tensor, index: Tensor, *, metric: str | float = "euclidean", memory: int | None = None
) -> Tensor:
    r"""The rank that each row named in ``index`` has among all other rows, by distance from the row that names it.

    Args:
        x: (\*B, N, D) rows. index: (\*B, N, k): row i asks for the ranks of rows index[i].

    Returns:
        (\*B, N, k) float64 in 1..N-1; tied rows share their mean rank.

    >>> import torch
    >>> conditional_ranks(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[2], [2], [0]])).flatten().tolist()
    [2.0, 2.0, 2.0]
    """
    rows, p = prepare_rows(x, index.shape[-1], metric)
    flat, index = flatten(rows.detach()), index.reshape(-1, *index.shape[-2:])
    b, n, _ = flat.shape
    step = max(1, (MEMORY if memory is None else memory) // (8 * n * n))
    with full_precision(flat.device):
        ranks = [_ranks(flat[s : s + step], index[s : s + step], p, memory) for s in range(0, b, step)]
    return torch.cat(ranks).view(*x.shape[:-1], -1)


class _Limits(NamedTuple):
    """Per asked row (b, N): its distance, and the keys below and above which float32 decides."""

    distance: Tensor
    low: Tensor
    high: Tensor


def _ranks(x: Tensor, index: Tensor, p: float, memory: int | None) -> Tensor:
    b, n, width = x.shape
    rows, scale = centred(x)
    size = torch.linalg.vector_norm(rows, dim=-1).double()
    flat = x.reshape(b * n, width)
    base = (torch.arange(b, device=x.device) * n)[:, None]
    own = (base + torch.arange(n, device=x.device)).flatten()
    asked = []
    for place in range(index.shape[-1]):
        distance = pair_distances(flat, own, (base + index[..., place]).flatten(), p=p, memory=memory).view(
            b, n
        )
        reach = distance / scale[:, None]
        # Twice the bound: rows far outside, whose own rounding is larger, then can't fall below it either.
        error = 2 * key_error(size, reach, width, p, torch.float32)
        key = key_of(reach, p)
        asked.append(_Limits(distance, (key - error).float(), (key + error).float()))
    block = block_rows(n, b, block=None, memory=memory, device=x.device)
    block = math.ceil(n / math.ceil(n / block))
    half = half_squares(rows, p)
    below = torch.zeros((len(asked), b, n), dtype=torch.float64, device=x.device)
    for i in range(0, n, block):
        for j in range(i, n, block):
            mine, other = slice(i, min(i + block, n)), slice(j, min(j + block, n))
            keys = half.new_empty((b, mine.stop - i, other.stop - j))
            keys_of_blocks(rows[:, mine], rows[:, other], half[:, mine], half[:, other], p, out=keys)
            if i == j:
                keys.diagonal(dim1=1, dim2=2).fill_(torch.inf)
            for count, limits in zip(below, asked):
                _count(count, keys, limits, mine, other, flat, p, memory)
                if i != j:
                    _count(count, keys.mT, limits, other, mine, flat, p, memory)
    # Each asked row met itself as a tie, which counted half.
    return (below + 0.5).movedim(0, -1)


def _count(
    count: Tensor,
    keys: Tensor,
    limits: _Limits,
    mine: slice,
    other: slice,
    flat: Tensor,
    p: float,
    memory: int | None,
) -> None:
    """Add to ``count`` (b, N) how many rows of ``other`` are nearer to each row of ``mine`` than the row asked for."""
    low, high = limits.low[:, mine].unsqueeze(-1), limits.high[:, mine].unsqueeze(-1)
    sure = (keys < low).sum(-1, dtype=torch.int32)  # int64 would take ten times as long
    count[:, mine] += sure
    open_rows = (keys <= high).sum(-1, dtype=torch.int32) != sure
    item, row = open_rows.nonzero(as_tuple=True)
    if not len(item):
        return
    between = keys[item, row]
    between = (between >= low[item, row]) & (between <= high[item, row])
    at, column = between.nonzero(as_tuple=True)
    item, row = item[at], row[at] + mine.start
    n = count.shape[-1]
    distance = pair_distances(flat, item * n + row, item * n + column + other.start, p=p, memory=memory)
    asked = limits.distance[item, row]
    share = (distance < asked).double() + (distance == asked).double() / 2
    count.view(-1).index_add_(0, item * n + row, share)


class InformationImbalance(PairStage):
    r"""Information imbalance between two sites, both directions: see ``information_imbalance``.

    Args:
        k: nearest neighbours whose ranks are averaged, 1 <= k < N.
        metric: as in ``nearest_neighbors``.
        memory: bytes that the working blocks may take (default 256 MiB).
        in_keys: default ``("sample", "a")``, ``("sample", "b")``.
        out_keys: default ``("between", "information_imbalance_ab")``, ``("between",
            "information_imbalance_ba")``, each ().

    >>> import torch, tdgeom as tg
    >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    >>> ab, ba = tg.InformationImbalance()(sample_a=x, sample_b=2 * x)
    >>> float(ab), float(ba)
    (0.01, 0.01)
    """

    reads: ClassVar = {("sample", "a"): "N D", ("sample", "b"): "N E"}
    writes: ClassVar = [("between", "information_imbalance_ab"), ("between", "information_imbalance_ba")]

    def __init__(
        self,
        *,
        k: int = 1,
        metric: str | float = "euclidean",
        memory: int | None = None,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"InformationImbalance: k is a number of neighbours, at least 1, got {k!r}.")
        self.k, self.metric, self.memory = k, metric, memory

    def prepare(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """The rows and the indices of their k nearest neighbours."""
        return sample, nearest_neighbors(sample, self.k, metric=self.metric, memory=self.memory).index

    def compare(self, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Both directions."""
        n = a[0].shape[-2]
        to_b = conditional_ranks(b[0], a[1], metric=self.metric, memory=self.memory)
        to_a = conditional_ranks(a[0], b[1], metric=self.metric, memory=self.memory)
        return 2 / n * to_b.mean((-1, -2)), 2 / n * to_a.mean((-1, -2))
