"""A measure of every row's neighbourhood, a bounded number of neighbourhoods at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tdgeom.measures.neighbors.distance_blocks import budget

__all__ = ["over_neighbourhoods"]


def over_neighbourhoods(
    x: Tensor, distances: Tensor, index: Tensor, k: int, memory: int | None, measure: Callable[..., Tensor]
) -> Tensor:
    """``measure(rows of the k neighbours (n, k, D) minus the row, distances (n, k))`` for every row with k neighbours.

    The result is laid out over all rows (*B, N), NaN elsewhere; ``memory`` bytes of neighbourhoods at a time.
    """
    n, width = x.shape[-2:]
    flat = x.reshape(-1, width)
    offset = (torch.arange(len(flat) // n, device=x.device) * n)[:, None, None]
    index = (index[..., :k].reshape(-1, n, k) + offset).reshape(-1, k)
    near = distances[..., :k].reshape(-1, k).double()
    which = torch.isfinite(near[:, -1]).nonzero().squeeze(-1)
    small = min(k, width)
    step = max(1, budget(memory) // (8 * (3 * k * width + 4 * small * small)))
    found = [
        measure(flat[index[rows]].double() - flat[rows].double().unsqueeze(1), near[rows])
        for rows in which.split(step)
    ]
    local = near.new_full((len(flat),), torch.nan)
    if found:
        local[which] = torch.cat(found)
    return local.view(distances.shape[:-1])
