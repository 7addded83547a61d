"""What every similarity measure does to its input first: check it, upcast it, centre it, scale it."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from tdgeom.core.warnings import UndefinedMeasureWarning

__all__ = ["Centred", "as_rows", "centre", "check_matched", "warn_undefined"]


def as_rows(x: Tensor, measure: str) -> Tensor:
    """(..., N, D) in float32 or float64: half precision and integers are upcast once."""
    if x.ndim < 2 or x.shape[-2] == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"{measure} expects rows of shape (..., N, D) with N, D >= 1, got {tuple(x.shape)}. Give it "
            "rows by features; flatten batch and positions into N (SelectTokens does)."
        )
    if x.is_complex():
        raise TypeError(f"{measure} expects real numbers, got {x.dtype}. Stack the two parts as features.")
    if not x.is_floating_point():
        return x.double()
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def check_matched(x: Tensor, y: Tensor, measure: str, *, same_width: bool = False) -> None:
    """Raise unless both sides have the same rows (and, if asked, features)."""
    if x.ndim < 2 or y.ndim < 2 or x.shape[-2] != y.shape[-2]:
        raise ValueError(
            f"{measure} compares matched rows: expected x (..., N, D) and y (..., N, E) with one N, got "
            f"{tuple(x.shape)} and {tuple(y.shape)}. Select the same rows on both sides (RowSample does, "
            "by row_id)."
        )
    if same_width and x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"{measure} compares features one to one: expected equal D, got {x.shape[-1]} and {y.shape[-1]}. "
            f"linear_cka and procrustes compare sites of different width."
        )


class Centred(NamedTuple):
    """Centred rows on a common scale; multiply by ``scale`` to have the data's own units."""

    rows: Tensor
    scale: Tensor


def centre(x: Tensor) -> Centred:
    """Rows minus their mean, divided by the largest magnitude left.

    The mean is taken in float64. Exactly constant features become exactly zero, and data with no variance
    has scale 0 and rows NaN. With every value in [-1, 1], squares and fourth powers neither overflow nor
    vanish in float32 whatever the unit of the data, so that no measure needs an absolute epsilon.
    """
    low, high = x.detach().amin(-2), x.detach().amax(-2)  # aminmax is ten times slower than both
    mean = torch.where(low == high, low.double(), x.mean(-2, dtype=torch.float64))
    scale = torch.maximum(high.double() - mean, mean - low.double()).amax(-1).detach()
    rows = (x - mean.to(x.dtype).unsqueeze(-2)) / scale.to(x.dtype)[..., None, None]
    return Centred(rows, scale)


def warn_undefined(value: Tensor, measure: str, reason: str) -> Tensor:
    """``value`` as it is; one UndefinedMeasureWarning if any of it is NaN."""
    if not torch.compiler.is_compiling():
        try:
            undefined = bool(torch.isnan(value.detach()).any())
        except RuntimeError:  # under vmap no Python decision can be taken on values
            undefined = False
        if undefined:
            warnings.warn(f"{measure} is undefined, NaN: {reason}", UndefinedMeasureWarning, stacklevel=3)
    return value
