"""Kernel measures on samples: RBF centred kernel alignment and distance correlation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tdgeom.core.keys import Keys
from tdgeom.core.pair_stage import PairStage
from tdgeom.measures.similarity.pair_sources import MATCHED_ROWS
from tdgeom.measures.similarity.row_distances import (
    condensed,
    distances,
    double_centre,
    median_distance,
    squared_distances,
)
from tdgeom.numerics.centring import centre, check_matched, finite_rows, warn_undefined

__all__ = ["RBFCKA", "DistanceCorrelation", "distance_correlation", "rbf_cka"]

_REASON = "one side has no variance over the rows (or, for the RBF kernel, a median distance of 0)."


def _rows(x: Tensor, measure: str) -> tuple[Tensor, torch.dtype]:
    x = finite_rows(x, measure)
    return centre(x.double()).rows, x.dtype


class _Kernel(NamedTuple):
    """A double-centred kernel of about unit norm in the input's precision, and its product with itself."""

    matrix: Tensor
    norm2: Tensor


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1), dtype=torch.float64)


def _unit(matrix: Tensor, dtype: torch.dtype) -> _Kernel:
    matrix = double_centre(matrix)
    matrix = (matrix / torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True).detach()).to(dtype)
    return _Kernel(matrix, _product(matrix, matrix))


def _alignment(a: _Kernel, b: _Kernel) -> Tensor:
    """<A, B>/(|A||B|), in float64; the norms are those of the rounded matrices, so that A against A is 1."""
    if a.matrix.dtype != b.matrix.dtype:
        a, b = (_unit(side.matrix.double(), torch.float64) for side in (a, b))
    return _product(a.matrix, b.matrix) / (a.norm2.sqrt() * b.norm2.sqrt())


def _rbf_kernel(x: Tensor, measure: str, fraction: float) -> _Kernel:
    if not fraction > 0:
        raise ValueError(
            f"{measure}: the kernel's width is a positive fraction of the median distance, got {fraction}."
        )
    rows, dtype = _rows(x, measure)
    if rows.shape[-2] < 2:
        return _unit(rows.new_full((*rows.shape[:-1], rows.shape[-2]), torch.nan), dtype)
    squares = squared_distances(rows)
    sigma = fraction * median_distance(condensed(squares))
    return _unit(torch.exp(squares / (-2 * sigma.square()[..., None, None])), dtype)


def rbf_cka(x: Tensor, y: Tensor, fraction: float = 1.0) -> Tensor:
    """Centred kernel alignment with RBF kernels, biased: ``<HKH, HLH>/(||HKH||_F ||HLH||_F)``.

    ``K_ij = exp(-|x_i - x_j|²/(2σ²))``, σ = ``fraction`` x the median distance between different rows, on each side.

    Args:
        x: (..., N, D) rows. y: (..., N, E) the same rows on the other side. fraction: of the median.

    Returns:
        (...) float64 in [0, 1]; 1 for identical rows. Memory: one N x N kernel a side, in the input's precision.

    Invariances: orthogonal maps, isotropic scale (by the median) and offsets; not invertible linear maps. Bias: upwards
    with few rows. NaN with one warning where a side has no variance or more than half of its distances are 0.

    Kornblith et al. 2019, arXiv 1905.00414.

        >>> x = torch.randn(20, 3, dtype=torch.float64)
        >>> round(float(rbf_cka(x, 5 * x.flip(-1))), 9)
        1.0
    """
    check_matched(x, y, "rbf_cka")
    value = _alignment(_rbf_kernel(x, "rbf_cka", fraction), _rbf_kernel(y, "rbf_cka", fraction))
    return warn_undefined(value, "rbf_cka", _REASON)


class RBFCKA(PairStage):
    """``rbf_cka`` between two sites; ``fraction``: the kernel's width in median distances.

    >>> x = torch.randn(20, 3)
    >>> round(float(RBFCKA()(sample_a=x, sample_b=-x)), 6)
    1.0
    """

    reads = MATCHED_ROWS
    writes = [("between", "rbf_cka")]

    def __init__(self, *, fraction: float = 1.0, in_keys: Keys = None, out_keys: Keys = None) -> None:
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.fraction = fraction

    def prepare(self, sample: Tensor) -> _Kernel:
        """The centred kernel, once a site."""
        return _rbf_kernel(sample, "RBFCKA", self.fraction)

    def compare(self, a: _Kernel, b: _Kernel) -> Tensor:
        """One elementwise product."""
        return warn_undefined(_alignment(a, b), "rbf_cka", _REASON)


def _centred_distances(x: Tensor, measure: str) -> _Kernel:
    rows, dtype = _rows(x, measure)
    return _unit(distances(squared_distances(rows)), dtype)


def distance_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Distance correlation ``sqrt(<A, B>/(|A||B|))``, A and B the double-centred matrices of Euclidean distances.

    Args:
        x: (..., N, D) rows. y: (..., N, E) the same rows on the other side.

    Returns:
        (...) float64 in [0, 1] (the V-statistic, not squared); in the limit of many rows 0 only for independence of
        any kind. Memory: one N x N matrix a side, in the input's precision.

    Invariances: orthogonal maps, isotropic scale and offsets; not invertible linear maps. Bias: upwards with few rows
    and many features, towards 1 as D/N grows. NaN with one warning where a side has no variance.

    Székely, Rizzo & Bakirov 2007, Annals of Statistics 35.

        >>> x = torch.randn(20, 3, dtype=torch.float64)
        >>> round(float(distance_correlation(x, 5 * x.flip(-1))), 9)
        1.0
    """
    check_matched(x, y, "distance_correlation")
    a, b = _centred_distances(x, "distance_correlation"), _centred_distances(y, "distance_correlation")
    return warn_undefined(_alignment(a, b).clamp(min=0).sqrt(), "distance_correlation", _REASON)


class DistanceCorrelation(PairStage):
    """``distance_correlation`` between two sites.

    >>> x = torch.randn(20, 3)
    >>> round(float(DistanceCorrelation()(sample_a=x, sample_b=-x)), 6)
    1.0
    """

    reads = MATCHED_ROWS
    writes = [("between", "distance_correlation")]

    def prepare(self, sample: Tensor) -> _Kernel:
        """The double-centred distances, once a site."""
        return _centred_distances(sample, "DistanceCorrelation")

    def compare(self, a: _Kernel, b: _Kernel) -> Tensor:
        """One elementwise product."""
        return warn_undefined(_alignment(a, b).clamp(min=0).sqrt(), "distance_correlation", _REASON)
