"""``StreamingMean``: mean and variance of any row tensor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.core.streaming_stage import StreamingStage
from tdgeom.numerics.forgetting import (
    age_weights,
    check_halflife,
    degrees_of_freedom,
    effective_sample_size,
    weight_sum,
)

__all__ = ["StreamingMean"]


class StreamingMean(StreamingStage):
    """Mean and variance over rows of a tensor of any shape (N, ...), entry by entry.

    ``mean`` = Σx/n, ``variance`` = Σ(x-x̄)²/(n-1) (unbiased; NaN for one row), ``count`` = n; float64, exact under any
    batch split, order and merge. Integers and booleans count as numbers, so it turns any per-row value (a loss, a
    correctness flag, an entropy) into a result that ``run`` keeps.

    Args:
        halflife: rows after which a row weighs half, by age in the stream's order, as ``StreamingCovariance`` takes it:
            ``mean`` = Σwx/Σw, ``variance`` = Σw(x-x̄)²/(Σw - Σw²/Σw), ``count`` still n. None weighs all alike.
        in_keys, out_keys: see ``Stage``.

    Reads ``"tokens"``; writes ``("mean", "mean" | "variance" | "count")``, and with ``halflife=`` ``("mean",
    "effective_sample_size")`` = (Σw)²/Σw².

        >>> import torch, tdgeom as tg
        >>> mean, variance, count = tg.StreamingMean()(tokens=torch.tensor([1.0, 2.0, 3.0]))
        >>> float(mean), float(variance), int(count)
        (2.0, 1.0, 3)
    """

    reads = ["tokens"]
    writes = [("mean", "mean"), ("mean", "variance"), ("mean", "count")]

    count: Tensor
    centre: Tensor
    scatter: Tensor

    def __init__(
        self,
        *,
        halflife: float | None = None,
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        halflife = check_halflife(halflife, "StreamingMean")
        further = [] if halflife is None else [("mean", "effective_sample_size")]
        super().__init__(in_keys=in_keys, out_keys=out_keys, writes=[*self.writes, *further])
        self.halflife = halflife
        self.add_state("count", torch.int64)
        self.add_state("centre", torch.float64)
        self.add_state("scatter", torch.float64)

    def start(self, rows: Tensor) -> dict[str, Tensor]:
        """No rows yet."""
        zeros = torch.zeros(rows.shape[1:], dtype=torch.float64, device=rows.device)
        return {"count": torch.zeros((), dtype=torch.int64), "centre": zeros, "scatter": zeros.clone()}

    def accumulate(self, rows: Tensor) -> None:
        """Add rows."""
        if rows.shape[1:] != self.centre.shape:
            raise ValueError(
                f"StreamingMean has seen rows of shape {tuple(self.centre.shape)} and now gets {self.in_keys[0]!r} of shape "
                f"{tuple(rows.shape)}. Use one stage a width, or reset()."
            )
        rows = rows.double()
        if self.halflife is not None:
            self._add_weighted(rows, self.halflife)
            return
        centre = rows.mean(0)
        self._merge(torch.full_like(self.count, rows.shape[0]), centre, (rows - centre).square().sum(0))

    def combine(self, other: StreamingMean) -> None:
        """Add another's rows."""
        self._merge(*(value.to(self.centre.device) for value in (other.count, other.centre, other.scatter)))

    def _add_weighted(self, rows: Tensor, halflife: float) -> None:
        weights = age_weights(rows.shape[0], halflife, rows.device).view(-1, *[1] * (rows.ndim - 1))
        centre = rows[-1]
        for _ in range(2):  # about the last row, and once more about the mean: an offset costs no digits
            centre = centre + (weights * (rows - centre)).sum(0) / weights.sum()
        scatter = (weights * (rows - centre).square()).sum(0)
        self._merge(torch.full_like(self.count, rows.shape[0]), centre, scatter)

    def _merge(self, count: Tensor, centre: Tensor, scatter: Tensor) -> None:
        n_a, n_b = self.count.double(), count.double()
        if self.halflife is not None:  # the others' rows came later
            faded = torch.exp2(-n_b / self.halflife)
            n_a, n_b = (weight_sum(n, self.halflife) for n in (n_a, n_b))
            n_a, self.scatter = n_a * faded, self.scatter * faded
        delta = centre - self.centre
        # New tensors: compiled code drops in-place updates of 0-dim float64 buffers, which rows (N,) make.
        self.scatter = self.scatter + scatter + delta.square() * (n_a * n_b / (n_a + n_b))
        self.centre = self.centre + delta * (n_b / (n_a + n_b))
        self.count.add_(count)

    def result(self) -> Mapping[str, Tensor]:
        """Mean, unbiased variance and count."""
        found = {
            "mean": self.centre.clone(),
            "variance": self.scatter / degrees_of_freedom(self.count, self.halflife),
            "count": self.count.clone(),
        }
        if self.halflife is None:
            return found
        return {**found, "effective_sample_size": effective_sample_size(self.count, self.halflife)}
