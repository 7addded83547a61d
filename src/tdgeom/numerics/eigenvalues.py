"""Eigenvalues and a few leading eigenvectors of symmetric float64 matrices."""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal, eigvalsh_tridiagonal, lapack
from torch import Tensor
from torch.autograd import forward_ad

from tdgeom.numerics.centring import holds

__all__ = ["leading_eigenpairs", "refuse_truncated", "symmetric_eigenvalues"]

_SMALLEST = 128  # below this width all vectors cost no more than a few


def symmetric_eigenvalues(matrix: Tensor) -> Tensor:
    """Ascending eigenvalues of finite symmetric (*B, D, D) in float64: (*B, D)."""
    array = _values(matrix)
    return torch.linalg.eigvalsh(matrix) if array is None else torch.from_numpy(np.linalg.eigvalsh(array))


def leading_eigenpairs(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues, ascending, and the vectors of the k largest, of finite symmetric (*B, D, D) in float64.

    Returns (*B, D) and (*B, D, k). Where k is small the matrix is brought to tridiagonal form once, all its eigenvalues and
    only k vectors are taken from that form, and those are turned back: less than half the time of all D vectors.
    """
    d = matrix.shape[-1]
    if d < _SMALLEST or 4 * k > d or _values(matrix) is None:
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors[..., d - k :]
    flat = matrix.reshape(-1, d, d)
    pairs = [_by_tridiagonal(one, k) for one in flat]
    values = torch.stack([pair[0] for pair in pairs]).reshape(*matrix.shape[:-2], d)
    return values, torch.stack([pair[1] for pair in pairs]).reshape(*matrix.shape[:-2], d, k)


def refuse_truncated(eigenvalues: Tensor, reader: str, key: object) -> None:
    """An error for (*B, D) of which only the leading part is known, NaN beyond; all NaN is undefined, and passes."""
    known = ~torch.isnan(eigenvalues)
    if holds((known.any(-1) & ~known.all(-1)).any()):
        raise ValueError(
            f"{reader} expects a whole spectrum at {key!r}, got the {int(known.sum(-1).min())} leading of "
            f"{known.shape[-1]} eigenvalues (NaN beyond, as StreamingSketch leaves them). Take them from StreamingCovariance and "
            f"EigenSpectrum; SpectrumMetrics(source='sketch') reads what a sketch knows of the others."
        )


def _values(matrix: Tensor) -> np.ndarray | None:
    """The numbers, where nothing but the numbers is asked for: None on other devices, in graphs and under transforms."""
    if matrix.device.type != "cpu" or matrix.requires_grad or torch.compiler.is_compiling():
        return None
    try:
        array = matrix.numpy()
    except RuntimeError:  # vmap, jvp: a tensor that stands for others has no values of its own
        return None
    return array if forward_ad.unpack_dual(matrix).tangent is None else None


def _by_tridiagonal(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    d = matrix.shape[-1]
    # The transpose of a symmetric matrix is itself, and in the column order that LAPACK works in.
    room = int(lapack.dsytrd_lwork(d, lower=1)[0])
    reduced, diagonal, beside, tau, _ = lapack.dsytrd(matrix.numpy().T, lower=1, lwork=room)
    values = eigvalsh_tridiagonal(diagonal, beside, check_finite=False, lapack_driver="sterf")
    try:
        _, vectors = eigh_tridiagonal(
            diagonal,
            beside,
            select="i",
            select_range=(d - k, d - 1),
            check_finite=False,
            lapack_driver="stemr",
        )
    except np.linalg.LinAlgError:  # relatively robust representations are not found for every matrix
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors[..., d - k :]
    # reduced = QᵀAQ; Q leaves the first coordinate alone and is stored as reflectors below the subdiagonal.
    below = np.asfortranarray(reduced[1:, :-1])
    turned, _, _ = lapack.dormqr("L", "N", below, tau, np.asfortranarray(vectors[1:]), 64 * k)
    return torch.from_numpy(values), torch.from_numpy(np.concatenate([vectors[:1], turned]))
