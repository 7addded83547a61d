"""Distances of listed pairs of rows, from their differences: the arithmetic that no cancellation spoils."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["budget", "pair_distances", "product_error"]

_MEMORY = 256 * 2**20  # bytes of working blocks when the caller names none
UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def budget(memory: int | None) -> int:
    """Bytes that working blocks may take."""
    return _MEMORY if memory is None else memory


def product_error(width: int, dtype: torch.dtype) -> float:
    """Relative rounding error of a product of ``width`` terms, as a share of |x||y|.

    The proven bound is width·u; the errors of the terms being independent, 4·sqrt(width)·u holds with overwhelming
    probability (Higham & Mary 2019). 16 u more for norms, sums and the rounding of the centred rows themselves.
    """
    return UNIT[dtype] * (min(width, 4.0 * width**0.5) + 16.0)


def pair_distances(x: Tensor, i: Tensor, j: Tensor, *, p: float = 2.0, memory: int | None = None) -> Tensor:
    """|x_i - x_j| from float64 differences, for index lists into ``x`` (rows, D); symmetric to the bit."""
    out = torch.empty(len(i), dtype=torch.float64, device=x.device)
    room = 2**22 if x.device.type == "cpu" else budget(memory)  # a CPU works in its cache
    step = max(1, room // (16 * x.shape[-1]))
    for s in range(0, len(i), step):
        difference = x[i[s : s + step]].double().sub_(x[j[s : s + step]])
        torch.linalg.vector_norm(difference, ord=p, dim=-1, out=out[s : s + step])
    return out
