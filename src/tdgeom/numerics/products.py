"""Products in the precision of what is multiplied, and yᵀy at two thirds of them: the lower half is a copy of the upper."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

from tdgeom.core.stage import device_of
from tdgeom.core.surroundings import steady

__all__ = ["gram", "in_own_precision"]

_Result = TypeVar("_Result")

_NARROWEST = 384  # below this width one product is faster than four smaller ones


def in_own_precision(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """A function of tensors with the same products whatever autocast or precision is set around its call."""

    @wraps(function)
    def steadily(*args: object, **options: object) -> _Result:
        with steady(device_of([*args, *options.values()])):
            return function(*args, **options)

    return steadily


@in_own_precision
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
