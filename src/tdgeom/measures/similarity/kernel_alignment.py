"""Kernel measures on samples: RBF centred kernel alignment and distance correlation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tdgeom.core.keys import Keys
from tdgeom.core.pair_stage import PairStage
from tdgeom.measures.similarity.hsic import alignment
from tdgeom.measures.similarity.middle_distance import middle_distance
from tdgeom.measures.similarity.pair_sources import MATCHED_ROWS
from tdgeom.measures.similarity.row_distances import (
    condensed,
    distances,
    double_centre,
    median_distance,
    squared_distances,
)
from tdgeom.measures.similarity.row_pairs import MEMORY, Block, RowPairs, pair_sums
from tdgeom.numerics.centring import centre, check_matched, finite_rows, warn_undefined
from tdgeom.numerics.differentiation import is_differentiated
from tdgeom.numerics.opaque import opaque

__all__ = ["RBFCKA", "DistanceCorrelation", "distance_correlation", "rbf_cka"]

_REASON = "one side has no variance over the rows (or, for the RBF kernel, a median distance of 0)."
_SHARE = 8  # of ``memory`` that one side's matrix may take, where it is kept for many pairs


class _Rows(NamedTuple):
    """Centred float64 rows (..., N, D) whose kernel is made block by block."""

    rows: Tensor
    exponent: Tensor  # (...) of squared distances in the RBF kernel; 0 stands for plain distances
    dtype: torch.dtype


class _Kernel(NamedTuple):
    """A double-centred kernel of about unit norm in the input's precision, and its product with itself."""

    matrix: Tensor
    norm2: Tensor


def _prepare(x: Tensor, measure: str, memory: int, *, fraction: float | None, keep: bool) -> _Rows | _Kernel:
    """A side: its matrix where it is differentiated, or kept and small; else its rows."""
    if fraction is not None and not fraction > 0:
        raise ValueError(
            f"{measure}: the kernel's width is a positive fraction of the median distance, got {fraction}."
        )
    x = finite_rows(x, measure)
    rows = centre(x.double()).rows
    if rows.shape[-2] < 2:
        return _unit(rows.new_full((*rows.shape[:-1], rows.shape[-2]), torch.nan), x.dtype)
    if is_differentiated(x):
        return _differentiable(rows, x.dtype, fraction)
    exponent = rows.new_zeros(rows.shape[:-2]) if fraction is None else _exponents(rows, fraction, memory)
    side = _Rows(rows, exponent, x.dtype)
    small = 8 * rows.shape[-2] ** 2 * max(1, rows.shape[:-2].numel()) <= memory // _SHARE
    return _matrix(side) if keep and small else side


def _differentiable(rows: Tensor, dtype: torch.dtype, fraction: float | None) -> _Kernel:
    squares = squared_distances(rows)
    if fraction is None:
        return _unit(double_centre(distances(squares)), dtype)
    sigma = fraction * median_distance(condensed(squares))
    return _unit(double_centre(torch.exp(squares / (-2 * sigma.square()[..., None, None]))), dtype)


def _unit(matrix: Tensor, dtype: torch.dtype) -> _Kernel:
    matrix = (matrix / torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True).detach()).to(dtype)
    return _Kernel(matrix, _product(matrix, matrix))


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1), dtype=torch.float64)


@opaque(lambda rows, fraction, memory: rows.new_empty(rows.shape[:-2]))
def _exponents(rows: Tensor, fraction: float, memory: int) -> Tensor:
    """(...) of -1/(2σ²), σ = fraction x the median distance."""
    flat = rows.reshape(-1, *rows.shape[-2:])
    found = [-0.5 / (fraction * middle_distance(RowPairs(one), memory)) ** 2 for one in flat]
    return torch.stack(found).reshape(rows.shape[:-2]) if found else rows.new_empty(rows.shape[:-2])


def _block(pairs: RowPairs, exponent: Tensor) -> Block:
    """Blocks of distances, or of the RBF kernel."""
    if float(exponent) == 0:
        return lambda i, j: pairs.squares(i, j).sqrt_()
    return lambda i, j: pairs.squares(i, j).mul_(exponent).exp_()


def _matrix(side: _Rows) -> _Kernel:
    kernel = _centred_kernels(side.rows, side.exponent, side.dtype == torch.float64)
    return _Kernel(kernel, _product(kernel, kernel))


@opaque(
    lambda rows, exponent, wide: rows.new_empty(
        (*rows.shape[:-1], rows.shape[-2]), dtype=torch.float64 if wide else torch.float32
    )
)
def _centred_kernels(rows: Tensor, exponent: Tensor, wide: bool) -> Tensor:
    """(..., N, N) double-centred kernels of unit norm."""
    n = rows.shape[-2]
    whole = slice(0, n)
    found = rows.new_empty((exponent.numel(), n, n), dtype=torch.float64 if wide else torch.float32)
    for k, (one, power) in enumerate(zip(rows.reshape(-1, n, rows.shape[-1]), exponent.reshape(-1))):
        kernel = _block(RowPairs(one), power)(whole, whole)
        mean = kernel.mean(-1)
        kernel.sub_(mean[:, None]).sub_(mean - mean.mean())
        found[k] = kernel.div_(torch.linalg.vector_norm(kernel))
    return found.reshape(*rows.shape[:-1], n)


@opaque(lambda x, y, p, q: x.new_empty(torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])))
def _alignments(x: Tensor, y: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """<HKH, HLH>/(|HKH||HLH|) of each data set, from rows and exponents."""
    lead = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    x, y = (side.expand(*lead, *side.shape[-2:]).reshape(-1, *side.shape[-2:]) for side in (x, y))
    p, q = (side.expand(lead).reshape(-1) for side in (p, q))
    values = []
    for a, b, s, t in zip(x, y, p, q):
        k, m = _block(RowPairs(a), s), _block(RowPairs(b), t)
        values.append(alignment(*pair_sums(k, m, len(a)).centred()))
    return torch.stack(values).reshape(lead) if values else x.new_empty(lead)


def _alignment(a: _Rows | _Kernel, b: _Rows | _Kernel) -> Tensor:
    if isinstance(a, _Rows) and isinstance(b, _Rows):
        return _alignments(a.rows, b.rows, a.exponent, b.exponent)
    # the norms are those of the rounded matrices, so that A against A is 1
    a, b = (_matrix(side) if isinstance(side, _Rows) else side for side in (a, b))
    if a.matrix.dtype != b.matrix.dtype:
        a, b = (_unit(side.matrix.double(), torch.float64) for side in (a, b))
    return _product(a.matrix, b.matrix) / (a.norm2.sqrt() * b.norm2.sqrt())


def _reordered(side: _Rows | _Kernel, order: Tensor) -> _Rows | _Kernel:
    """A side, its rows in another order."""
    if isinstance(side, _Rows):
        return side._replace(rows=side.rows[..., order, :])
    return side._replace(matrix=side.matrix[..., order, :][..., order])


def rbf_cka(x: Tensor, y: Tensor, fraction: float = 1.0, *, memory: int = MEMORY) -> Tensor:
    """Centred kernel alignment with RBF kernels, biased.

    Formula:
        rbf_cka = ⟨HKH, HLH⟩ / (||HKH||_F ||HLH||_F); ``H = I - 11ᵀ/N`` centres
        K_ij = exp(-|x_i - x_j|²/(2σ²)); σ: ``fraction`` x the median distance between different rows, on each side

    Args:
        x: (..., N, D) rows. y: (..., N, E) the same rows on the other side. fraction: of the median.
        memory: bytes that may be taken beside float64 copies of the rows. The kernels are made block by block; the median is
            exact.

    Returns:
        (...) float64 in [0, 1]; 1 for identical rows. Time grows with N²(D + E); memory does not, but for rows that
        require gradients, whose N x N kernels autograd keeps.

    Invariances: orthogonal maps, isotropic scale (by the median) and offsets; not invertible linear maps. Bias: upwards
    with few rows. NaN with one warning where a side has no variance or more than half of its distances are 0.

    Kornblith et al. 2019, arXiv 1905.00414.

        >>> x = torch.randn(20, 3, dtype=torch.float64)
        >>> round(float(rbf_cka(x, 5 * x.flip(-1))), 9)
        1.0
    """
    check_matched(x, y, "rbf_cka")
    a, b = (_prepare(side, "rbf_cka", memory, fraction=fraction, keep=False) for side in (x, y))
    return warn_undefined(_alignment(a, b), "rbf_cka", _REASON)


class RBFCKA(PairStage):
    """``rbf_cka`` between two sites; ``fraction``: the kernel's width in median distances.

    A site's kernel is kept for all its pairs where it takes an eighth of ``memory`` at most; else each pair makes both anew.

    >>> x = torch.randn(20, 3)
    >>> round(float(RBFCKA()(sample_a=x, sample_b=-x)), 6)
    1.0
    """

    reads = MATCHED_ROWS
    writes = [("between", "rbf_cka")]

    def __init__(
        self, *, fraction: float = 1.0, memory: int = MEMORY, in_keys: Keys = None, out_keys: Keys = None
    ) -> None:
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.fraction, self.memory = fraction, memory

    def prepare(self, sample: Tensor) -> _Rows | _Kernel:
        """The centred kernel or the rows and its width, once a site."""
        return _prepare(sample, "RBFCKA", self.memory, fraction=self.fraction, keep=True)

    def reordered(self, side: _Rows | _Kernel, order: Tensor) -> _Rows | _Kernel:
        """A prepared side, its rows in another order: (N,) int64."""
        return _reordered(side, order)

    def compare(self, a: _Rows | _Kernel, b: _Rows | _Kernel) -> Tensor:
        """One elementwise product, at once or block by block."""
        return warn_undefined(_alignment(a, b), "rbf_cka", _REASON)


def distance_correlation(x: Tensor, y: Tensor, *, memory: int = MEMORY) -> Tensor:
    """Distance correlation, which tells dependence of any kind.

    Formula:
        distance_correlation = √(⟨A, B⟩ / (||A||_F ||B||_F)); A and B the double-centred matrices of Euclidean distances

    Args:
        x: (..., N, D) rows. y: (..., N, E) the same rows on the other side.
        memory: bytes that may be taken beside float64 copies of the rows; the distances are made block by block.

    Returns:
        (...) float64 in [0, 1] (the V-statistic, not squared); in the limit of many rows 0 only for independence of
        any kind. Time and memory as ``rbf_cka``.

    Invariances: orthogonal maps, isotropic scale and offsets; not invertible linear maps. Bias: upwards with few rows
    and many features, towards 1 as D/N grows. NaN with one warning where a side has no variance.

    Székely, Rizzo & Bakirov 2007, Annals of Statistics 35.

        >>> x = torch.randn(20, 3, dtype=torch.float64)
        >>> round(float(distance_correlation(x, 5 * x.flip(-1))), 9)
        1.0
    """
    check_matched(x, y, "distance_correlation")
    a, b = (_prepare(side, "distance_correlation", memory, fraction=None, keep=False) for side in (x, y))
    return warn_undefined(_alignment(a, b).clamp(min=0).sqrt(), "distance_correlation", _REASON)


class DistanceCorrelation(PairStage):
    """``distance_correlation`` between two sites; ``memory`` as in ``RBFCKA``.

    >>> x = torch.randn(20, 3)
    >>> round(float(DistanceCorrelation()(sample_a=x, sample_b=-x)), 6)
    1.0
    """

    reads = MATCHED_ROWS
    writes = [("between", "distance_correlation")]

    def __init__(self, *, memory: int = MEMORY, in_keys: Keys = None, out_keys: Keys = None) -> None:
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.memory = memory

    def prepare(self, sample: Tensor) -> _Rows | _Kernel:
        """The double-centred distances or the rows, once a site."""
        return _prepare(sample, "DistanceCorrelation", self.memory, fraction=None, keep=True)

    def reordered(self, side: _Rows | _Kernel, order: Tensor) -> _Rows | _Kernel:
        """A prepared side, its rows in another order: (N,) int64."""
        return _reordered(side, order)

    def compare(self, a: _Rows | _Kernel, b: _Rows | _Kernel) -> Tensor:
        """One elementwise product, at once or block by block."""
        return warn_undefined(_alignment(a, b).clamp(min=0).sqrt(), "distance_correlation", _REASON)
