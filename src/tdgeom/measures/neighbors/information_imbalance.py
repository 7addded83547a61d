"""Information imbalance: does nearness in one set of rows predict nearness in another?"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tdgeom.core.keys import Keys
from tdgeom.core.pair_stage import PairStage
from tdgeom.measures.neighbors.distance_blocks import (
    KeyBlocks,
    centred,
    key_error,
    key_of,
)
from tdgeom.measures.neighbors.foreign_tables import own_index
from tdgeom.measures.neighbors.nearest_neighbors import nearest_neighbors
from tdgeom.measures.neighbors.neighbor_table import check_rows, minkowski, searchable
from tdgeom.measures.neighbors.row_classes import RowClasses, cells_of, grouped, nearest_classes
from tdgeom.measures.neighbors.search import search_distinct, search_rows_exactly
from tdgeom.numerics.centring import check_matched, warn_undefined
from tdgeom.numerics.copies import SAME, all_alike, first_copies
from tdgeom.numerics.differences import budget, pair_distances
from tdgeom.numerics.opaque import opaque

__all__ = ["InformationImbalance", "conditional_ranks", "information_imbalance"]


_Block = tuple[Tensor, slice, slice]  # of keys, and its rows and columns


def information_imbalance(
    x: Tensor, y: Tensor, *, k: int = 1, metric: str | float = "euclidean", memory: int | None = None
) -> tuple[Tensor, Tensor]:
    r"""Information imbalance in both directions, Δ(x→y) and Δ(y→x).

    Formula:
        Δ(A→B) = 2/N · mean_i r_B(i, n_A(i)); n_A(i) the nearest neighbour of row i in A, r_B its rank in B (1..N-1)

    Near 2/N if A's neighbours are B's, near 1 if A tells nothing about B; for k > 1 the mean over the k nearest.

    Exact over all ranks: a rank is one plus the number of rows nearer in B, counted block by block without
    sorting and without an N x N table; rows that float32 cannot place are compared in float64. Ties in B count half
    (the mean rank of the tied rows); where a rows are as near in A as the k-th, each counts r/a of the r places left.

    Args:
        x, y: (\*B, N, D) and (\*B, N, E), rows matched. k: 1 <= k < N. metric: as in ``nearest_neighbors``.
        memory: bytes that the working blocks may take (default 256 MiB).

    Returns:
        Two tensors (\*B,), float64, in [2/N, 2(N-1)/N].

    Invariances: orthogonal maps, isotropic scale and offsets of either side (``metric="cosine"``: orthogonal maps and
    positive scale of any row; not offsets); not invertible linear maps. Bias: identical sides give (k+1)/N, not 0;
    unrelated ones 1 on average at any N. NaN with one warning where the rows of a side are all alike.

    Raises:
        ValueError: rows that do not match, and whatever ``nearest_neighbors`` refuses.

    Glielmo, Zeni, Cheng, Csányi, Laio: "Ranking the information content of distance measures", PNAS Nexus 1 (2022).

    >>> import torch
    >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    >>> full_to_part, part_to_full = information_imbalance(x, x[:, :1])
    >>> bool(full_to_part < part_to_full)
    True
    """
    check_matched(x, y, "information_imbalance")
    x, y = _spread(x, y)
    p, cosine = minkowski(metric)
    ab, ba = both_imbalances(check_rows(x, k)[0].detach(), check_rows(y, k)[0].detach(), k, p, cosine, memory)
    return _defined(ab, ba, all_alike(x) | all_alike(y))


def _spread(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    lead = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    return x.expand(*lead, *x.shape[-2:]), y.expand(*lead, *y.shape[-2:])


def _defined(ab: Tensor, ba: Tensor, alike: Tensor) -> tuple[Tensor, Tensor]:
    ab, ba = (torch.where(alike, torch.nan, value) for value in (ab, ba))
    return warn_undefined(ab, "information_imbalance", "the rows of one side are all alike."), ba


def _empty(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:-2], dtype=torch.float64), x.new_empty(x.shape[:-2], dtype=torch.float64)


@opaque(_empty)
def both_imbalances(
    x: Tensor, y: Tensor, k: int, p: float, cosine: bool, memory: int | None
) -> tuple[Tensor, Tensor]:
    """Δ(x→y) and Δ(y→x) of float32 or float64 rows (*B, N, D) and (*B, N, E)."""
    a, b, n = searchable(x, cosine), searchable(y, cosine), x.shape[-2]
    if not len(a):
        return _empty(x)
    step = max(1, budget(memory) // (8 * n * n))
    pairs = [_both_directions(a[s : s + step], b[s : s + step], k, p, memory) for s in range(0, len(a), step)]
    ab, ba = (torch.cat(side).view(x.shape[:-2]) for side in zip(*pairs))
    return ab, ba


def _both_directions(x: Tensor, y: Tensor, k: int, p: float, memory: int | None) -> tuple[Tensor, Tensor]:
    """Both imbalances (b,) of (b, N, D) and (b, N, E), with as few passes over all pairs as memory allows."""
    b, n, _ = x.shape
    own = torch.arange(n, device=x.device)
    if not all(bool((first_copies(rows) == own).all()) for rows in (x, y)):
        # Copies are searched among distinct rows but ranked among all: no pass serves both.
        tables = [nearest_neighbors(rows, k, metric=p, memory=memory) for rows in (x, y)]
        to_y, to_x = (
            _mean_rank(rows, other, table.index, table.tied_beyond, p, memory)
            for rows, other, table in ((x, y, tables[0]), (y, x, tables[1]))
        )
    else:
        # x's keys are kept for the last step if they fit; y's serve the ranks and the search in one pass.
        kept: list[_Block] | None = [] if 4 * b * n * (n + 1024) // 2 <= budget(memory) else None
        note = None if kept is None else lambda *block: kept.append(block)
        _, near_x, tied_x = search_distinct(x, k, p=p, memory=memory, keep=kept is not None, also=note)
        ranks = None if bool(tied_x.any()) else _Ranks(y, near_x, p, memory)
        _, near_y, tied_y = search_distinct(y, k, p=p, memory=memory, also=ranks.take if ranks else None)
        to_y = ranks.result().mean((-1, -2)) if ranks else _mean_rank(x, y, near_x, tied_x, p, memory)
        to_x = _mean_rank(y, x, near_y, tied_y, p, memory, kept)
    return 2 / n * to_y, 2 / n * to_x


@opaque(lambda x, *others: x.new_empty(x.shape[:-2], dtype=torch.float64))
def mean_rank(
    x: Tensor, y: Tensor, near: Tensor, tied: Tensor, p: float, cosine: bool, memory: int | None
) -> Tensor:
    """Mean rank in ``y`` (*B, N, E) of the nearest in ``x`` (*B, N, D), ``near`` (*B, N, k), ties beyond these averaged."""
    rows, others, n = searchable(x, cosine), searchable(y, cosine), x.shape[-2]
    at, ties = near.reshape(-1, n, near.shape[-1]), tied.reshape(-1, n)
    step = max(1, budget(memory) // (8 * n * n))
    blocks = [slice(s, s + step) for s in range(0, len(rows), step)]
    parts = [_mean_rank(rows[s], others[s], at[s], ties[s], p, memory) for s in blocks]
    return torch.cat(parts).view(x.shape[:-2]) if parts else x.new_empty(x.shape[:-2], dtype=torch.float64)


def _mean_rank(
    x: Tensor,
    y: Tensor,
    near: Tensor,
    tied: Tensor,
    p: float,
    memory: int | None,
    kept: list[_Block] | None = None,
) -> Tensor:
    """(b,) from (b, N, D), (b, N, E), (b, N, k) and (b, N); ``kept`` are the blocks of y's keys, if they are at hand."""
    if not bool(tied.any()):
        return _ranks(y, near, p, memory, kept).mean((-1, -2))
    return torch.stack([_mean_rank_of_ties(a, b, near.shape[-1], p, memory) for a, b in zip(x, y)])


def _mean_rank_of_ties(x: Tensor, y: Tensor, k: int, p: float, memory: int | None) -> Tensor:
    """() for one data set: rows as near as the k-th share the places left, so the ranks of all of them are needed."""
    n = len(x)
    if bool(all_alike(x) | all_alike(y)):
        return x.new_full((), torch.nan, dtype=torch.float64)

    (sides,) = nearest_classes(x.unsqueeze(0), k, p, memory)
    # Among distinct rows of y, each as many as it has copies.
    group, many, kept = grouped(y)
    cells = cells_of(sides, RowClasses(group, many, group.unsqueeze(-1), group.unsqueeze(-1)))
    order, total = cells.b.argsort(), x.new_zeros((), dtype=torch.float64)
    for part in order.split(max(1, budget(memory) // (64 * n))):
        asked, row = cells.b[part].unique(return_inverse=True)
        ranks = _group_ranks(y[kept], asked, many, p, memory)
        mine = cells.a[part]
        weight = ranks.new_zeros(len(part), len(sides.size)).scatter(1, sides.index[mine], sides.weight[mine])
        summed = weight[:, cells.a].mul_(ranks[row][:, cells.b]) @ cells.count.double()
        itself = weight.gather(1, mine.unsqueeze(-1)) * ranks[row].gather(1, cells.b[part].unsqueeze(-1))
        total = total + (cells.count[part] * (summed - itself[:, 0])).sum()
    return total / (n * k)


def _group_ranks(y: Tensor, which: Tensor, many: Tensor, p: float, memory: int | None) -> Tensor:
    """(r, m): mean rank, from the rows ``which`` of distinct rows (m, E), of the ``many`` copies of each, ties included."""
    m = len(y)
    if m == 1:
        return (many / 2).double().expand(len(which), 1)
    distance, at, _ = search_rows_exactly(y, which, m - 1, p=p, memory=memory)
    own = which.unsqueeze(-1)
    distance, at = torch.cat((torch.zeros_like(distance[:, :1]), distance), -1), torch.cat((own, at), -1)
    count = many[at].double()
    count[:, 0] -= 1  # a row is not among its own copies
    end = count.cumsum(-1)
    farther = distance[:, 1:] > SAME * distance[:, :-1]
    edge = torch.ones_like(farther[:, :1])
    begin = torch.where(torch.cat((edge, farther), -1), end - count, 0.0).cummax(-1).values
    end = torch.where(torch.cat((farther, edge), -1), end, torch.inf).flip(-1).cummin(-1).values.flip(-1)
    return distance.new_zeros(len(which), m).scatter(-1, at, (begin + end + 1) / 2)


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
    index = own_index(index, "conditional_ranks")
    return ranks_of(check_rows(x, index.shape[-1])[0].detach(), index, *minkowski(metric), memory)


@opaque(lambda x, index, *settings: index.new_empty(index.shape, dtype=torch.float64))
def ranks_of(x: Tensor, index: Tensor, p: float, cosine: bool, memory: int | None) -> Tensor:
    """The ranks (*B, N, k) among float32 or float64 rows (*B, N, D)."""
    rows, asked = searchable(x, cosine), index.reshape(-1, *index.shape[-2:])
    n = rows.shape[1]
    step = max(1, budget(memory) // (8 * n * n))
    parts = [_ranks(rows[s : s + step], asked[s : s + step], p, memory) for s in range(0, len(rows), step)]
    return torch.cat(parts).view(index.shape)


def _ranks(
    x: Tensor, index: Tensor, p: float, memory: int | None, kept: list[_Block] | None = None
) -> Tensor:
    """Ranks (b, N, k) of the rows at ``index``; ``kept`` are the blocks of keys, if they are at hand."""
    ranks = _Ranks(x, index, p, memory)
    if kept is None:
        ranks.blocks.each(ranks.take)
    for block in kept or ():
        ranks.take(*block)
    return ranks.result()


class _Ranks:
    """Counts, over blocks of keys, the rows nearer to row i than row index[i]."""

    def __init__(self, x: Tensor, index: Tensor, p: float, memory: int | None) -> None:
        b, n, width = x.shape
        self.n, self.p, self.memory = n, p, memory
        self.flat = x.reshape(b * n, width)
        rows, scale = centred(x)
        self.blocks = KeyBlocks(rows, p, memory=memory)
        base = (torch.arange(b, device=x.device) * n)[:, None]
        own = (base + torch.arange(n, device=x.device)).flatten()
        norm = torch.linalg.vector_norm(rows, dim=-1).double()
        # Per asked neighbour: its distance, and the keys below and above which float32 decides. Padding never asks.
        self.distance = torch.full(
            (index.shape[-1], b, self.blocks.total), torch.nan, dtype=torch.float64, device=x.device
        )
        self.low = torch.full(self.distance.shape, -torch.inf, dtype=torch.float32, device=x.device)
        self.high = self.low.clone()
        for place in range(index.shape[-1]):
            found = (base + index[..., place]).flatten()
            distance = pair_distances(self.flat, own, found, p=p, memory=memory).view(b, n)
            reach = distance / scale[:, None]
            # Twice the bound: rows far outside, whose own rounding is larger, then can't fall below it either.
            error = 2 * key_error(norm, reach, width, p, torch.float32)
            key = key_of(reach, p)
            self.distance[place, :, :n] = distance
            self.low[place, :, :n] = (key - error).float()
            self.high[place, :, :n] = (key + error).float()
        self.count = torch.zeros_like(self.distance)

    def take(self, keys: Tensor, mine: slice, other: slice) -> None:
        """Count one block, for its rows and (as it is symmetric) for its columns."""
        for place in range(len(self.count)):
            self._count(place, keys, mine, other)
            if mine != other:
                self._count(place, keys.mT, other, mine)

    def _count(self, place: int, keys: Tensor, mine: slice, other: slice) -> None:
        low, high = self.low[place, :, mine].unsqueeze(-1), self.high[place, :, mine].unsqueeze(-1)
        sure = (keys < low).sum(-1, dtype=torch.int32)  # int64 would take ten times as long
        self.count[place, :, mine] += sure
        item, row = ((keys <= high).sum(-1, dtype=torch.int32) != sure).nonzero(as_tuple=True)
        if not len(item):
            return
        # Rows with keys that float32 leaves open: these are compared in float64, a tie counts half.
        between = keys[item, row]
        between = (between >= low[item, row]) & (between <= high[item, row])
        at, column = between.nonzero(as_tuple=True)
        item, row = item[at], row[at] + mine.start
        i, j = item * self.n + row, item * self.n + column + other.start
        distance = pair_distances(self.flat, i, j, p=self.p, memory=self.memory)
        asked = self.distance[place, item, row]
        share = (distance * SAME < asked).double() / 2 + (distance <= SAME * asked).double() / 2
        self.count[place].index_put_((item, row), share, accumulate=True)

    def result(self) -> Tensor:
        """(b, N, k): the asked row met itself as a tie, which counted half; the other half makes ranks begin at 1."""
        return (self.count[..., : self.n] + 0.5).movedim(0, -1)


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
        in_keys: Keys = None,
        out_keys: Keys = None,
    ) -> None:
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"InformationImbalance: k is a number of neighbours, at least 1, got {k!r}.")
        self.k, self.metric, self.memory = k, metric, memory

    def compute(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Both directions of one pair: fewer passes than ``compare`` of two prepared sides."""
        return information_imbalance(a, b, k=self.k, metric=self.metric, memory=self.memory)

    def prepare(self, sample: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows, the indices of their k nearest neighbours, and whether others are as near as the last."""
        table = nearest_neighbors(sample, self.k, metric=self.metric, memory=self.memory)
        return sample, table.index, table.tied_beyond

    def compare(
        self, a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Both directions."""
        rows_a, rows_b = _spread(check_rows(a[0], 1)[0].detach(), check_rows(b[0], 1)[0].detach())
        lead, settings = rows_a.shape[:-2], (*minkowski(self.metric), self.memory)
        ab, ba = (
            2
            / rows.shape[-2]
            * mean_rank(rows, others, near.expand(*lead, *near.shape[-2:]), tied.expand(*lead, -1), *settings)
            for rows, others, near, tied in ((rows_a, rows_b, *a[1:]), (rows_b, rows_a, *b[1:]))
        )
        return _defined(ab, ba, all_alike(a[0]) | all_alike(b[0]))
