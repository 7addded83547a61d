"""Quantiles of any number of values (``torch.quantile`` takes 2^24)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["quantiles", "quantiles_of_numbers"]


def quantiles(values: Tensor, at: Sequence[float]) -> list[Tensor]:
    """The quantiles of (*B, N) at each of ``at``, interpolated linearly: a list of (*B,). NaN where a value is.

    >>> [float(q) for q in quantiles(torch.tensor([3.0, 1.0, 2.0]), [0.5, 0.75])]
    [2.0, 2.5]
    """
    ordered = values.sort(-1).values  # NaN comes last
    last = ordered.shape[-1] - 1
    found = []
    for share in at:
        place = share * last
        below = int(place)
        above = min(below + 1, last)
        found.append(torch.lerp(ordered[..., below], ordered[..., above], place - below))
    return [torch.where(ordered[..., -1].isnan(), torch.nan, value) for value in found]


def quantiles_of_numbers(values: Tensor, at: Sequence[float]) -> list[Tensor]:
    """As ``quantiles``, of those among the values (*B, N) that are not NaN; NaN where there are none.

    >>> [float(q) for q in quantiles_of_numbers(torch.tensor([3.0, torch.nan, 1.0, 2.0]), [0.5, 0.75])]
    [2.0, 2.5]
    """
    ordered = values.sort(-1).values
    last = (~values.isnan()).sum(-1, keepdim=True) - 1
    found = []
    for share in at:
        place = share * last.clamp(min=0).to(values.dtype)
        below = place.floor().long()
        above = torch.minimum(below + 1, last.clamp(min=0))
        found.append(torch.lerp(ordered.gather(-1, below), ordered.gather(-1, above), place - below)[..., 0])
    return found
