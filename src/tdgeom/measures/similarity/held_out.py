"""Procrustes distance and overlap of subspaces without what few rows do to them: directions of some rows, judged on others."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tdgeom.numerics.centring import centre, check_matched, finite_rows, warn_undefined
from tdgeom.numerics.hashing import hash_ids

__all__ = ["ProcrustesBounds", "procrustes_bounds", "subspace_overlap_corrected"]


class ProcrustesBounds(NamedTuple):
    """Each (): below and above the distance of the population on average, and an estimate between them."""

    lower: Tensor
    upper: Tensor
    estimate: Tensor


def _parts(document: Tensor | None, rows: int, parts: int, seed: int, owner: str) -> Tensor:
    """(N,) the part 0..parts-1 of each row, whole documents, parts of nearly equal numbers of documents."""
    if document is None:
        document = torch.arange(rows, device="cpu")
    if document.shape != (rows,):
        raise ValueError(
            f"{owner} expects document of shape ({rows},), one number a row, got {tuple(document.shape)}."
        )
    known, index = torch.unique(document, return_inverse=True)
    if len(known) < 2 * parts:
        raise ValueError(
            f"{owner} deals documents into {parts} parts and needs {2 * parts} or more, got {len(known)}. Give more documents."
        )
    rank = hash_ids(known, seed).argsort().argsort()
    return (rank % parts)[index]


def procrustes_bounds(
    x: Tensor, y: Tensor, document: Tensor | None = None, *, folds: int = 10, seed: int = 0
) -> ProcrustesBounds:
    """Squared Procrustes distance 2 - 2ν of the *population*, between two bounds; ν = ||Σ_xy||_*/√(tr Σ_x tr Σ_y).

    The singular values of a sample's cross covariance are too large, for its singular vectors fit the noise: with few rows
    any two clouds share some shape, and ``procrustes`` is too small. Vectors fitted without one fold and judged on that
    fold, Σ_folds tr(Uᵀ Σ_fold V), make ν too small instead. Neither is unbiased; no estimator of a nuclear norm is. The
    estimate takes the geometric mean of the two.

    Args:
        x: (N, D) rows. y: (N, E) the same rows on the other side.
        document: (N,) int64: folds hold whole documents. Default: every row by itself.
        folds: of the cross-validation, 2 or more. seed: of the dealing.

    Returns:
        ``lower`` = ``procrustes(x, y)``, ``upper`` (vectors judged on rows they never saw), ``estimate``, in [0, 2]. How far
        apart they are is how little the rows tell: give more rows. Measured (D = 50, power-law spectrum, unit noise, N = 500):
        ν is 8 % too large, 13 % too small, 3 % too small. NaN with one warning without variance.

    Pospisil et al. 2023, arXiv 2310.05742, on why the plain one needs so many rows.

        >>> g = torch.Generator().manual_seed(0)
        >>> x, y = torch.randn(100, 40, generator=g), torch.randn(100, 40, generator=g)  # the truth is 2
        >>> [round(float(value), 1) for value in procrustes_bounds(x, y)]
        [1.0, 2.0, 1.8]
    """
    check_matched(x, y, "procrustes_bounds")
    if x.ndim != 2 or y.ndim != 2:
        raise ValueError(
            f"procrustes_bounds expects rows (N, D) and (N, E), got {tuple(x.shape)} and {tuple(y.shape)}."
        )
    a, b = (centre(finite_rows(side, "procrustes_bounds").double()).rows for side in (x, y))
    part = _parts(document, len(a), folds, seed, "procrustes_bounds").to(a.device)
    size = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)
    if not bool(torch.isfinite(size)):
        undefined = warn_undefined(
            size * torch.nan, "procrustes_bounds", "one side has no variance over the rows."
        )
        return ProcrustesBounds(undefined, undefined, undefined)
    products = torch.stack([a[part == fold].mT @ b[part == fold] for fold in range(folds)])
    whole = products.sum(0)
    judged = size.new_zeros(())
    for product in products:
        u, _, vt = torch.linalg.svd(whole - product, full_matrices=False)
        judged = judged + ((u.mT @ product) * vt).sum()
    plain, judged = torch.linalg.svdvals(whole).sum() / size, judged.clamp(min=0) / size
    return ProcrustesBounds(2 - 2 * plain, 2 - 2 * judged, 2 - 2 * (plain * judged).sqrt())


def subspace_overlap_corrected(
    x: Tensor, y: Tensor, document: Tensor | None = None, *, k: int = 10, splits: int = 10, seed: int = 0
) -> Tensor:
    """Overlap ||U_kᵀV_k||²_F/k of the leading principal subspaces of two sides, corrected for what few rows blur.

    Subspaces fitted to few rows miss the true ones: their overlap is too small even where the true ones are the same. Documents
    are split in halves, and with P_1, P_2 the projections of side x fitted to either half, Q_1, Q_2 those of y,

        (<P_1, Q_2> + <P_2, Q_1>)/2 / √(<P_1, P_2> <Q_1, Q_2>),

    averaged over splits: what two halves of one side share with each other is the most that halves of two sides can.

    Args:
        x: (N, D) rows. y: (N, D) the same rows on the other side, in one space.
        document: (N,) int64: halves hold whole documents. Default: every row by itself.
        k: directions a side. splits: of the documents. seed: of the splits.

    Returns:
        () float64, 1 for equal subspaces on average (single values may exceed 1), about k/D (divided by what halves share) for
        unrelated ones. Right where the eigenvalues k and k+1 differ; where they do not, halves share little.

    Spearman 1904 (the correction for attenuation).

        >>> g = torch.Generator().manual_seed(0)
        >>> z = torch.randn(300, 3, generator=g) @ torch.randn(3, 50, generator=g)
        >>> x, y = (z + 4 * torch.randn(300, 50, generator=g) for _ in range(2))
        >>> round(float(subspace_overlap_corrected(x, y, k=3)), 1)
        1.0
    """
    check_matched(x, y, "subspace_overlap_corrected", same_width=True)
    if x.ndim != 2 or not 1 <= k <= x.shape[-1]:
        raise ValueError(
            f"subspace_overlap_corrected expects rows (N, D) and 1 <= k <= D, got {tuple(x.shape)} and k={k}."
        )
    a, b = (finite_rows(side, "subspace_overlap_corrected").double() for side in (x, y))
    found = []
    for split in range(splits):
        half = _parts(document, len(a), 2, seed + split, "subspace_overlap_corrected").to(a.device)
        p, q = ([_leading(side[half == number], k) for number in (0, 1)] for side in (a, b))
        between = (_shared(p[0], q[1]) + _shared(p[1], q[0])) / 2
        found.append(between / (_shared(p[0], p[1]) * _shared(q[0], q[1])).sqrt())
    return torch.stack(found).mean()


def _leading(rows: Tensor, k: int) -> Tensor:
    """(D, k) leading right singular vectors of centred rows."""
    if len(rows) <= k:
        raise ValueError(
            f"subspace_overlap_corrected needs more than k={k} rows in each half, got {len(rows)}."
        )
    return torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:k].mT


def _shared(u: Tensor, v: Tensor) -> Tensor:
    return (u.mT @ v).square().sum()
