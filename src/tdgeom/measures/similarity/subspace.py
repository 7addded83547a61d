"""How far principal subspaces turn, and how far rows turn, from one site to the next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tdgeom.core.keys import Keys
from tdgeom.core.pair_stage import PairStage, check_spread
from tdgeom.core.warnings import FewRowsWarning, tell
from tdgeom.numerics.centring import as_rows, check_matched, occurs, warn_undefined
from tdgeom.numerics.numerical_rank import numerical_rank

__all__ = ["LayerCosine", "SubspaceNovelty", "feature_subspace_novelty", "layer_cosine_sim"]


def feature_subspace_novelty(u: Tensor, v: Tensor) -> Tensor:
    """Mean sine of the principal angles between two subspaces.

    Formula:
        feature_subspace_novelty = mean_i √(1 - σ_i²); σ the singular values of ``UᵀV``

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
    value = _mean_sine(u, v, torch.full((), u.shape[-1], device=u.device))
    return warn_undefined(value, "feature_subspace_novelty", "one side's vectors are not finite.")


def _mean_sine(u: Tensor, v: Tensor, k: Tensor) -> Tensor:
    """Mean sine between the spans of the first k columns, k (...); NaN where k is 0 or a vector is not finite."""
    kept = torch.arange(u.shape[-1], device=u.device) < k[..., None, None]
    u, v = torch.where(kept, u, 0.0), torch.where(kept, v, 0.0)
    outside = v - u @ (u.mT @ v)
    # LAPACK raises on NaN: such a pair goes in as zeros and comes out as NaN.
    undefined = ~torch.isfinite(outside).all(-1).all(-1) | (k == 0)
    sines = torch.linalg.svdvals(torch.where(undefined[..., None, None], 0.0, outside)).clamp(max=1)
    return torch.where(undefined, torch.nan, sines.sum(-1) / k)


class _Leading(NamedTuple):
    vectors: Tensor  # (..., D, k)
    rank: Tensor  # (...) how many of them are directions of the rows


class SubspaceNovelty(PairStage):
    """``feature_subspace_novelty`` between the leading eigenvectors of two sites, as many as both have.

    mean_i √(1 - σ_i²), σ the singular values of UᵀV: the mean sine of the angles between the two subspaces, in [0, 1]. With k as
    large as the number of features both are the whole space, and it is 0 whatever the sites are: take k well below.

    Args:
        k: how many leading directions at most. ``k_used`` is the smaller of this, the columns there are and the numerical rank
            of either side: eigenvectors beyond it are any vectors of the space in which the rows do not vary. Fewer than k (and
            the features) come with one ``FewRowsWarning``.
        in_keys, out_keys: see ``Stage``. Default: ``("eigenvectors", side)`` (D, k) of EigenSpectrum, and where present
            ``("eigenvalues", side)`` (D,), without which every column counts as a direction.

    Writes ``("between", "feature_subspace_novelty" | "k_used")``, each (). NaN with one warning where a side has no direction.

        >>> SubspaceNovelty(k=2)(eigenvectors_a=torch.eye(4), eigenvectors_b=torch.eye(4))
        (tensor(0., dtype=torch.float64), tensor(2))
    """

    reads = {
        ("eigenvectors", "a"): "D k",
        ("eigenvectors", "b"): "D l",
        ("eigenvalues", "a"): "D",
        ("eigenvalues", "b"): "D",
    }
    writes = [("between", "feature_subspace_novelty"), ("between", "k_used")]

    def __init__(self, *, k: int = 32, in_keys: Keys = None, out_keys: Keys = None) -> None:
        if k < 1:
            raise ValueError(f"SubspaceNovelty: k counts directions, expected 1 or more, got {k}.")
        optional = [("eigenvalues", "a"), ("eigenvalues", "b")]
        super().__init__(in_keys=in_keys, out_keys=out_keys, optional=optional)
        self.k = k

    def prepare(self, vectors: Tensor, values: Tensor | None = None) -> _Leading:
        """The first k columns, and how many of them are directions of the rows."""
        vectors = vectors[..., : self.k].double()
        rank = torch.full(vectors.shape[:-2], vectors.shape[-1], device=vectors.device)
        return _Leading(
            vectors, rank if values is None else torch.minimum(rank, numerical_rank(values).clamp(min=0))
        )

    def compare(self, a: _Leading, b: _Leading) -> tuple[Tensor, Tensor]:
        """One (k, k) product and one singular value decomposition of (D, k)."""
        columns = min(a.vectors.shape[-1], b.vectors.shape[-1])
        k = torch.minimum(a.rank, b.rank).clamp(max=columns)
        value = _mean_sine(a.vectors[..., :columns], b.vectors[..., :columns], k)
        if occurs((k > 0) & (k < columns)):
            tell(
                f"SubspaceNovelty: few directions, {int(k.min())} of the k={columns} asked for: the rows of one side vary in no "
                f"more, and novelty is over these (k_used). Give more rows, or take a smaller k.",
                FewRowsWarning,
            )
        reason = "one side's vectors are not finite, or its rows do not vary."
        return warn_undefined(value, "feature_subspace_novelty", reason), k


def layer_cosine_sim(x: Tensor, y: Tensor) -> Tensor:
    """Mean cosine between matched rows, uncentred.

    Formula:
        layer_cosine_sim = mean_i ⟨x_i, y_i⟩/(|x_i| |y_i|)

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
    unknown = occurs(torch.isnan(a.rows).any() | torch.isnan(b.rows).any())
    reason = "the rows hold values that are not finite." if unknown else "every row is zero on one side."
    return warn_undefined(value, "layer_cosine_sim", reason)


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
