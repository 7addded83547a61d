"""yᵀy of real rows at two thirds of the products: the lower half is a copy of the upper."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gram"]

_NARROWEST = 384  # below this width one product is faster than four smaller ones


def gram(y: Tensor) -> Tensor:
    """yᵀy: (*B, N, D) -> (*B, D, D).

    On a CPU and without a graph, wide matrices are multiplied in four strips of columns, each against the columns from it
    on (10 of 16 blocks), and mirrored; BLAS' own symmetric product is not within torch's reach.
    """
    d = y.shape[-1]
    plain = y.ndim != 2 or d < _NARROWEST or y.device.type != "cpu" or y.requires_grad
    if plain or torch.compiler.is_compiling():
        return y.mT @ y
    out = y.new_empty(d, d)
    edges = [round(d * i / 4) for i in range(5)]
    for a, b in zip(edges, edges[1:]):  # noqa: RUF007
        out[a:b, a:] = y[:, a:b].mT @ y[:, a:]
        out[b:, a:b] = out[a:b, b:].mT
    return out
