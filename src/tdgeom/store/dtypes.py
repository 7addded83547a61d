"""The dtype rows are stored in, and what that costs: cast, per-row scales for float8, and the error of it all."""

from __future__ import annotations

import torch
from torch import Tensor

from tdgeom.store.errors import StoreError

__all__ = ["SCALED", "decode", "encode", "named_dtype", "rounding_error"]

SCALED = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
_NAMES = {"float8": torch.float8_e4m3fn}


def named_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype from ``torch.bfloat16``, ``"bfloat16"``, ``"float8"`` (e4m3fn) or None.

    >>> named_dtype("bfloat16")
    torch.bfloat16
    """
    if name is None or isinstance(name, torch.dtype):
        found = name
    else:
        found = _NAMES.get(name, getattr(torch, str(name).removeprefix("torch."), None))
    allowed = (torch.float64, torch.float32, torch.float16, torch.bfloat16, *SCALED)
    if (found is not None and found not in allowed) or (name is not None and found is None):
        raise ValueError(
            f"dtype={name!r}: rows are stored as they come (None) or as one of {[str(one) for one in allowed]}."
        )
    return found


def encode(rows: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """(rows as stored, per-row scale or None). Rows that are no floating point numbers stay as they are.

    float8 rows are divided by a float32 scale a row, max|x| / 448 (e4m3fn) or / 57344 (e5m2); a row of zeros has scale 1.

    >>> stored, scale = encode(torch.tensor([[1.0, -2.0]]), torch.float8_e4m3fn)
    >>> decode(stored, scale, torch.float32)
    tensor([[ 1., -2.]])

    Raises:
        StoreError: a value beyond the dtype's range (float16 ends at 65504): it is never stored as infinity.
    """
    if dtype is None or not rows.is_floating_point() or rows.dtype == dtype:
        return rows, None
    if dtype in SCALED:
        flat = rows.flatten(1) if rows.ndim > 1 else rows[:, None]
        largest = flat.abs().amax(1) if flat.shape[1] else flat.new_zeros(len(flat))
        scale = (largest.double() / SCALED[dtype]).float()
        scale = torch.where(
            largest > 0, scale.clamp(min=torch.finfo(torch.float32).tiny), torch.ones_like(scale)
        )
        by_row = scale.reshape(-1, *[1] * (rows.ndim - 1))
        wide = rows.double() if rows.dtype == torch.float64 else rows.float()
        # the division may round past the largest float8, which the cast would make NaN
        stored = (wide / by_row).clamp(-SCALED[dtype], SCALED[dtype]).to(dtype)
        fits = torch.isfinite(scale).all()
    else:
        stored, scale = rows.to(dtype), None
        fits = torch.isfinite(stored).all()
    if not bool(fits) and bool(torch.isfinite(rows).all()):
        raise StoreError(
            f"rows reach {float(rows.abs().max()):.3g}, beyond {dtype} (up to {torch.finfo(dtype).max:.3g}). Store them as "
            f"bfloat16, or as they come (dtype=None)."
        )
    return stored, scale


def decode(stored: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows as they were before ``encode``, in their own dtype."""
    if scale is None:
        return stored.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return (stored.to(wide) * scale.to(wide).reshape(-1, *[1] * (stored.ndim - 1))).to(dtype)


def rounding_error(rows: Tensor, stored: Tensor, scale: Tensor | None) -> Tensor:
    """float64 (3,): Σ|x-x̂|², Σ|x|², and the largest |x-x̂| / |x| of any row. Zeros where nothing was cast."""
    error = torch.zeros(3, dtype=torch.float64, device=rows.device)
    if stored is rows or not len(rows):
        return error
    exact = rows.double().reshape(len(rows), -1)
    gap = (decode(stored, scale, torch.float64).reshape(len(rows), -1) - exact).square().sum(1)
    size = exact.square().sum(1)
    error[0], error[1] = gap.sum(), size.sum()
    error[2] = torch.where(size > 0, gap / size.clamp(min=1e-300), torch.zeros_like(size)).max().sqrt()
    return error
