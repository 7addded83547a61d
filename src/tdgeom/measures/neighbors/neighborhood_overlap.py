"""How many neighbours two sets of rows have in common: the overlap (mutual k nearest neighbours) and the Jaccard index."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tdgeom.core.keys import Key, Keys
from tdgeom.core.pair_stage import PairStage, check_spread
from tdgeom.measures.neighbors.nearest_neighbors import nearest_neighbors
from tdgeom.numerics.copies import all_alike, undefined_where_alike

__all__ = ["JaccardKNN", "NeighborhoodOverlap", "common_neighbors", "jaccard_knn", "neighborhood_overlap"]


def common_neighbors(index_a: Tensor, index_b: Tensor) -> Tensor:
    r"""How many neighbours two tables share, row by row: (\*B, N, k), (\*B, N, k) to (\*B, N) int64.

    >>> import torch
    >>> common_neighbors(torch.tensor([[1, 2, 3]]), torch.tensor([[3, 4, 1]])).tolist()
    [2]
    """
    if index_a.shape[-2:] != index_b.shape[-2:]:
        raise ValueError(
            f"overlaps compare tables of the same rows and the same k, got {tuple(index_a.shape)} and "
            f"{tuple(index_b.shape)}. Select the same rows on both sides (RowSample does, by row_id)."
        )
    check_spread(index_a, index_b, "overlaps")
    index_a, index_b = torch.broadcast_tensors(index_a, index_b)
    # Either side names a row at most once, so in the sorted union an equal pair is a shared neighbour.
    both = torch.cat((index_a, index_b), -1).sort(-1).values
    return (both[..., 1:] == both[..., :-1]).sum(-1)


def neighborhood_overlap(
    x: Tensor, y: Tensor, *, k: int = 30, metric: str | float = "euclidean", memory: int | None = None
) -> Tensor:
    r"""Mean share of common neighbours: mean_i |N_k(i) ∩ N'_k(i)|/k (alias: mutual kNN).

    N_k(i) are the k nearest other rows of row i in ``x``, N'_k(i) in ``y``; exact copies are neighbours of
    each other.

    Args:
        x, y: (\*B, N, D) and (\*B, N, E), rows matched. k: 1 <= k < N. metric: as in ``nearest_neighbors``.

    Returns:
        (\*B,) in [0, 1], float64; 1 if all neighbourhoods agree.

    Invariances: orthogonal maps, isotropic scale and offsets of either side (``metric="cosine"``: orthogonal maps and
    positive scale of any row; not offsets); not invertible linear maps. Bias: upwards when rows are few: unrelated
    sides give k/(N-1) on average, and 1 at k = N-1, so compare at equal N and k only. NaN with one warning where the rows
    of a side are all alike.

    Raises:
        ValueError: rows that do not match, and whatever ``nearest_neighbors`` refuses.

    Doimo et al.: "Hierarchical nucleation in deep neural networks", NeurIPS 2020; Huh et al.: "The Platonic
    representation hypothesis", ICML 2024 (mutual kNN).

    >>> import torch
    >>> x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    >>> float(neighborhood_overlap(x, 3 * x + 1, k=10))
    1.0
    """
    common = _common(x, y, k, metric, memory)
    return undefined_where_alike(common.mean(-1) / k, all_alike(x) | all_alike(y), "neighborhood_overlap")


def jaccard_knn(
    x: Tensor, y: Tensor, *, k: int = 30, metric: str | float = "euclidean", memory: int | None = None
) -> Tensor:
    r"""Mean Jaccard index of neighbourhoods: mean_i |N_k(i) ∩ N'_k(i)|/|N_k(i) ∪ N'_k(i)|.

    Arguments, conventions and errors as ``neighborhood_overlap``.

    Returns:
        (\*B,) in [0, 1], float64; 1 if all neighbourhoods agree, never above the overlap.

    Invariances: as ``neighborhood_overlap``: orthogonal maps, isotropic scale and offsets of either side; not invertible
    linear maps. Bias: upwards when rows are few: unrelated sides give about k/(2(N-1) - k), and 1 at k = N-1.

    Jaccard 1901; Klabunde et al. 2023, arXiv 2305.06329 (survey: k-NN Jaccard similarity); Tavares et al. 2024, arXiv
    2411.08687.

    >>> import torch
    >>> x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    >>> float(jaccard_knn(x, x.flip(-1), k=10))
    1.0
    """
    common = _common(x, y, k, metric, memory)
    index = (common / (2 * k - common)).mean(-1)
    return undefined_where_alike(index, all_alike(x) | all_alike(y), "jaccard_knn")


def _common(x: Tensor, y: Tensor, k: int, metric: str | float, memory: int | None) -> Tensor:
    tables = [nearest_neighbors(rows, k, metric=metric, memory=memory).index for rows in (x, y)]
    return common_neighbors(*tables).double()


class _TablePair(PairStage):
    """A measure between two neighbour tables, from samples (searched once a site) or from tables at hand."""

    measure: ClassVar[str]

    def __init__(
        self,
        *,
        k: int = 30,
        metric: str | float = "euclidean",
        source: Literal["sample", "neighbors"] = "sample",
        memory: int | None = None,
        in_keys: Keys = None,
        out_keys: Keys = None,
    ) -> None:
        sources: Mapping[str, Mapping[Key, str]] = {
            "sample": {("sample", "a"): "N D", ("sample", "b"): "N E"},
            "neighbors": {("neighbors", "a", "index"): "N k", ("neighbors", "b", "index"): "N l"},
        }
        if source not in sources:
            raise ValueError(f"{type(self).__name__}: source is one of {sorted(sources)}, got {source!r}.")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"{type(self).__name__}: k is a number of neighbours, at least 1, got {k!r}.")
        super().__init__(
            reads=sources[source], writes=[("between", self.measure)], in_keys=in_keys, out_keys=out_keys
        )
        self.k, self.metric, self.source, self.memory = k, metric, source, memory

    def prepare(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """The indices of the k nearest neighbours (N, k), and whether the rows are known to be all alike ()."""
        if self.source == "sample":
            index = nearest_neighbors(given, self.k, metric=self.metric, memory=self.memory).index
            return index, all_alike(given)
        if given.shape[-1] < self.k:
            raise ValueError(
                f"{type(self).__name__} compares {self.k} neighbours, the table has {given.shape[-1]} (shape "
                f"{tuple(given.shape)}). Use NearestNeighbors(k={self.k}) or more."
            )
        return given[..., : self.k], given.new_zeros(given.shape[:-2], dtype=torch.bool)

    def compare(self, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
        """The mean over rows."""
        value = self.mean(common_neighbors(a[0], b[0]).double())
        return undefined_where_alike(value, a[1] | b[1], self.measure)

    def mean(self, common: Tensor) -> Tensor:
        """The measure, from the number of shared neighbours of each row (..., N)."""
        raise TypeError(f"{type(self).__name__} defines no mean().")


class NeighborhoodOverlap(_TablePair):
    r"""Mean share of common neighbours between two sites: see ``neighborhood_overlap`` (alias: mutual kNN).

    A layer x layer matrix is ``ForEachPair(NeighborhoodOverlap(), sites, pairs="all")``: one search a site.

    Args:
        k: neighbours a row, 1 <= k < N.
        metric: as in ``nearest_neighbors``.
        source: ``"sample"`` (searches each side, in ``memory`` bytes) or ``"neighbors"`` (reads
            ``NearestNeighbors``'s ``index``, k columns or more; it does not tell rows that are all alike).
        in_keys: default ``("sample", "a")``, ``("sample", "b")``, or ``("neighbors", "a", "index")``,
            ``("neighbors", "b", "index")``.
        out_keys: default ``("between", "neighborhood_overlap")``, ().

    >>> import torch, tdgeom as tg
    >>> x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    >>> float(tg.NeighborhoodOverlap(k=10)(sample_a=x, sample_b=x.flip(-1)))
    1.0
    """

    measure = "neighborhood_overlap"

    def mean(self, common: Tensor) -> Tensor:
        """The mean overlap."""
        return common.mean(-1) / self.k


class JaccardKNN(_TablePair):
    r"""Mean Jaccard index of the neighbourhoods at two sites: see ``jaccard_knn``.

    Settings and keys as ``NeighborhoodOverlap``; writes ``("between", "jaccard_knn")``, ().

    >>> import torch, tdgeom as tg
    >>> x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    >>> float(tg.JaccardKNN(k=10)(sample_a=x, sample_b=x.flip(-1)))
    1.0
    """

    measure = "jaccard_knn"

    def mean(self, common: Tensor) -> Tensor:
        """The mean index."""
        return (common / (2 * self.k - common)).mean(-1)
