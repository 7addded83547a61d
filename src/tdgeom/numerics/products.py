"""yᵀy in float64, the symmetric half multiplied and mirrored; in float32 where that is asked for, or float64 is slow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from typing import Literal, TypeVar

import torch
from torch import Tensor

from tdgeom.core.devices import has_float64
from tdgeom.core.stage import device_of
from tdgeom.core.surroundings import steady
from tdgeom.numerics.symmetric_strips import edges

__all__ = [
    "Factors",
    "Precision",
    "add_gram",
    "add_product",
    "add_upper",
    "check_precision",
    "factors",
    "gram",
    "in_own_precision",
    "mirror",
    "product_dtype",
    "product_error",
    "upper_times",
]

_Result = TypeVar("_Result")
Precision = Literal["auto", "float64", "float32"]

_CELLS = 2**17  # of a float32 product that are added at a time, in the cache
# CUDA capabilities whose float64 units are half of float32's
_FULL_RATE = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
_ROWS = 704  # of a float32 product, at most
_ROUNDINGS = 64.0  # what its entries are off by at most, in units of eps/2: docs/precision.md


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
        return has_float64(torch.device(kind))
    properties = torch.cuda.get_device_properties(0 if index is None else index)
    if torch.version.hip is not None:
        return properties.gcnArchName.startswith(("gfx908", "gfx90a", "gfx94"))
    return (properties.major, properties.minor) in _FULL_RATE


def product_error(dtype: torch.dtype) -> float:
    """e with |error_ij| <= e·√(S_ii S_jj) for every entry of a product S = yᵀy taken in ``dtype``."""
    return _ROUNDINGS * torch.finfo(dtype).eps / 2


@in_own_precision
def gram(y: Tensor) -> Tensor:
    """yᵀy in float64: (*B, N, D) of any real dtype -> (*B, D, D), symmetric, little more than half of it multiplied."""
    y, ends = y.double(), edges(y.shape[-1])
    strips = [y[..., a:b].mT @ y[..., a:] for a, b in pairwise(ends)]
    rows: list[Tensor] = []
    for (a, b), strip in zip(pairwise(ends), strips):
        before = [above[..., a - start : b - start].mT for start, above in zip(ends[: len(rows)], strips)]
        rows.append(torch.cat((*before, _from_upper(strip[..., : b - a]), strip[..., b - a :]), -1))
    return torch.cat(rows, -2)


@dataclass(frozen=True)
class Factors:
    """Columns (N, E) as they are multiplied, and the powers of two (E,) that float32 ones are divided by."""

    values: Tensor
    scale: Tensor | None = None

    def __getitem__(self, columns: slice) -> Factors:
        return Factors(self.values[:, columns], None if self.scale is None else self.scale[columns])


def factors(y: Tensor, dtype: torch.dtype = torch.float64, largest: Tensor | None = None) -> Factors:
    """Columns (N, E) float64 for products in ``dtype``: in float32 at unit size, so that no square under- or overflows.

    ``largest``: (E,) what no value's size exceeds, where that is known.
    """
    if dtype == torch.float64:
        return Factors(y)
    largest = y.abs().amax(0) if largest is None else largest
    scale = torch.where(largest > 0, largest, 1.0).log2().ceil().exp2()
    return Factors((y * (1 / scale)).to(dtype), scale)


def add_gram(total: Tensor, y: Factors) -> None:
    """``total`` (D, E) += xᵀy in place, x the first D of the E columns y: what is symmetric in it is multiplied once."""
    width = total.shape[0]
    add_upper(total[:, :width], y[:width])
    if total.shape[1] > width:
        add_product(total[:, width:], y[:width], y[width:])
    mirror(total[:, :width])


def add_upper(total: Tensor, y: Factors) -> None:
    """The upper triangle of ``total`` (D, D) += yᵀy in place; what lies below it is left as it may be."""
    for a, b in pairwise(edges(total.shape[0])):
        add_product(total[a:b, a:], y[a:b], y[a:])


def mirror(total: Tensor) -> Tensor:
    """``total`` (D, D), in place, with its lower triangle from the upper."""
    for a, b in pairwise(edges(total.shape[0])):
        total[a:b, a:b] = _from_upper(total[a:b, a:b])
        total[b:, a:b] = total[a:b, b:].mT
    return total


def _from_upper(square: Tensor) -> Tensor:
    return square.triu() + square.triu(1).mT


def upper_times(total: Tensor, vector: Tensor) -> Tensor:
    """The symmetric matrix whose upper triangle is that of ``total`` (D, D), times a vector (D,)."""
    turned = torch.zeros_like(vector)
    for a, b in pairwise(edges(total.shape[0])):
        turned[a:b] += _from_upper(total[a:b, a:b]) @ vector[a:b] + total[a:b, b:] @ vector[b:]
        turned[b:] += total[a:b, b:].mT @ vector[a:b]
    return turned


def add_product(total: Tensor, x: Factors, y: Factors) -> None:
    """``total`` (D, E) += xᵀy in place."""
    if x.scale is None or y.scale is None:
        total.addmm_(x.values.mT, y.values)
        return
    step = max(1, _CELLS // y.values.shape[1])
    # Few rows at a time: what a float32 sum loses grows with them.
    parts = -(-x.values.shape[0] // _ROWS)
    for left, right in zip(x.values.tensor_split(parts), y.values.tensor_split(parts)):
        product = left.mT @ right
        for sums, part, scale in zip(total.split(step), product.split(step), x.scale.split(step)):
            sums.addcmul_(part.double().mul_(scale.unsqueeze(-1)), y.scale.expand(part.shape))
