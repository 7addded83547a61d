"""A measure of every row's neighbourhood, a bounded number of neighbourhoods at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tdgeom.numerics.centring import holds
from tdgeom.numerics.differences import budget

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
    known = torch.isfinite(near[:, -1])
    if plain := holds(known.any()):
        which = known.nonzero().flatten()
    else:  # vmap, a traced graph: every row, with neighbours made up where there are none, whose measure is left out
        which = torch.arange(total, device=x.device)
        spare = torch.eye(k, width, dtype=torch.float64, device=x.device)
        near = torch.where(known.unsqueeze(-1), near, 1.0)
    found = []
    for part in which.split(max(1, budget(memory) // (8 * k * (3 * width + 12 * k)))):
        rows = flat[index[part]].double() - flat[part].double().unsqueeze(1)
        rows = rows if plain else torch.where(known[part, None, None], rows, spare)
        found.append(measure(rows, near[part]))
    local = torch.full_like(near[:, 0], torch.nan).index_put((which,), torch.cat(found))
    return local.where(known, torch.nan).view(distances.shape[:-1])
