"""``StreamingCovariance``: count, mean, covariance and two higher moments of every row, in one pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.core.streaming_stage import StreamingStage
from tdgeom.core.warnings import tell
from tdgeom.numerics.centring import real_rows
from tdgeom.numerics.forgetting import (
    add_weighted_rows,
    check_halflife,
    degrees_of_freedom,
    effective_sample_size,
    merge_later,
)
from tdgeom.numerics.moments import add_rows, merge_moments
from tdgeom.numerics.products import Precision, check_precision, gram, mirror, product_dtype, product_error

__all__ = ["StreamingCovariance", "covariance"]

_STATE = ("count", "mean", "scatter", "norm2_x", "norm4", "relative_error")


def covariance(rows: Tensor) -> Tensor:
    """Unbiased covariance Σ(x-x̄)(x-x̄)ᵀ/(N-1) in float64: (*B, N, D) of any real dtype, scale and offset -> (*B, D, D).

    >>> covariance(torch.tensor([[0.0], [2.0]]))
    tensor([[2.]], dtype=torch.float64)
    """
    rows = real_rows(rows, "covariance").double()
    return gram(rows - rows.mean(-2, keepdim=True)) / (rows.shape[-2] - 1)


class StreamingCovariance(StreamingStage):
    """Count, mean, unbiased covariance and the norm moments of all rows seen.

    ``covariance`` = Σ(x-x̄)(x-x̄)ᵀ/(n-1), ``norm4`` = Σ|x-x̄|⁴, ``norm2_x`` = Σ|x-x̄|²(x-x̄), all about the mean and in
    float64. Rows (N, D) in any real dtype, any scale and any offset, centred about the running mean and multiplied in float64,
    the symmetric half of it. Exact under any batch split, order and merge, to rounding. Memory 8·D² bytes.

    With ``halflife=`` older rows are forgotten: a row that a rows have followed weighs w = 2^(-a/halflife), ``mean`` = Σwx/Σw and
    ``covariance`` = Σw(x-x̄)(x-x̄)ᵀ/(Σw - Σw²/Σw), unbiased for independent rows (reliability weights, not frequencies). Exact
    under any batch split; the order of rows is their age, so that ``a.merge_(b)`` takes b's rows for those after a's, and a run
    shared out among ranks or jobs is refused. ``count`` is still the number of rows.

    Args:
        halflife: rows after which a row weighs half; None weighs all alike.
        precision: ``"float32"`` takes the products of ``covariance`` in float32 blocks (sums stay float64), for devices on which
            float64 is slow: eigenvalues below some 1e-6 of the largest are then rounding, and ``EigenSpectrum`` and what
            follows it know which. ``"auto"``: float64 wherever the device has it at speed, else float32.
        in_keys, out_keys: see ``Stage``.

    Reads ``"tokens"``; writes ``("moments", "count" | "mean" | "covariance" | "norm4" | "norm2_x" | "relative_error")`` of
    shapes (), (D,), (D, D), (), (D,), (). ``relative_error``: no entry C_ij of the covariance is further off than that times
    √(C_ii C_jj). With one row the covariance is undefined: NaN and a warning. With ``halflife=`` also
    ``("moments", "effective_sample_size")`` () = (Σw)²/Σw², last; ``norm4`` and ``norm2_x``, which measures for rows of equal
    weight read, are NaN then.

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
    writes = [
        ("moments", name) for name in ("count", "mean", "covariance", "norm4", "norm2_x", "relative_error")
    ]

    count: Tensor
    mean: Tensor
    scatter: Tensor
    norm2_x: Tensor
    norm4: Tensor
    relative_error: Tensor

    def __init__(
        self,
        *,
        halflife: float | None = None,
        precision: Precision = "auto",
        in_keys: Key | list[Key] | None = None,
        out_keys: Key | list[Key] | None = None,
    ) -> None:
        check_precision(precision, "StreamingCovariance")
        halflife = check_halflife(halflife, "StreamingCovariance")
        further = [] if halflife is None else [("moments", "effective_sample_size")]
        super().__init__(in_keys=in_keys, out_keys=out_keys, writes=[*self.writes, *further])
        self.halflife, self.precision = halflife, precision
        for name in _STATE:
            self.add_state(name, torch.int64 if name == "count" else torch.float64)

    def start(self, tokens: Tensor) -> dict[str, Tensor]:
        """Zero moments of the rows' width."""
        d = tokens.shape[-1]
        shapes = {"mean": (d,), "scatter": (d, d), "norm2_x": (d,)}
        return {
            name: torch.zeros(shapes.get(name, ()), dtype=held.dtype, device=tokens.device)
            for name, held in self.state().items()
        }

    def accumulate(self, tokens: Tensor) -> None:
        """Add a block of rows."""
        if tokens.shape[-1] != self.mean.shape[0]:
            raise ValueError(
                f"StreamingCovariance has seen rows of width {self.mean.shape[0]} and now gets {self.in_keys[0]!r} of "
                f"shape {tuple(tokens.shape)}. Use one stage a width, or reset()."
            )
        state, dtype = self.state(), product_dtype(self.precision, tokens.device)
        if self.halflife is None:
            add_rows(state, tokens, dtype)
            self.norm4 = state["norm4"]
        else:
            add_weighted_rows(state, tokens, self.halflife, dtype)
        self.relative_error = self.relative_error.clamp(min=product_error(dtype))

    def combine(self, other: StreamingCovariance) -> None:
        """Add another's moments; with ``halflife=`` those of rows that came later."""
        state, theirs = (
            self.state(),
            {name: value.to(self.mean.device) for name, value in other.state().items()},
        )
        if self.halflife is None:
            merge_moments(state, theirs)
            self.norm4 = state["norm4"]
        else:
            merge_later(state, theirs, self.halflife)
        # The sum's entries are bounded by the sums' Cauchy-Schwarz: the larger of both errors holds for it.
        self.relative_error = torch.maximum(self.relative_error, other.relative_error.to(self.mean.device))

    def result(self) -> Mapping[str, Tensor]:
        """The moments of all rows so far."""
        if not torch.compiler.is_compiling() and int(self.count) == 1:
            tell("StreamingCovariance: the covariance of one row is undefined: NaN.")
        found = {
            "count": self.count.clone(),
            "mean": self.mean.clone(),
            "covariance": mirror(self.scatter / degrees_of_freedom(self.count, self.halflife)),
            "norm4": self.norm4.clone(),
            "norm2_x": self.norm2_x.clone(),
            "relative_error": self.relative_error.clone(),
        }
        if self.halflife is None:
            return found
        unknown = {name: torch.full_like(found[name], torch.nan) for name in ("norm4", "norm2_x")}
        return {**found, **unknown, "effective_sample_size": effective_sample_size(self.count, self.halflife)}
