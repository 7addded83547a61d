"""How much of a spectrum is real: what lies above rounding, and how many leading parts hold a share."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["above_rounding", "directions_that_vary", "leading_parts", "numerical_rank", "rounding_floor"]

_INPUT = 2.0**-42


def rounding_floor(eigenvalues: Tensor) -> Tensor:
    """What rounding alone can make of an eigenvalue of a float64 matrix: λ₁·max(D·2⁻⁵², 2⁻⁴²), (*B, D) -> (*B,).

    The first is what an eigensolver leaves. The second is the square of eight roundings of a float32 number: rows that are
    5-dimensional, or a LayerNorm's, and are stored in float32 vary that much in the directions in which they do not vary. It
    is the same for rows of any dtype, for a row is the same number in all that hold it.

    >>> float(rounding_floor(torch.tensor([1.0, 0.0]))) == 2.0**-42
    True
    """
    size = eigenvalues.shape[-1] * torch.finfo(torch.float64).eps
    return eigenvalues.detach().double().abs().nan_to_num(nan=0.0).amax(-1) * max(size, _INPUT)


def above_rounding(eigenvalues: Tensor, error: Tensor | None = None) -> Tensor:
    """(*B, D): which eigenvalues are more than rounding, that of the products too where ``error`` (*B, D) gives it."""
    above = eigenvalues.double() > rounding_floor(eigenvalues).unsqueeze(-1)
    return above if error is None else above & (eigenvalues.double() > error)


def numerical_rank(
    eigenvalues: Tensor, rows: Tensor | int | None = None, error: Tensor | None = None
) -> Tensor:
    """How many eigenvalues are more than rounding: (*B, D) in any order -> (*B,) int64, at most ``rows`` - 1 (centred).

    0 without variance, -1 where an eigenvalue is NaN. Logarithms, roots, inverses and directions stop there.

    >>> int(numerical_rank(torch.tensor([1.0, 1e-3, 1e-17])))
    2
    """
    rank = above_rounding(eigenvalues, error).sum(-1)
    if rows is not None:
        most = torch.as_tensor(rows, device=rank.device) - 1
        rank = torch.minimum(rank, most.clamp(min=0).to(rank.dtype))
    return torch.where(torch.isnan(eigenvalues).any(-1), -1, rank)


def directions_that_vary(values: Tensor, vectors: Tensor, covariance: Tensor) -> Tensor:
    """(*B, k): which eigenpairs (*B, k), (*B, D, k) of a covariance (*B, D, D) may be inverted.

    As ``above_rounding``, but the rounding of stored values is taken along each direction, 2⁻⁴²·Σ_j v_j² C_jj: features of
    other units than the largest keep their directions, as far as the eigensolver tells them from it.

    >>> covariance = torch.diag(torch.tensor([1.0, 1e-13, 0.0]).double())
    >>> directions_that_vary(*torch.linalg.eigh(covariance), covariance).tolist()
    [False, True, True]
    """
    variance = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0)
    stored = _INPUT * (variance.unsqueeze(-1) * vectors.square()).sum(-2)
    solved = values.amax(-1, keepdim=True) * covariance.shape[-1] * torch.finfo(torch.float64).eps
    return (values > stored) & (values > solved.clamp(min=0))


def leading_parts(shares: Tensor, level: float) -> Tensor:
    """The smallest k whose first k shares add up to ``level``: (*B, D), descending, of sum 1 -> (*B,) int64.

    To 1e-9: the rounded sum of nine tenths is 0.9.

    >>> int(leading_parts(torch.full((10,), 0.1), 0.9))
    9
    """
    short = shares.double().cumsum(-1) < level - 1e-9
    return short.sum(-1).clamp(max=shares.shape[-1] - 1) + 1
