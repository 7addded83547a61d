"""Blocks of rows about a running mean: one row more carries what was summed before to the mean that includes the block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["about_running_mean"]


def about_running_mean(rows: Sequence[Tensor], mean: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A block of n rows of several sites, side by side, about the mean of all rows so far.

    Args:
        rows: (n, D_i) of each site. mean: (ΣD,) float64 of the ``count`` rows before.

    Returns:
        y (n+1, ΣD), float64 if any rows are (or are whole numbers), else float32: the centred rows, and as its last row
        √count·δ, whose products move what was summed before to the new mean; that mean, and δ (ΣD,), its step, in float64.

    The block's own mean is taken twice, the second time of what the first left, so that float32 rows with a large offset
    are centred to their last digit without a float64 copy of the block.

        >>> y, mean, step = about_running_mean(
        ...     [torch.ones(1, 2)], torch.zeros(2, dtype=torch.float64), torch.tensor(1)
        ... )
        >>> y.tolist(), mean.tolist(), step.tolist()
        ([[0.5, 0.5], [0.5, 0.5]], [0.5, 0.5], [0.5, 0.5])
    """
    wide = any(x.dtype == torch.float64 or not x.is_floating_point() for x in rows)
    widths, n = [x.shape[1] for x in rows], rows[0].shape[0]
    dtype = torch.float64 if wide else torch.float32
    y = torch.empty(n + 1, sum(widths), dtype=dtype, device=rows[0].device)
    block = y[:-1]
    for x, part in zip(rows, block.split(widths, dim=1)):
        part.copy_(x)
    centre = block.mean(0)
    block -= centre
    rest = block.mean(0)
    block -= rest
    own = centre.double() + rest.double()
    before = count.double()
    step = (own - mean) * (n / (before + n))
    block -= (mean + step - own).to(dtype)
    y[-1] = (step * before.sqrt()).to(dtype)
    return y, mean + step, step
