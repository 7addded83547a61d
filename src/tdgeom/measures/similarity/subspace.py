"""How far principal subspaces turn, and how far rows turn, from one site to the next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tdgeom.core.keys import Keys
from tdgeom.core.pair_stage import PairStage, check_spread
from tdgeom.numerics.centring import as_rows, check_matched, warn_undefined

__all__ = ["LayerCosine", "SubspaceNovelty", "feature_subspace_novelty", "layer_cosine_sim"]


def feature_subspace_novelty(u: Tensor, v: Tensor) -> Tensor:
    """Mean sine of the principal angles: ``mean_i sqrt(1 - σ_i²)``, σ the singular values of UᵀV.

    Args:
        u: (..., D, k) orthonormal columns, such as leading eigenvectors. v: (..., D, k) of the other side,
        equal D.

    Returns:
        (...) in [0, 1]: 0 for equal subspaces, 1 for orthogonal ones; two random ones have about ``sqrt(1 -
        k/D)``. NaN with one warning where a side has no vectors (rows without variance).

    The sines are singular values of ``V - U(UᵀV)``, so that equal subspaces give 0 to rounding (1 - σ²
    would leave the square root of it, 1e-8). Invariances: any basis of either subspace, and one rotation of
    both sides; rows need not match.

    Björck & Golub 1973, Numerical methods for computing angles between linear subspaces.

        >>> u = torch.eye(4, dtype=torch.float64)
        >>> feature_subspace_novelty(u[:, :2], u[:, [0, 3]])
        tensor(0.5000, dtype=torch.float64)
    """
    if u.ndim < 2 or v.ndim < 2 or u.shape[-2] != v.shape[-2]:
        raise ValueError(
            "feature_subspace_novelty compares subspaces of one space: expected u (..., D, k) and v (..., "
            f"D, k) with equal D, got {tuple(u.shape)} and {tuple(v.shape)}. Sites of different width have "
            "no common directions; linear_cka compares them through their rows."
        )
    if u.shape[-1] != v.shape[-1] or u.shape[-1] == 0:
        raise ValueError(
            f"feature_subspace_novelty expects as many columns on both sides, got {u.shape[-1]} and "
            f"{v.shape[-1]}. Keep the first k = {min(u.shape[-1], v.shape[-1])} of each."
        )
    check_spread(u, v, "feature_subspace_novelty")
    u, v = as_rows(u, "feature_subspace_novelty").double(), as_rows(v, "feature_subspace_novelty").double()
    outside = v - u @ (u.mT @ v)
    # LAPACK raises on NaN: such a pair goes in as zeros and comes out as NaN.
    undefined = ~torch.isfinite(outside).all(-1).all(-1)
    sines = torch.linalg.svdvals(torch.where(undefined[..., None, None], 0.0, outside)).clamp(max=1)
    value = torch.where(undefined, torch.nan, sines.mean(-1))
    return warn_undefined(value, "feature_subspace_novelty", "one side's vectors are not finite.")


class SubspaceNovelty(PairStage):
    """``feature_subspace_novelty`` between the leading k eigenvectors of two sites.

    Args:
        k: how many leading directions; fewer are used where the eigenvectors have fewer columns.
        in_keys, out_keys: see ``Stage``. Default: ``("eigenvectors", side)`` (D, k) of EigenSpectrum.

        >>> SubspaceNovelty(k=2)(eigenvectors_a=torch.eye(4), eigenvectors_b=torch.eye(4))
        tensor(0., dtype=torch.float64)
    """

    reads = {("eigenvectors", "a"): "D k", ("eigenvectors", "b"): "D l"}
    writes = [("between", "feature_subspace_novelty")]

    def __init__(self, *, k: int = 32, in_keys: Keys = None, out_keys: Keys = None) -> None:
        if k < 1:
            raise ValueError(f"SubspaceNovelty: k counts directions, expected 1 or more, got {k}.")
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.k = k

    def prepare(self, vectors: Tensor) -> Tensor:
        """The first k columns."""
        return vectors[..., : self.k]

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """One (k, k) product and one singular value decomposition of (D, k)."""
        k = min(a.shape[-1], b.shape[-1])
        return feature_subspace_novelty(a[..., :k], b[..., :k])


def layer_cosine_sim(x: Tensor, y: Tensor) -> Tensor:
    """Mean cosine between matched rows, uncentred: ``mean_i <x_i, y_i>/(|x_i||y_i|)``.

    Args:
        x: (..., N, D) rows. y: (..., N, D) the same rows on the other side, equal D.

    Returns:
        (...) float64 in [-1, 1], over the rows that have a direction on both sides: a zero row has no
        cosine and is left out. NaN with one warning where no row has one, or a value is not finite.

    Invariances: one rotation of both sides, and positive scale of any row; not separate rotations, not
    offsets. No bias with few rows. Features of large mean bring it near 1 whatever the rows do.

    Men et al. 2024, arXiv 2403.03853 (1 minus it, between a block's input and output, is their block influence).

        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> layer_cosine_sim(x, torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]]))
        tensor(0.8536, dtype=torch.float64)
    """
    check_matched(x, y, "layer_cosine_sim", same_width=True)
    return _mean_cosine(*(_directions(side, "layer_cosine_sim") for side in (x, y)))


class _Directions(NamedTuple):
    rows: Tensor  # (..., N, D) of unit norm, or zero; float64
    directed: Tensor  # (..., N) which are not zero


def _directions(x: Tensor, measure: str) -> _Directions:
    rows = as_rows(x, measure)
    if rows.dtype == torch.float64:
        # The largest magnitude is divided out first: rows of any scale have a norm (narrower ones have one in float64).
        size = rows.detach().abs().amax(-1, keepdim=True)
        rows = rows / torch.where(size == 0, 1, size)
    rows = rows.double()
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    # NaN is not 0: a row that is not finite counts, and shows
    directed = norm != 0
    return _Directions(rows / torch.where(directed, norm, 1), directed[..., 0])


def _mean_cosine(a: _Directions, b: _Directions) -> Tensor:
    counted = a.directed & b.directed
    cosine = torch.where(counted, torch.linalg.vecdot(a.rows, b.rows), 0.0)
    value = (cosine.sum(-1) / counted.sum(-1)).clamp(-1, 1)
    return warn_undefined(
        value, "layer_cosine_sim", "every row is zero on one side, or there are values that are not finite."
    )


class LayerCosine(PairStage):
    """``layer_cosine_sim`` between two sites of equal width, rows matched.

    >>> x = torch.randn(5, 3)
    >>> LayerCosine()(sample_a=x, sample_b=-x)
    tensor(-1.0000, dtype=torch.float64)
    """

    reads = {("sample", "a"): "N D", ("sample", "b"): "N D"}
    writes = [("between", "layer_cosine_sim")]

    def prepare(self, sample: Tensor) -> _Directions:
        """Rows of unit norm."""
        return _directions(sample, "LayerCosine")

    def compare(self, a: _Directions, b: _Directions) -> Tensor:
        """One elementwise product."""
        return _mean_cosine(a, b)
