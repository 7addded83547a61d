"""What a measure does to its input first (check, upcast, centre, scale), and its word where it is NaN."""

from __future__ import annotations

import threading
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from tdgeom.core.pair_stage import check_spread
from tdgeom.core.warnings import tell
from tdgeom.numerics.opaque import opaque

__all__ = [
    "Centred",
    "as_rows",
    "centre",
    "check_matched",
    "finite_rows",
    "holds",
    "in_one_type",
    "occurs",
    "real_rows",
    "refuse_nonfinite",
    "upcast",
    "warn_undefined",
]


def real_rows(x: Tensor, measure: str) -> Tensor:
    """``x`` as it is, unless it is complex: every statistic here is one of real numbers."""
    if x.is_complex():
        raise TypeError(
            f"{measure} expected real numbers, got {str(x.dtype).removeprefix('torch.')} (shape {tuple(x.shape)}); stack real "
            f"and imaginary parts as features (torch.view_as_real(x).flatten(-2))."
        )
    return x


def upcast(x: Tensor) -> Tensor:
    """``x`` in float32 or float64: half precision becomes float32, integers become float64."""
    if x.dtype in (torch.float32, torch.float64):
        return x
    return x.float() if x.is_floating_point() else x.double()


def in_one_type(*given: Tensor) -> list[Tensor]:
    """Factors of one product in the widest of their types, integers counting as float64."""
    wide = [value if value.is_floating_point() else value.double() for value in given]
    dtype = reduce(torch.promote_types, (value.dtype for value in wide))
    return [value.to(dtype) for value in wide]


def holds(condition: Tensor) -> bool:
    """Whether a condition on values is true; False where none can be looked at, in a graph being traced and under vmap."""
    if torch.compiler.is_compiling():
        return False
    try:
        return bool(condition)
    except RuntimeError:  # a tensor that stands for a batch of others has no values of its own
        return False


def occurs(condition: Tensor) -> bool:
    """Whether a condition on values is true anywhere, of any item that vmap maps over; False in a graph being traced."""
    if torch.compiler.is_compiling():
        return False
    try:
        return bool(condition.any())
    except RuntimeError:
        _looked.at = False
        _look(condition)
        return bool(_looked.at)


_looked = threading.local()


@opaque(lambda condition: condition.new_empty(condition.shape))
def _look(condition: Tensor) -> Tensor:
    """What ``vmap`` maps over arrives whole here, and has values."""
    _looked.at = bool(condition.any())
    return condition.clone()


def refuse_nonfinite(x: Tensor, measure: str) -> Tensor:
    """The largest magnitude () among the values of ``x``; an error where any is NaN or Inf."""
    if not x.numel():
        return x.new_zeros(())
    ends = torch.stack(torch.aminmax(x.detach()))  # one pass; NaN wins in both
    if occurs(~torch.isfinite(ends)):
        raise ValueError(
            f"{measure}: the rows (shape {tuple(x.shape)}) hold NaN or Inf. Drop such rows first; "
            f"run(..., nonfinite='drop') does it at all sites and counts them."
        )
    return ends.abs().max()


def as_rows(x: Tensor, measure: str) -> Tensor:
    """(..., N, D) in float32 or float64: half precision and integers are upcast once."""
    if x.ndim < 2 or x.shape[-2] == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"{measure} expects rows of shape (..., N, D) with N, D >= 1, got {tuple(x.shape)}. Give it "
            "rows by features; flatten batch and positions into N (SelectTokens does)."
        )
    return upcast(real_rows(x, measure))


def finite_rows(x: Tensor, measure: str) -> Tensor:
    """``as_rows``, refusing NaN and Inf, which no measure should take for rows without variance."""
    x = as_rows(x, measure)
    refuse_nonfinite(x, measure)
    return x


def check_matched(x: Tensor, y: Tensor, measure: str, *, same_width: bool = False) -> None:
    """Raise unless both sides have the same rows (and, if asked, features), and leading dimensions that spread."""
    if x.ndim < 2 or y.ndim < 2 or x.shape[-2] != y.shape[-2]:
        raise ValueError(
            f"{measure} compares matched rows: expected x (..., N, D) and y (..., N, E) with one N, got "
            f"{tuple(x.shape)} and {tuple(y.shape)}. Select the same rows on both sides (RowSample does, "
            "by row_id)."
        )
    check_spread(x, y, measure)
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
    if occurs(torch.isnan(value.detach())):
        tell(f"{measure} is undefined, NaN: {reason}")
    return value
