"""yᵀy in float64, the symmetric half multiplied and mirrored; in float32 where that is asked for, or float64 is slow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from typing import Literal, TypeVar

import torch
from torch import Tensor

from tdgeom.core.stage import device_of
from tdgeom.core.surroundings import steady

__all__ = [
    "Factors",
    "Precision",
    "add_gram",
    "add_product",
    "check_precision",
    "factors",
    "gram",
    "in_own_precision",
    "product_dtype",
    "product_error",
]

_Result = TypeVar("_Result")
Precision = Literal["auto", "float64", "float32"]

_NARROWEST = 64  # columns of a strip: narrower ones cost more than they save
_STRIPS = 16  # multiply 17/32 of the square
# CUDA capabilities whose float64 units are half of float32's
_FULL_RATE = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
_ROWS = 256  # of a float32 product
_ROUNDINGS = 32.0  # what its entries are off by at most, in units of eps/2: docs/precision.md


def in_own_precision(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """A function of tensors with the same products whatever autocast or precision is set around its call."""

    @wraps(function)
    def steadily(*args: object, **options: object) -> _Result:
        with steady(device_of([*args, *options.values()])):
            return function(*args, **options)

    return steadily


def check_precision(precision: str, owner: str) -> None:
    """An error for a word that is none of ``Precision``."""
    if precision not in ("auto", "float64", "float32"):
        raise ValueError(f"{owner}: precision is 'auto', 'float64' or 'float32', got {precision!r}.")


def product_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """What products are taken in: float64 for ``"auto"`` wherever the device has it at speed."""
    if precision == "float32" or (precision == "auto" and not _fast_in_float64(device.type, device.index)):
        return torch.float32
    return torch.float64


@torch.compiler.assume_constant_result
def _fast_in_float64(kind: str, index: int | None) -> bool:
    if kind != "cuda":
        return kind != "mps"
    properties = torch.cuda.get_device_properties(0 if index is None else index)
    if torch.version.hip is not None:
        return properties.gcnArchName.startswith(("gfx908", "gfx90a", "gfx94"))
    return (properties.major, properties.minor) in _FULL_RATE


def product_error(dtype: torch.dtype) -> float:
    """e with |error_ij| <= e·√(S_ii S_jj) for every entry of a product S = yᵀy taken in ``dtype``."""
    return _ROUNDINGS * torch.finfo(dtype).eps / 2


def _edges(width: int) -> list[int]:
    strips = max(1, min(_STRIPS, width // _NARROWEST))
    return [round(width * i / strips) for i in range(strips + 1)]


@in_own_precision
def gram(y: Tensor) -> Tensor:
    """yᵀy in float64: (*B, N, D) of any real dtype -> (*B, D, D).

    Strips of columns are multiplied each with the columns from it on, and mirrored: half the products of the square, and a
    result that is symmetric to the last bit. BLAS' own symmetric product is no faster, and not within a graph's reach.
    """
    y = y.double()
    edges = _edges(y.shape[-1])
    strips = [y[..., a:b].mT @ y[..., a:] for a, b in pairwise(edges)]
    if len(strips) == 1:
        return strips[0]
    rows = []
    for i, (a, b) in enumerate(pairwise(edges)):
        above = [strips[j][..., a - edges[j] : b - edges[j]].mT for j in range(i)]
        rows.append(torch.cat([*above, strips[i]], -1))
    return torch.cat(rows, -2)


@dataclass(frozen=True)
class Factors:
    """Columns (N, E) as they are multiplied, and the powers of two (E,) that float32 ones are divided by."""

    values: Tensor
    scale: Tensor | None = None

    def __getitem__(self, columns: slice) -> Factors:
        return Factors(self.values[:, columns], None if self.scale is None else self.scale[columns])


def factors(y: Tensor, dtype: torch.dtype = torch.float64) -> Factors:
    """Columns (N, E) float64 for products in ``dtype``: in float32 at unit size, so that no square under- or overflows."""
    if dtype == torch.float64:
        return Factors(y)
    largest = y.abs().amax(0)
    scale = torch.where(largest > 0, largest, 1.0).log2().ceil().exp2()
    return Factors((y / scale).to(dtype), scale)


def add_gram(total: Tensor, y: Factors) -> None:
    """``total`` (D, E) += xᵀy in place, x the first D of the E columns y: what is symmetric in it is multiplied once."""
    width = total.shape[0]
    edges = _edges(width)
    for a, b in pairwise(edges):
        add_product(total[a:b, a:], y[a:b], y[a:])
    for a, b in pairwise(edges):
        total[b:, a:b] = total[a:b, b:width].mT


def add_product(total: Tensor, x: Factors, y: Factors) -> None:
    """``total`` (D, E) += xᵀy in place."""
    if x.scale is None or y.scale is None:
        total.addmm_(x.values.mT, y.values)
        return
    # Few rows at a time: what a float32 sum loses grows with them.
    for left, right in zip(x.values.split(_ROWS), y.values.split(_ROWS)):
        total.add_((left.mT @ right).double() * x.scale.unsqueeze(-1) * y.scale)
