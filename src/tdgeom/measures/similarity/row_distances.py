"""Distances between all rows, in float64 and as compact as their use allows."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["condensed", "distances", "double_centre", "median_distance", "squared_distances"]


def squared_distances(rows: Tensor) -> Tensor:
    """(..., N, N) squared Euclidean distances of centred float64 rows, diagonal exactly 0."""
    product = rows @ rows.mT
    norms = torch.diagonal(product, dim1=-2, dim2=-1)
    squares = (norms.unsqueeze(-1) + norms.unsqueeze(-2) - 2 * product).clamp(min=0)
    return squares - torch.diag_embed(torch.diagonal(squares, dim1=-2, dim2=-1))


def condensed(matrix: Tensor) -> Tensor:
    """(..., N(N-1)/2) the upper triangle of a symmetric (..., N, N), row by row."""
    n = matrix.shape[-1]
    i, j = torch.triu_indices(n, n, 1, device=matrix.device)
    return matrix.flatten(-2)[..., i * n + j]


def double_centre(matrix: Tensor) -> Tensor:
    """HMH: rows and columns of a symmetric matrix with mean 0."""
    rows = matrix.mean(-1, keepdim=True)
    return matrix - rows - rows.mT + rows.mean(-2, keepdim=True)


def distances(squares: Tensor) -> Tensor:
    """Roots of squared distances, with gradient 0 rather than NaN where they are 0."""
    apart = squares > 0
    return torch.where(apart, torch.where(apart, squares, 1).sqrt(), squares)


def median_distance(squares: Tensor) -> Tensor:
    """The median along the last dimension of the roots; the mean of the middle two of an even number."""
    m = squares.shape[-1]
    upper = distances(squares.kthvalue(m // 2 + 1, dim=-1).values)
    return upper if m % 2 else (upper + distances(squares.kthvalue(m // 2, dim=-1).values)) / 2
