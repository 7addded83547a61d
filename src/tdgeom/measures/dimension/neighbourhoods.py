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
    """``measure(rows of the k neighbours (n, k, D) minus the row, distances (n, k))`` of every row with k neighbours.

    The result is laid out over all rows (*B, N), NaN elsewhere; ``memory`` bytes of neighbourhoods at a time.
    """
    n, width = x.shape[-2:]
    flat = x.reshape(-1, width)
    total = flat.shape[0]
    offset = (torch.arange(total // n, device=x.device) * n)[:, None, None]
    index = (index[..., :k].reshape(-1, n, k) + offset).reshape(-1, k)
    near = distances[..., :k].reshape(-1, k).double()
    known = torch.isfinite(near[:, -1:])
    # What stands in where there are not k neighbours has a measure and a gradient, both of which are then left out.
    spare = torch.eye(k, width, dtype=torch.float64, device=x.device)
    near = torch.where(known, near, 1.0)
    step = max(1, budget(memory) // (8 * k * (3 * width + 12 * k)))
    found = []
    for start in range(0, total, step):
        part = slice(start, start + step)
        rows = flat[index[part]].double() - flat[part].double().unsqueeze(1)
        found.append(measure(torch.where(known[part].unsqueeze(-1), rows, spare), near[part]))
    return torch.where(known.squeeze(-1), torch.cat(found), torch.nan).view(distances.shape[:-1])
