"""How much of one site's variance a linear map from the other explains."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tdgeom.measures.similarity.orthonormal_sides import (
    Factor,
    LinearPairStage,
    factor_rows,
    overlap,
    tell_few,
)
from tdgeom.numerics.centring import check_matched, warn_undefined

__all__ = ["LinearR2", "linear_r2_ab", "linear_r2_ba"]

_REASON = "one side has no variance over the rows."


def linear_r2_ab(x: Tensor, y: Tensor, ridge: float = 0.0) -> Tensor:
    """R² of y predicted linearly from x, on the same rows.

    Formula:
        linear_r2_ab = 1 - ||Y - XB||²_F/||Y||²_F; rows centred
        B = (XᵀX + αI)⁻¹XᵀY; ``α = 0`` is least squares

    Args:
        x: (..., N, D) rows that predict. y: (..., N, E) the same rows, predicted.
        ridge: penalty in units of the mean eigenvalue of XᵀX, so that it has no scale:
            ``α = ridge·tr(XᵀX)/D``. 0 is least squares, of least norm where features depend on each other.

    Returns:
        (...) float64 in [0, 1]: over all features of y together, each by its variance.

    Invariances: of y orthogonal maps, isotropic scale and offsets; of x every invertible linear map (with a ridge:
    orthogonal maps and isotropic scale). Bias: in-sample, so upwards by about ``D/(N-1)`` for independent data; 1 at
    N <= D + 1. NaN with one warning without variance.

    Kornblith et al. 2019, arXiv 1905.00414 (R²_LR).

        >>> import torch
        >>> x = torch.randn(50, 3, dtype=torch.float64)
        >>> round(float(linear_r2_ab(x, x[:, :1])), 9), bool(linear_r2_ab(x[:, :1], x) < 0.9)
        (1.0, True)
    """
    check_matched(x, y, "linear_r2_ab")
    plain = _check(ridge) == 0
    a, b = (factor_rows(side, "linear_r2_ab", standardise=plain) for side in (x, y))
    if plain:
        tell_few("linear_r2_ab", "linear_r2_ab", a, b)
    return warn_undefined(_r2(overlap(a, b), a, b, ridge), "linear_r2_ab", _REASON)


def linear_r2_ba(x: Tensor, y: Tensor, ridge: float = 0.0) -> Tensor:
    """``linear_r2_ab`` with the sides exchanged: R² of x predicted from y.

    >>> import torch
    >>> x, y = torch.randn(50, 3), torch.randn(50, 2)
    >>> bool((linear_r2_ba(x, y) - linear_r2_ab(y, x)).abs() < 1e-12)
    True
    """
    check_matched(x, y, "linear_r2_ba")
    plain = _check(ridge) == 0
    a, b = (factor_rows(side, "linear_r2_ba", standardise=plain) for side in (x, y))
    if plain:
        tell_few("linear_r2_ba", "linear_r2_ba", a, b)
    return warn_undefined(_r2(overlap(b, a), b, a, ridge), "linear_r2_ba", _REASON)


def _check(ridge: float) -> float:
    if not ridge >= 0:
        raise ValueError(f"linear R²: ridge is a penalty of 0 or more, got {ridge}.")
    return ridge


def _r2(m: Tensor, a: Factor, b: Factor, ridge: float) -> Tensor:
    squares = (m @ b.coefficients).square().sum(-1)  # what each direction of a holds of b
    total = b.coefficients.square().sum((-2, -1))
    if ridge:
        s2 = a.values.square()
        kept = s2 / (s2 + ridge * s2.sum(-1, keepdim=True) / a.coefficients.shape[-1])
        squares = squares * (2 - kept) * kept
    # a rank of NaN marks a side without variance
    return squares.sum(-1) / total + 0 * (a.rank + b.rank)


class LinearR2(LinearPairStage):
    """``linear_r2_ab`` (b predicted from a) and ``linear_r2_ba`` between two sites.

    Args:
        ridge: penalty in units of the mean eigenvalue of the predictor.
        source: ``"sample"`` reads matched rows; ``"moments"`` count, mean, covariance of both sides and the cross
            covariance, over all rows of the run.
        in_keys, out_keys: see ``Stage``.

        >>> import torch
        >>> x = torch.randn(50, 3)
        >>> [round(float(value), 6) for value in LinearR2()(sample_a=x, sample_b=x.flip(-1))]
        [1.0, 1.0]
    """

    measures = ("linear_r2_ab", "linear_r2_ba")

    def __init__(self, *, ridge: float = 0.0, **others: Any) -> None:
        super().__init__(**others)
        self.ridge = _check(ridge)
        self.standardise = ridge == 0

    def compare(self, a: Factor, b: Factor, *rest: Tensor) -> dict[str, Tensor]:
        """Two products."""
        if self.ridge == 0:
            tell_few("LinearR2", "linear_r2_ab and linear_r2_ba", a, b, *rest)
            self.judge("linear_r2_ab and linear_r2_ba", a, b, *rest)
        m = overlap(a, b, *rest)
        forth, back = _r2(m, a, b, self.ridge), _r2(m.mT, b, a, self.ridge)
        warn_undefined(forth + back, "linear_r2_ab and linear_r2_ba", _REASON)
        return {"linear_r2_ab": forth, "linear_r2_ba": back}
