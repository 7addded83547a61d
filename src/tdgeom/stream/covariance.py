"""``StreamingCovariance``: count, mean, covariance and two higher moments of every row, in one pass."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.core.streaming_stage import StreamingStage
from tdgeom.core.warnings import UndefinedMeasureWarning
from tdgeom.numerics.centring import upcast
from tdgeom.numerics.moments import block_moments, merge_moments
from tdgeom.numerics.products import gram

__all__ = ["StreamingCovariance", "covariance"]

_STATE = ("count", "mean", "scatter", "norm2_x", "norm4")


def covariance(rows: Tensor) -> Tensor:
    """Unbiased covariance Σ(x-x̄)(x-x̄)ᵀ/(N-1): (*B, N, D) -> (*B, D, D), float64 sums for float64 and integer rows, else float32.

    >>> covariance(torch.tensor([[0.0], [2.0]]))
    tensor([[2.]])
    """
    rows = upcast(rows)
    return gram(rows - rows.mean(-2, keepdim=True)) / (rows.shape[-2] - 1)


class StreamingCovariance(StreamingStage):
    """Count, mean, unbiased covariance and the norm moments of all rows seen.

    ``covariance`` = Σ(x-x̄)(x-x̄)ᵀ/(n-1), ``norm4`` = Σ|x-x̄|⁴, ``norm2_x`` = Σ|x-x̄|²(x-x̄), all about the mean and in
    float64. Rows (N, D) in any float dtype; float32 and narrower rows are multiplied in float32 blocks about the block's
    own mean and added in float64. Exact under any batch split, order and merge, to rounding. Memory 8·D² bytes.

    Reads ``"tokens"``; writes ``("moments", "count" | "mean" | "covariance" | "norm4" | "norm2_x")`` of shapes (), (D,),
    (D, D), (), (D,). With one row the covariance is undefined: NaN and a warning.

    Chan, Golub and LeVeque (1979), Updating formulae and a pairwise algorithm for computing sample variances.

        >>> import torch, tdgeom as tg
        >>> stage = tg.StreamingCovariance(out_keys="m")
        >>> for rows in torch.arange(12.0).reshape(3, 2, 2):
        ...     count, mean, covariance, *_ = stage(tokens=rows)
        >>> covariance
        tensor([[14., 14.],
                [14., 14.]], dtype=torch.float64)
    """

    reads = {"tokens": "N D"}
    writes = [("moments", name) for name in ("count", "mean", "covariance", "norm4", "norm2_x")]

    count: Tensor
    mean: Tensor
    scatter: Tensor
    norm2_x: Tensor
    norm4: Tensor

    def __init__(
        self, *, in_keys: Key | list[Key] | None = None, out_keys: Key | list[Key] | None = None
    ) -> None:
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        for name in _STATE:
            self.add_state(name, torch.int64 if name == "count" else torch.float64)

    def start(self, tokens: Tensor) -> dict[str, Tensor]:
        """Zero moments of the rows' width."""
        d = tokens.shape[-1]
        shapes = {"count": (), "mean": (d,), "scatter": (d, d), "norm2_x": (d,), "norm4": ()}
        return {
            name: torch.zeros(shape, dtype=self.state()[name].dtype, device=tokens.device)
            for name, shape in shapes.items()
        }

    def accumulate(self, tokens: Tensor) -> None:
        """Add a block of rows."""
        if tokens.shape[-1] != self.mean.shape[0]:
            raise ValueError(
                f"StreamingCovariance has seen rows of width {self.mean.shape[0]} and now gets {self.in_keys[0]!r} of "
                f"shape {tuple(tokens.shape)}. Use one stage a width, or reset()."
            )
        self._merge(block_moments(tokens))

    def combine(self, other: StreamingCovariance) -> None:
        """Add another's moments."""
        self._merge({name: value.to(self.mean.device) for name, value in other.state().items()})

    def _merge(self, block: dict[str, Tensor]) -> None:
        state = self.state()
        merge_moments(state, block)
        self.norm4 = state["norm4"]

    def result(self) -> Mapping[str, Tensor]:
        """The moments of all rows so far."""
        if not torch.compiler.is_compiling() and int(self.count) == 1:
            warnings.warn(
                "StreamingCovariance: the covariance of one row is undefined: NaN",
                UndefinedMeasureWarning,
                stacklevel=2,
            )
        return {
            "count": self.count.clone(),
            "mean": self.mean.clone(),
            "covariance": self.scatter / (self.count.double() - 1),
            "norm4": self.norm4.clone(),
            "norm2_x": self.norm2_x.clone(),
        }
