"""What every intrinsic-dimension estimator shares: its six outputs, its two sources, its average over rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from tdgeom.core.keys import Key, Keys
from tdgeom.core.stage import Stage
from tdgeom.measures.neighbors.foreign_tables import own_distances, own_index
from tdgeom.measures.neighbors.nearest_neighbors import distinct_neighbors
from tdgeom.numerics.centring import holds, warn_undefined

__all__ = [
    "Copies",
    "DimensionEstimate",
    "DimensionStage",
    "LocalStage",
    "NeighborhoodStage",
    "auto_k",
    "copies_in",
    "masked_mean",
    "mean_estimate",
    "need_columns",
]


class DimensionEstimate(NamedTuple):
    """What an intrinsic-dimension estimator returns, in the order in which its stage writes it.

    ``estimate``; ``standard_error``; ``scale``, the distance at which the estimate looks; ``rows``, the distinct rows it used;
    ``duplicates``, the copies dropped first; ``near_duplicates``, those among them that are copies only up to rounding (-1
    where the source does not tell).
    """

    estimate: Tensor
    standard_error: Tensor
    scale: Tensor
    rows: Tensor
    duplicates: Tensor
    near_duplicates: Tensor


class Copies(NamedTuple):
    """How many rows were left out as copies, and how many of them as copies up to rounding: the last two outputs."""

    duplicates: Tensor
    near_duplicates: Tensor


def need_columns(distances: Tensor, k: int, name: str) -> Tensor:
    """The first k columns of a table of distances among distinct rows, in float64; refused where it is not one of ours."""
    if distances.shape[-1] < k:
        raise ValueError(
            f"{name} needs the distances to {k} neighbours, the table has {distances.shape[-1]} (shape "
            f"{tuple(distances.shape)}). Use NearestNeighbors(k={k}) or more."
        )
    return own_distances(distances[..., :k].double(), name, distinct=True)


def copies_in(distances: Tensor, counted: Tensor | None = None, near: Tensor | None = None) -> Copies:
    """(*B,) each: the copies as ``counted`` by whoever made the table (*B, N, k), and those up to rounding.

    None: the table's rows of NaN, and -1.
    """
    if counted is None:
        counted = (~torch.isfinite(distances[..., 0])).sum(-1)
    return Copies(counted, torch.full_like(counted, -1) if near is None else near)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last dimension where ``mask``; NaN where nothing is left."""
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1).double()


def mean_estimate(
    local: Tensor, scale: Tensor, copies: Copies, name: str, reason: str
) -> tuple[DimensionEstimate, Tensor]:
    """The average of per-row estimates (*B, N), NaN rows left out, and the rows themselves.

    The standard error is that of a mean of independent rows, sd/√n. Rows share neighbours, so the spread is
    up to a third larger (measured on spheres).
    """
    used = torch.isfinite(local)
    rows = used.sum(-1)
    mean = masked_mean(local, used)
    spread = masked_mean((local - mean.unsqueeze(-1)).square(), used)
    error = torch.where(rows > 1, (spread / (rows - 1).clamp(min=1).double()).sqrt(), torch.nan)
    warn_undefined(mean, name, f"{reason}.")
    return DimensionEstimate(mean, error, masked_mean(scale, used), rows, *copies), local


def auto_k(k: int | Literal["auto"], rows: Tensor | int) -> int:
    """A number of neighbours for rows (*B, N, D), or N of them; ``"auto"`` is √N, at least 2 and so that twice as many exist."""
    # a single dimension is refused by the search, in words
    n = rows if isinstance(rows, int) else rows.shape[-2:][0]
    return max(2, min(math.isqrt(n), (n - 1) // 2)) if k == "auto" else k


class DimensionStage(Stage):
    """A dimension estimator as a stage: from rows (it searches itself) or from a neighbour table.

    Args:
        source: ``"sample"`` (searches itself, in ``memory`` bytes) or ``"neighbors"`` (reads ``NearestNeighbors``'s
            ``distinct_distance``, ``duplicates`` and ``near_duplicates``).
        in_keys: default ``"sample"`` or the leaves of root ``"neighbors"``.
        out_keys: default root ``("dimension", <name>)``; under one common root, such as ``("dimension", "id")``, one
            estimator stands in for another.

    Writes ``estimate``, ``standard_error``, ``scale``, ``rows``, ``duplicates``, ``near_duplicates``, each () (or (\\*B,) for a
    batch of data sets), and what the estimator gives beyond.

    Raises:
        ValueError: fewer rows or columns of the table than the neighbours looked at, non-finite rows, another source.

    A subclass sets ``name``, defines ``neighbors_needed(n)`` (columns of the table for n rows) and
    ``measure(distances, duplicates, near_duplicates)``, which returns the outputs in order.
    """

    name: ClassVar[str]
    sources: ClassVar[Mapping[str, Mapping[Key, str]]] = {
        "sample": {"sample": "N D"},
        "neighbors": {
            ("neighbors", "distinct_distance"): "N k",
            ("neighbors", "duplicates"): "",
            ("neighbors", "near_duplicates"): "",
        },
    }
    optional: ClassVar[Collection[str]] = frozenset({"near_duplicates"})  # foreign tables may not tell

    def __init__(
        self,
        *,
        source: str = "sample",
        memory: int | None = None,
        further: Sequence[str] = (),
        in_keys: Keys = None,
        out_keys: Keys = None,
    ) -> None:
        if source not in self.sources:
            raise ValueError(
                f"{type(self).__name__}: source is one of {sorted(self.sources)}, got {source!r}."
            )
        writes = [("dimension", self.name, leaf) for leaf in (*DimensionEstimate._fields, *further)]
        super().__init__(in_keys=in_keys, out_keys=out_keys, reads=self.sources[source], writes=writes)
        self.source, self.memory = source, memory

    def neighbors_needed(self, n: int) -> int:
        """Neighbours a row that the estimator looks at, given n rows."""
        raise TypeError(f"{type(self).__name__} defines no neighbors_needed().")

    def measure(self, *table: Any, **options: Any) -> tuple[Tensor, ...]:
        """The outputs, from a table of distances among distinct rows (NaN on later copies)."""
        raise TypeError(f"{type(self).__name__} defines no measure().")

    def compute(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs in the order of ``DimensionEstimate``."""
        if self.source == "neighbors":
            return self.measure(*inputs)
        table = distinct_neighbors(inputs[0], self.neighbors_needed(inputs[0].shape[-2]), memory=self.memory)
        return self.measure(table.distance, table.duplicates, table.near_duplicates)


class LocalStage(DimensionStage):
    """A dimension estimator that gives every row its own estimate, from k distances, and averages them.

    Args:
        k: neighbours a row, at least ``least`` (and ``"auto"`` where ``auto``: max(2, min(int(√N), (N-1)//2))).
        pointwise: also write the rows' own estimates, (N,), as ``pointwise`` (NaN on later copies).
        source, memory, in_keys, out_keys: as in ``DimensionStage``, which says what is written and refused.

    A subclass sets ``local(distances, duplicates, near_duplicates, k=)``: the ``DimensionEstimate`` and the rows' own.
    """

    local: ClassVar[Callable[..., tuple[DimensionEstimate, Tensor]]]
    least: ClassVar[int] = 2
    auto: ClassVar[bool] = False

    def __init__(
        self, *, k: int | Literal["auto"] = 20, pointwise: bool = False, **source_and_keys: Any
    ) -> None:
        super().__init__(further=["pointwise"] if pointwise else [], **source_and_keys)
        if not (self.auto and k == "auto") and (
            isinstance(k, bool) or not isinstance(k, int) or k < self.least
        ):
            wanted = "'auto' or a number" if self.auto else "a number"
            raise ValueError(
                f"{type(self).__name__}: k is {wanted} of neighbours, at least {self.least}, got {k!r}."
            )
        self.k, self.pointwise = k, pointwise

    def neighbors_needed(self, n: int) -> int:
        """k of them."""
        return auto_k(self.k, n)

    def measure(self, *table: Any, **options: Any) -> tuple[Tensor, ...]:
        """The outputs and, on request, the rows' own estimates."""
        result, local = self.local(*table, k=auto_k(self.k, table[0].shape[-2]))
        return (*result, local) if self.pointwise else result


class NeighborhoodStage(LocalStage):
    """A local estimator that looks at the neighbours themselves.

    A subclass sets ``local(x, index, distances, duplicates, near_duplicates, k=)``.

    As ``LocalStage``, but ``source="neighbors"`` reads the sample beside ``NearestNeighbors``'s ``index``,
    ``distinct_distance``, ``duplicates`` and ``near_duplicates``; with copies in the sample it searches again, for their table
    cannot serve distinct rows.
    """

    sources: ClassVar = {
        "sample": {"sample": "N D"},
        "neighbors": {"sample": "N D", ("neighbors", "index"): "N k", **DimensionStage.sources["neighbors"]},
    }

    def compute(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs in the order of ``DimensionEstimate``."""
        x, *table = inputs
        if table:
            own_index(table[0], type(self).__qualname__)
        if not table or not holds(~table[2].any()):
            found = distinct_neighbors(x, self.neighbors_needed(x.shape[-2]), memory=self.memory)
            table = [found.index, found.distance, found.duplicates, found.near_duplicates]
        return self.measure(x, *table)
