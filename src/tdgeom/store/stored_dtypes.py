"""The dtype rows are stored in, and what that costs: cast, per-row scales for float8, and the error of it all."""

from __future__ import annotations

import torch
from torch import Tensor

from tdgeom.files.errors import StoreError

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
        StoreError: a value beyond the dtype's range (float16 ends at 65504), which is never stored as infinity; NaN or Inf.
    """
    if dtype is None or not rows.is_floating_point() or rows.dtype == dtype:
        return rows, None
    if dtype in SCALED:
        stored, scale, largest = _scaled(rows, dtype)
        fits = torch.isfinite(scale).all()
    else:
        stored, scale = rows.to(dtype), None
        largest = rows.abs().amax() if rows.numel() else rows.new_zeros(())
        fits = torch.isfinite(largest.to(dtype))  # casting keeps the order, so no other value went further
    if not bool(torch.isfinite(largest).all()):
        raise StoreError(
            f"rows hold NaN or Inf, which are not cast to {dtype}. Leave such rows out (run(..., nonfinite='drop')), or store "
            f"rows as they come (dtype=None)."
        )
    if not bool(fits):
        raise StoreError(
            f"rows reach {float(largest.max()):.3g}, beyond {dtype} (up to {torch.finfo(dtype).max:.3g}). Store them as "
            f"bfloat16, or as they come (dtype=None)."
        )
    return stored, scale


def _scaled(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(rows in float8, the scale of each, max|x| of each)."""
    flat = rows.flatten(1) if rows.ndim > 1 else rows[:, None]
    largest = flat.abs().amax(1) if flat.shape[1] else flat.new_zeros(len(flat))
    scale = (largest.double() / SCALED[dtype]).float().clamp(min=torch.finfo(torch.float32).tiny)
    scale = torch.where(largest > 0, scale, torch.ones_like(scale))
    wide = rows if rows.dtype == torch.float64 else rows.float()
    # the division may round past the largest float8, which the cast would make NaN
    stored = (wide / _by_row(scale, rows)).clamp(-SCALED[dtype], SCALED[dtype]).to(dtype)
    return stored, scale, largest


def _by_row(scale: Tensor, rows: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (rows.ndim - 1))


def decode(stored: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows as they were before ``encode``, in their own dtype."""
    if scale is None:
        return stored.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return (stored.to(wide) * _by_row(scale.to(wide), stored)).to(dtype)


def rounding_error(rows: Tensor, stored: Tensor, scale: Tensor | None) -> Tensor:
    """float64 (3,): Σ|x-x̂|², Σ|x|², and the largest |x-x̂| / |x| of any row. Zeros where nothing was cast."""
    error = torch.zeros(3, dtype=torch.float64, device=rows.device)
    if stored is rows or not rows.numel():
        return error
    wide = torch.promote_types(rows.dtype, torch.float32)
    exact = rows.to(wide).reshape(len(rows), -1)
    gap = _norms(decode(stored, scale, wide).reshape(len(rows), -1) - exact)
    size = _norms(exact)
    error[0], error[1] = gap.square().sum(), size.square().sum()
    error[2] = torch.where(size > 0, gap / size.clamp(min=1e-300), torch.zeros_like(size)).max()
    return error


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
