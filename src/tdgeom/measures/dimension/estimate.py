"""What every intrinsic-dimension estimator shares: its five outputs, its two sources, its warning."""

from __future__ import annotations

import math
import warnings
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.core.stage import Stage
from tdgeom.core.warnings import UndefinedMeasureWarning
from tdgeom.measures.neighbors.nearest_neighbors import distinct_neighbors

__all__ = [
    "DimensionEstimate",
    "DimensionStage",
    "copies_of",
    "masked_mean",
    "mean_estimate",
    "need_columns",
    "warn_undefined",
]


class DimensionEstimate(NamedTuple):
    """What an intrinsic-dimension estimator returns, in the order in which its stage writes it.

    ``estimate``; ``standard_error``; ``scale``, the distance at which the estimate looks; ``rows``, the
    distinct rows it used; ``duplicates``, the exact copies dropped first (-1 where the source does not tell).
    """

    estimate: Tensor
    standard_error: Tensor
    scale: Tensor
    rows: Tensor
    duplicates: Tensor


def warn_undefined(estimate: Tensor, name: str, reason: str) -> None:
    """One warning if any estimate is NaN, with the reason."""
    if not torch.compiler.is_compiling() and bool(torch.isnan(estimate.detach()).any()):
        warnings.warn(f"{name} is NaN: {reason}.", UndefinedMeasureWarning, stacklevel=3)


def need_columns(distances: Tensor, k: int, name: str) -> Tensor:
    """The first k columns of a neighbour table, in float64."""
    if distances.shape[-1] < k:
        raise ValueError(
            f"{name} needs the distances to {k} neighbours, the table has {distances.shape[-1]} (shape "
            f"{tuple(distances.shape)}). Use NearestNeighbors(k={k}) or more."
        )
    return distances[..., :k].double()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last dimension where ``mask``; NaN where nothing is left."""
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1).double()


def mean_estimate(
    local: Tensor, scale: Tensor, duplicates: Tensor, name: str, reason: str
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
    warn_undefined(mean, name, reason)
    return DimensionEstimate(mean, error, masked_mean(scale, used), rows, duplicates), local


class DimensionStage(Stage):
    """A dimension estimator as a stage: from rows (it searches itself) or from a neighbour table.

    A subclass sets ``name``, defines ``neighbors_needed(n)`` (columns of the table for n rows) and
    ``measure(distances, duplicates)``, which returns the five outputs of ``DimensionEstimate`` and any
    further ones named in ``extra``.
    """

    name: ClassVar[str]

    def __init__(
        self,
        *,
        source: str,
        memory: int | None = None,
        extra: tuple[str, ...] = (),
        in_keys: Key | list[Key] | None,
        out_keys: Key | list[Key] | None,
    ) -> None:
        reads = self.sources().get(source)
        if reads is None:
            raise ValueError(
                f"{type(self).__name__}: source is one of {sorted(self.sources())}, got {source!r}."
            )
        leaves = (*DimensionEstimate._fields, *extra)
        writes = [("dimension", self.name, leaf) for leaf in leaves]
        super().__init__(in_keys=in_keys, out_keys=out_keys, reads=reads, writes=writes)
        self.source, self.memory = source, memory

    @classmethod
    def sources(cls) -> dict[str, dict[Key, str]]:
        """What is read, by source."""
        return {
            "sample": {"sample": "N D"},
            "neighbors": {("neighbors", "distinct_distance"): "N k", ("neighbors", "duplicates"): ""},
        }

    def neighbors_needed(self, n: int) -> int:
        """Neighbours a row that the estimator looks at, given n rows."""
        raise TypeError(f"{type(self).__name__} defines no neighbors_needed().")

    def measure(self, distances: Tensor, duplicates: Tensor) -> tuple[Tensor, ...]:
        """The outputs, from a table of distances among distinct rows (NaN on later copies)."""
        raise TypeError(f"{type(self).__name__} defines no measure().")

    def compute(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs in the order of ``DimensionEstimate``."""
        if self.source == "neighbors":
            return self.measure(*inputs)
        table = distinct_neighbors(inputs[0], self.neighbors_needed(inputs[0].shape[-2]), memory=self.memory)
        return self.measure(table.distance, table.duplicates)


def auto_k(k: int | str, n: int) -> int:
    """A number of neighbours; ``"auto"`` is √n, at least 2 and so that twice as many exist."""
    return max(2, min(math.isqrt(n), (n - 1) // 2)) if k == "auto" else int(k)


class LocalStage(DimensionStage):
    """A local estimator on k distances a row: ``local(distances, duplicates)`` gives the estimate and the rows' own."""

    def __init__(
        self,
        *,
        k: int | str,
        least: int,
        pointwise: bool,
        source: str,
        memory: int | None,
        in_keys: Key | list[Key] | None,
        out_keys: Key | list[Key] | None,
        auto: bool = False,
    ) -> None:
        extra = ("pointwise",) if pointwise else ()
        super().__init__(source=source, memory=memory, extra=extra, in_keys=in_keys, out_keys=out_keys)
        if not (auto and k == "auto") and (isinstance(k, bool) or not isinstance(k, int) or k < least):
            wanted = "'auto' or a number" if auto else "a number"
            raise ValueError(
                f"{type(self).__name__}: k is {wanted} of neighbours, at least {least}, got {k!r}."
            )
        self.k, self.pointwise = k, pointwise

    def neighbors_needed(self, n: int) -> int:
        """k of them."""
        return auto_k(self.k, n)

    def local(self, distances: Tensor, duplicates: Tensor) -> tuple[DimensionEstimate, Tensor]:
        """The estimate and the rows' own."""
        raise TypeError(f"{type(self).__name__} defines no local().")

    def measure(self, distances: Tensor, duplicates: Tensor) -> tuple[Tensor, ...]:
        """The five outputs and, on request, the rows' own estimates."""
        result, local = self.local(distances, duplicates)
        return (*result, local) if self.pointwise else tuple(result)


class NeighborhoodStage(LocalStage):
    """A local estimator that looks at the neighbours themselves: ``local(x, distances, index, duplicates)``."""

    @classmethod
    def sources(cls) -> dict[str, dict[Key, str]]:
        """What is read, by source."""
        return {
            "sample": {"sample": "N D"},
            "neighbors": {
                "sample": "N D",
                ("neighbors", "index"): "N k",
                ("neighbors", "distinct_distance"): "N k",
                ("neighbors", "duplicates"): "",
            },
        }

    def compute(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs in the order of ``DimensionEstimate``."""
        x, *table = inputs
        if table and not bool(table[2].any()):
            index, distances, duplicates = table
        else:
            distances, index, _, duplicates = distinct_neighbors(
                x, self.neighbors_needed(x.shape[-2]), memory=self.memory
            )
        result, local = self.local(x, distances, index, duplicates)
        return (*result, local) if self.pointwise else tuple(result)


def copies_of(near: Tensor) -> Tensor:
    """(*B,): rows of a table (*B, N, k) that are left out, later copies of others; their distances are NaN."""
    return near.shape[-2] - torch.isfinite(near[..., 0]).sum(-1)
