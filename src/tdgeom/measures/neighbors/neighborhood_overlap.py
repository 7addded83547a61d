"""How many neighbours two sets of rows have in common: the overlap (mutual k nearest neighbours) and the Jaccard index."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from tdgeom.core.keys import Key, Keys
from tdgeom.core.pair_stage import PairStage, check_spread
from tdgeom.measures.neighbors.foreign_tables import own_distances, own_index, without_self
from tdgeom.measures.neighbors.nearest_neighbors import nearest_neighbors
from tdgeom.measures.neighbors.neighbor_table import Neighbors, check_rows, minkowski
from tdgeom.measures.neighbors.row_classes import (
    RowClasses,
    nearest_classes,
    repeats,
    single_rows,
    weight_in_common,
)
from tdgeom.measures.neighbors.tie_weights import (
    common_weight,
    tie_weights,
    warn_of_ties,
    warn_of_ties_beyond,
    weighted_table,
)
from tdgeom.numerics.centring import occurs
from tdgeom.numerics.copies import all_alike, undefined_where_alike
from tdgeom.numerics.opaque import opaque

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
    index_a, index_b = (without_self(index, "common_neighbors") for index in (index_a, index_b))
    index_a, index_b = torch.broadcast_tensors(index_a, index_b)
    # Either side names a row at most once, so in the sorted union an equal pair is a shared neighbour.
    both = torch.cat((index_a, index_b), -1).sort(-1).values
    return (both[..., 1:] == both[..., :-1]).sum(-1)


def neighborhood_overlap(
    x: Tensor, y: Tensor, *, k: int = 30, metric: str | float = "euclidean", memory: int | None = None
) -> Tensor:
    r"""Mean share of common neighbours (alias: mutual kNN).

    Formula:
        neighborhood_overlap = mean_i |N_k(i) ∩ N'_k(i)| / k

    N_k(i) are the k nearest other rows of row i in ``x``, N'_k(i) in ``y``; exact copies are neighbours of
    each other. Where a rows are as near as the k-th and r places are left for them, each is a member with weight w = r/a, and
    the intersection is Σ_j w_ij w'_ij: unrelated sides give chance, however many ties there are (binary or one-hot rows, rows of
    zeros). A side's overlap with itself, the ceiling, is then below 1; one warning says so below 0.98.

    Args:
        x, y: (\*B, N, D) and (\*B, N, E), rows matched. k: 1 <= k < N. metric: as in ``nearest_neighbors``.

    Returns:
        (\*B,) in [0, 1], float64; 1 if all neighbourhoods agree and no distance ties.

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
    a, b = (_side(rows, k, metric, memory) for rows in (x, y))
    return _compared(a, b, "neighborhood_overlap", _mean_overlap)[0]


def jaccard_knn(
    x: Tensor, y: Tensor, *, k: int = 30, metric: str | float = "euclidean", memory: int | None = None
) -> Tensor:
    r"""Mean Jaccard index of neighbourhoods.

    Formula:
        jaccard_knn = mean_i |N_k(i) ∩ N'_k(i)| / |N_k(i) ∪ N'_k(i)|

    Arguments, conventions (ties: X/(2k - X) with X = Σ_j w_ij w'_ij) and errors as ``neighborhood_overlap``.

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
    a, b = (_side(rows, k, metric, memory) for rows in (x, y))
    return _compared(a, b, "jaccard_knn", _mean_jaccard)[0]


def _mean_overlap(common: Tensor, k: int) -> Tensor:
    return common.mean(-1) / k


def _mean_jaccard(common: Tensor, k: int) -> Tensor:
    return (common / (2 * k - common)).mean(-1)


class _Side(NamedTuple):
    """One side's neighbours: their indices (*B, N, K) and weights, None if the first k are all there is to tell."""

    k: int
    near: Tensor
    weight: Tensor | None
    alike: Tensor  # (*B,) whether the rows are known to be all alike
    search: tuple[float, bool, int | None] | None = (
        None  # in a graph being traced ``near`` holds the rows, to be searched so
    )
    classes: list[RowClasses] | None = (
        None  # of every data set, where rows repeat: ``near`` are then their numbers
    )


def _side(x: Tensor, k: int, metric: str | float, memory: int | None) -> _Side:
    alike = all_alike(x)
    if (
        torch.compiler.is_compiling()
    ):  # how far ties reach no graph can know: one node of it searches and compares
        check_rows(x, k)
        return _Side(k, x, None, alike, (*minkowski(metric), memory))

    if repeats(check_rows(x, k)[0]):
        found = nearest_classes(x, k, metric, memory)
        numbers = torch.stack([classes.group for classes in found]).view(*x.shape[:-1], 1)
        return _Side(k, numbers, None, alike, classes=found)

    def search(width: int) -> Neighbors:
        return nearest_neighbors(x, width, metric=metric, memory=memory)

    return _Side(k, *_settled(*weighted_table(search, k, k, x.shape[-2], alike), k), alike)


def _settled(index: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
    """The first k columns alone where no others share in them."""
    tied = occurs(weight[..., :k] != 1) or occurs(weight[..., k:] != 0)
    return (index, weight) if tied else (index[..., :k], None)


def _compared(
    a: _Side, b: _Side, measure: str, mean: Callable[[Tensor, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """The measure, the ``mean`` of the weight that rows share, and its ceiling, (*B,) each; NaN where a side is all alike.

    The ceiling of a row is the smaller of its Σ w² and Σ w'², which no weights of the other side exceed.
    """
    check_spread(a.near, b.near, measure)
    if a.search is None:
        common, most = _shared(a, b)
    else:
        common, most = shared_weight(a.near, b.near, a.k, *a.search)
    alike = a.alike | b.alike
    ceiling = mean(most, a.k)
    warn_of_ties(torch.where(alike, 1.0, ceiling), measure)
    value = undefined_where_alike(mean(common, a.k), alike, measure)
    return value, torch.where(alike, torch.nan, ceiling)


def _shared(a: _Side, b: _Side) -> tuple[Tensor, Tensor]:
    """Σ w·w' and its ceiling, row by row."""
    if a.classes or b.classes:
        return _shared_by_classes(a, b)
    if a.weight is None and b.weight is None:
        common = common_neighbors(a.near, b.near).double()
        return common, torch.full_like(common, a.k)
    full = [torch.ones_like(s.near, dtype=torch.float64) if s.weight is None else s.weight for s in (a, b)]
    common = common_weight(a.near, full[0], b.near, full[1])
    return common, torch.minimum(*(weight.square().sum(-1) for weight in full))


def _shared_by_classes(a: _Side, b: _Side) -> tuple[Tensor, Tensor]:
    """The same where rows of a side repeat, a data set at a time."""
    lead = torch.broadcast_shapes(a.near.shape[:-2], b.near.shape[:-2])
    pairs = zip(*(_spread_classes(side, lead) for side in (a, b)))
    common, most = zip(*(weight_in_common(*pair) for pair in pairs))
    shape = (*lead, a.near.shape[-2])
    return torch.stack(common).view(shape), torch.stack(most).view(shape)


def _spread_classes(side: _Side, lead: torch.Size) -> list[RowClasses]:
    own, table = side.near.shape[:-2], side.near.shape[-2:]
    each = side.classes
    if each is None:
        near = side.near.reshape(-1, *table)
        weight = torch.ones_like(near) if side.weight is None else side.weight.reshape(-1, *table)
        each = [single_rows(*one) for one in zip(near, weight)]
    return [each[i] for i in torch.arange(len(each)).view(own).expand(lead).flatten().tolist()]


def _empty(x: Tensor, y: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    shape = (*torch.broadcast_shapes(x.shape[:-2], y.shape[:-2]), x.shape[-2])
    return x.new_empty(shape, dtype=torch.float64), x.new_empty(shape, dtype=torch.float64)


@opaque(_empty)
def shared_weight(
    x: Tensor, y: Tensor, k: int, p: float, cosine: bool, memory: int | None
) -> tuple[Tensor, Tensor]:
    """Σ w·w' of every row and its ceiling, (*B, N) each, from rows (*B, N, D) and (*B, N, E)."""
    metric = "cosine" if cosine else p
    return _shared(_side(x, k, metric, memory), _side(y, k, metric, memory))


class _TablePair(PairStage):
    """A measure between two neighbour tables, from samples (searched once a site) or from tables at hand."""

    optional: ClassVar = frozenset({"distance", "tied_beyond"})
    measure: ClassVar[str]
    averaged: ClassVar[
        list[Callable[[Tensor, int], Tensor]]
    ]  # the one function, in a list for no method to be made of it

    def __init__(
        self,
        *,
        k: int = 30,
        metric: str | float = "euclidean",
        source: Literal["sample", "neighbors"] = "sample",
        memory: int | None = None,
        ceiling: bool = False,
        in_keys: Keys = None,
        out_keys: Keys = None,
    ) -> None:
        sources: Mapping[str, Mapping[Key, str]] = {
            "sample": {("sample", "a"): "N D", ("sample", "b"): "N E"},
            "neighbors": {
                ("neighbors", "a", "index"): "N k", ("neighbors", "b", "index"): "N l",
                ("neighbors", "a", "distance"): "N k", ("neighbors", "b", "distance"): "N l",
                ("neighbors", "a", "tied_beyond"): "N", ("neighbors", "b", "tied_beyond"): "N",
            },
        }  # fmt: skip
        if source not in sources:
            raise ValueError(f"{type(self).__name__}: source is one of {sorted(sources)}, got {source!r}.")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"{type(self).__name__}: k is a number of neighbours, at least 1, got {k!r}.")
        writes: list[Key] = [("between", self.measure)]
        if ceiling:
            writes.append(("between", "ceiling"))
        super().__init__(reads=sources[source], writes=writes, in_keys=in_keys, out_keys=out_keys)
        self.k, self.metric, self.source, self.memory, self.ceiling = k, metric, source, memory, ceiling

    def prepare(
        self, given: Tensor, distance: Tensor | None = None, tied_beyond: Tensor | None = None
    ) -> _Side:
        """The neighbours of one side and their weights."""
        if self.source == "sample":
            return _side(given, self.k, self.metric, self.memory)
        name = type(self).__qualname__
        if given.shape[-1] < self.k:
            raise ValueError(
                f"{name} compares {self.k} neighbours, the table has {given.shape[-1]} (shape {tuple(given.shape)}). Use "
                f"NearestNeighbors(k={self.k}) or more."
            )
        index, unknown = own_index(given, name), given.new_zeros(given.shape[:-2], dtype=torch.bool)
        if distance is None:
            return _Side(self.k, index[..., : self.k], None, unknown)
        weight, beyond = tie_weights(own_distances(distance, name), self.k, tied_beyond)
        warn_of_ties_beyond(beyond, given.shape[-1], name)
        return _Side(self.k, *_settled(index, weight, self.k), unknown)

    def reordered(self, side: _Side, order: Tensor) -> _Side | None:
        """A prepared side, its rows in another order (N,) int64; None where it must be prepared anew."""
        if side.search is not None or side.classes is not None:
            return None
        place = torch.argsort(order)  # where a row has gone
        weight = None if side.weight is None else side.weight[..., order, :]
        return side._replace(near=place[side.near[..., order, :].long()].to(side.near.dtype), weight=weight)

    def compare(self, a: _Side, b: _Side) -> list[Tensor]:
        """The mean over rows, and on request its ceiling."""
        value, ceiling = _compared(a, b, self.measure, self.averaged[0])
        return [value, ceiling] if self.ceiling else [value]


class NeighborhoodOverlap(_TablePair):
    r"""Mean share of common neighbours between two sites: see ``neighborhood_overlap`` (alias: mutual kNN).

    A layer x layer matrix is ``ForEachPair(NeighborhoodOverlap(), sites, pairs="all")``: one search a site.

    Args:
        k: neighbours a row, 1 <= k < N.
        metric: as in ``nearest_neighbors``.
        source: ``"sample"`` (searches each side, in ``memory`` bytes) or ``"neighbors"`` (reads
            ``NearestNeighbors``'s ``index`` and, if they are there, ``distance`` and ``tied_beyond``, k columns or more; it does
            not tell rows that are all alike, without distances no ties either, and warns where ties go beyond the table).
        ceiling: also write ``ceiling``, the overlap that ties leave possible: the mean over rows of the smaller overlap of a side
            with itself, 1 without ties.
        in_keys: default ``("sample", "a")``, ``("sample", "b")``, or ``("neighbors", "a", "index")``,
            ``("neighbors", "b", "index")``, then ``"distance"`` and ``"tied_beyond"`` of both sides.
        out_keys: default ``("between", "neighborhood_overlap")``, () (and ``("between", "ceiling")``, ()).

    >>> import torch, tdgeom as tg
    >>> x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    >>> float(tg.NeighborhoodOverlap(k=10)(sample_a=x, sample_b=x.flip(-1)))
    1.0
    """

    measure = "neighborhood_overlap"
    averaged: ClassVar = [_mean_overlap]


class JaccardKNN(_TablePair):
    r"""Mean Jaccard index of the neighbourhoods at two sites: see ``jaccard_knn``.

    Settings and keys as ``NeighborhoodOverlap``; writes ``("between", "jaccard_knn")``, ().

    >>> import torch, tdgeom as tg
    >>> x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    >>> float(tg.JaccardKNN(k=10)(sample_a=x, sample_b=x.flip(-1)))
    1.0
    """

    measure = "jaccard_knn"
    averaged: ClassVar = [_mean_jaccard]
