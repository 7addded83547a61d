"""Symmetric matrices in a little over half their room: strips of rows, each from its diagonal block on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["add_outer", "edges", "packed", "packed_length", "square_of", "strips", "times"]

_NARROWEST, _MOST = 64, 8  # 8 strips hold 9/16 of the square; more would make the products thin


def edges(width: int) -> list[int]:
    """Where the strips of a symmetric matrix begin and end: rows from one edge to the next, of the columns from the first on.

    >>> edges(256), edges(100)
    ([0, 64, 128, 192, 256], [0, 100])
    """
    count = max(1, min(_MOST, width // _NARROWEST))
    return [round(width * i / count) for i in range(count + 1)]


def packed_length(width: int) -> int:
    """Numbers that the strips of a (width, width) matrix hold.

    >>> packed_length(4), packed_length(128), packed_length(768) / 768**2
    (16, 12288, 0.5625)
    """
    return sum((b - a) * (width - a) for a, b in pairwise(edges(width)))


def strips(flat: Tensor, width: int) -> Iterator[tuple[int, int, Tensor]]:
    """(a, b, rows a to b of the columns from a on), a view of ``flat`` (*B, packed_length) each."""
    start = 0
    for a, b in pairwise(edges(width)):
        size = (b - a) * (width - a)
        yield a, b, flat[..., start : start + size].unflatten(-1, (b - a, width - a))
        start += size


def packed(matrix: Tensor) -> Tensor:
    """The strips of a symmetric (*B, D, D).

    >>> matrix = torch.arange(9.0).reshape(3, 3)
    >>> torch.equal(square_of(packed(matrix + matrix.T), 3), matrix + matrix.T)
    True
    """
    return torch.cat([matrix[..., a:b, a:].flatten(-2) for a, b in pairwise(edges(matrix.shape[-1]))], -1)


def square_of(flat: Tensor, width: int) -> Tensor:
    """The whole matrix (*B, D, D) again."""
    whole = flat.new_empty((*flat.shape[:-1], width, width))
    for a, b, strip in strips(flat, width):
        whole[..., a:b, a:] = strip
        whole[..., b:, a:b] = strip[..., b - a :].mT
    return whole


def add_outer(flat: Tensor, rows: Tensor) -> None:
    """``flat`` (packed_length,) += the strips of rowsᵀrows, rows (n, D) of its dtype, in place."""
    for a, b, strip in strips(flat, rows.shape[-1]):
        strip.addmm_(rows[:, a:b].mT, rows[:, a:])


def times(flat: Tensor, vector: Tensor) -> Tensor:
    """The matrix times a vector (D,).

    >>> times(packed(torch.tensor([[2.0, 1.0], [1.0, 0.0]])), torch.tensor([1.0, 3.0]))
    tensor([5., 1.])
    """
    found = torch.zeros_like(vector)
    for a, b, strip in strips(flat, vector.shape[-1]):
        found[a:b] += strip @ vector[a:]
        found[b:] += strip[:, b - a :].mT @ vector[a:b]
    return found
