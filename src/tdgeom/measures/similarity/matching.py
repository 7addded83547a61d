"""Matching features one to one: soft matching and permutation matching."""

from __future__ import annotations

from math import lcm

import numpy as np
import torch
from torch import Tensor

from tdgeom.core.pair_stage import PairStage
from tdgeom.measures.similarity.pair_sources import MATCHED_ROWS
from tdgeom.numerics.centring import centre, check_matched, finite_rows, warn_undefined
from tdgeom.numerics.opaque import opaque

__all__ = ["SoftMatching", "soft_matching"]

_REASON = "one side has no variance over the rows."
_ASSIGNMENT_LIMIT = 4096


def _unit_features(x: Tensor, measure: str) -> Tensor:
    """Centred features of unit norm; constant ones zero."""
    rows = centre(finite_rows(x, measure).double()).rows
    norms = torch.linalg.vector_norm(rows, dim=-2, keepdim=True)
    return rows / torch.where(norms == 0, 1, norms)


def _plan_value(correlation: np.ndarray) -> float:
    """max Σ P_ij ρ_ij over couplings of uniform weights 1/D and 1/E."""
    from scipy.optimize import linear_sum_assignment

    d, e = correlation.shape
    size = lcm(d, e)
    if size <= max(_ASSIGNMENT_LIMIT, d if d == e else 0):
        # An optimal coupling of D and E equal weights is a permutation of lcm(D, E) equal parts.
        parts = np.repeat(np.repeat(correlation, size // d, 0), size // e, 1)
        rows, columns = linear_sum_assignment(parts, maximize=True)
        return float(parts[rows, columns].mean())
    from scipy.optimize import linprog
    from scipy.sparse import eye_array, kron, vstack

    marginals = vstack([kron(eye_array(d), np.ones((1, e))), kron(np.ones((1, d)), eye_array(e))]).tocsr()
    weights = np.concatenate([np.full(d, 1 / d), np.full(e, 1 / e)])
    result = linprog(-correlation.ravel(), A_eq=marginals, b_eq=weights, method="highs")
    if result.x is None:
        raise RuntimeError(
            f"soft_matching: the transport problem of {d} x {e} features failed: {result.message}"
        )
    return -float(result.fun)


@opaque(lambda correlation: correlation.new_empty(correlation.shape[:-2]))
def _plan_values(correlation: Tensor) -> Tensor:
    """``_plan_value`` of every (D, E) of (..., D, E); NaN where a correlation is."""
    matrices = correlation.reshape(-1, *correlation.shape[-2:]).cpu().numpy()
    values = [float("nan") if np.isnan(m).any() else _plan_value(m) for m in matrices]
    found = torch.tensor(values, dtype=torch.float64, device=correlation.device)
    return found.reshape(correlation.shape[:-2])


def _compare(a: Tensor, b: Tensor) -> Tensor:
    return warn_undefined(_plan_values((a.mT @ b).detach()), "soft_matching", _REASON)


def soft_matching(x: Tensor, y: Tensor) -> Tensor:
    """Mean correlation between features under the best (soft) matching.

    Formula:
        soft_matching = max_P Σ_ij P_ij corr(x_i, y_j); x_i and y_j features, not rows

    P couples the D features of x, 1/D each, with the E features of y, 1/E each: an optimal transport. With D = E an
    optimal P is a permutation, and the value is **permutation matching** (an alias). The soft matching distance
    between features of unit norm is ``sqrt(2 - 2·value)``.

    Args:
        x: (..., N, D) rows. y: (..., N, E) the same rows on the other side.

    Returns:
        (...) float64 in [-1, 1], 1 for equal features in any order. Not differentiable. Solved as an assignment of
        lcm(D, E) parts, O(lcm³), up to 4096; beyond, where D and E differ, as a linear programme of D·E variables,
        which takes minutes at several hundred features.

    Invariances: permutations of features, offset and positive scale of any feature; not rotations, not sign. A constant
    feature has correlation 0 with all. Bias: upwards with few rows (the best of many chance correlations). NaN with
    one warning without variance.

    Khosla, Williams, McDermott & Kanwisher 2024, arXiv 2311.09466.

        >>> x = torch.randn(30, 5, dtype=torch.float64)
        >>> round(float(soft_matching(x, 3 * x[:, [4, 0, 1, 3, 2]])), 9)
        1.0
    """
    check_matched(x, y, "soft_matching")
    return _compare(_unit_features(x, "soft_matching"), _unit_features(y, "soft_matching"))


class SoftMatching(PairStage):
    """``soft_matching`` between two sites (permutation matching where they are equally wide).

    >>> x = torch.randn(30, 5)
    >>> round(float(SoftMatching()(sample_a=x, sample_b=x.flip(-1))), 6)
    1.0
    """

    reads = MATCHED_ROWS
    writes = [("between", "soft_matching")]

    def prepare(self, sample: Tensor) -> Tensor:
        """Centred features of unit norm, once a site."""
        return _unit_features(sample, "SoftMatching")

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """One product and one transport problem."""
        return _compare(a, b)
