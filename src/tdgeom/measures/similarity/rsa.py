"""Representational similarity analysis: do two sites call the same rows alike?"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tdgeom.core.pair_stage import PairStage
from tdgeom.measures.similarity.pair_sources import MATCHED_ROWS
from tdgeom.measures.similarity.row_distances import condensed, distances, squared_distances
from tdgeom.numerics.centring import centre, check_matched, finite_rows, warn_undefined
from tdgeom.numerics.opaque import opaque

__all__ = ["RSA", "rdm", "rsa"]

Kind = Literal["correlation", "euclidean", "cosine"]
Comparison = Literal["spearman", "pearson", "kendall_a"]
_REASON = "all dissimilarities of one side are equal, there are fewer than 3 rows, or a row has no direction."


def rdm(x: Tensor, kind: Kind = "correlation") -> Tensor:
    """Representational dissimilarity matrix in condensed form: (..., N, D) -> (..., N(N-1)/2), float64.

    Pairs in the order (0, 1), (0, 2), ..., as SciPy's ``pdist``. ``correlation``: 1 - Pearson correlation between two
    rows over their features (columns are not centred first); ``cosine``: 1 - cosine; ``euclidean``: distance.

        >>> rdm(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), "euclidean")
        tensor([5.], dtype=torch.float64)
    """
    _check(kind, get_args(Kind), "rdm: kind")
    x = finite_rows(x, "rdm").double()
    if kind == "euclidean":
        rows, scale = centre(x)
        found = distances(condensed(squared_distances(rows))) * scale[..., None]
        return torch.where(scale[..., None] == 0, 0.0, found)
    x = x / x.abs().amax(-1, keepdim=True)  # a row of any magnitude has a norm; a zero row becomes NaN
    if kind == "correlation":
        low, high = x.aminmax(dim=-1, keepdim=True)
        x = torch.where(low == high, 0, x - x.mean(-1, keepdim=True))
    x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return 1 - condensed(x @ x.mT)


def _check(given: str, known: tuple[str, ...], what: str) -> None:
    if given not in known:
        raise ValueError(f"{what} is one of {list(known)}, got {given!r}.")


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1 along the last dimension, ties sharing their mean rank."""
    ordered, order = values.sort(-1)
    place = torch.arange(values.shape[-1], dtype=torch.float64, device=values.device).expand_as(ordered)
    differs = ordered[..., 1:] != ordered[..., :-1]
    begins, ends = (torch.nn.functional.pad(differs, sides, value=True) for sides in ((1, 0), (0, 1)))
    first = torch.where(begins, place, 0).cummax(-1).values
    last = torch.where(ends, place, torch.inf).flip(-1).cummin(-1).values.flip(-1)
    return torch.zeros_like(first).scatter(-1, order, (first + last) / 2 + 1)


def _unit(values: Tensor) -> Tensor:
    centred = values - values.mean(-1, keepdim=True)
    equal = values.amax(-1, keepdim=True) == values.amin(-1, keepdim=True)
    centred = torch.where(equal, 0, centred)
    return centred / torch.linalg.vector_norm(centred, dim=-1, keepdim=True)


@opaque(lambda a, b: a.new_empty(torch.broadcast_shapes(a.shape, b.shape)[:-1]))
def _kendall_a(a: Tensor, b: Tensor) -> Tensor:
    """(concordant - discordant)/all pairs of pairs, from SciPy's O(m log m) tau-b, whose denominator leaves out ties."""
    from scipy.stats import kendalltau

    a, b = torch.broadcast_tensors(a, b)
    m = a.shape[-1]
    total = m * (m - 1) / 2
    values = []
    for x, y in zip(a.reshape(-1, m), b.reshape(-1, m)):
        untied = [total - float((c * (c - 1) / 2).sum()) for c in (_counts(x), _counts(y))]
        if untied[0] == 0 or untied[1] == 0 or x.isnan().any() or y.isnan().any():
            values.append(float("nan"))
            continue
        tau_b = kendalltau(x.cpu().numpy(), y.cpu().numpy()).statistic
        values.append(tau_b * (untied[0] * untied[1]) ** 0.5 / total)
    return torch.tensor(values, dtype=torch.float64, device=a.device).reshape(a.shape[:-1])


def _counts(values: Tensor) -> Tensor:
    return torch.unique(values, return_counts=True)[1].double()


def _prepare(x: Tensor, kind: Kind, comparison: Comparison) -> Tensor:
    _check(comparison, get_args(Comparison), "rsa: comparison")
    values = rdm(x, kind)
    if values.shape[-1] < 2:
        return values.new_full((*values.shape[:-1], 1), torch.nan)
    if comparison == "kendall_a":
        return values
    if comparison == "spearman":
        undefined = values.isnan().any(-1, keepdim=True)
        values = torch.where(undefined, torch.nan, _ranks(values.detach()))
    return _unit(values)


def _compare(a: Tensor, b: Tensor, comparison: str) -> Tensor:
    value = _kendall_a(a.detach(), b.detach()) if comparison == "kendall_a" else (a * b).sum(-1).clamp(-1, 1)
    return warn_undefined(value, "rsa", _REASON)


def rsa(x: Tensor, y: Tensor, kind: Kind = "correlation", comparison: Comparison = "spearman") -> Tensor:
    """Correlation between the two sites' dissimilarities of all pairs of rows.

    Args:
        x: (..., N, D) rows. y: (..., N, E) the same rows on the other side. kind: see ``rdm``.
        comparison: ``spearman`` (rank correlation, ties share their mean rank), ``pearson``, or ``kendall_a``
            (concordant minus discordant over all pairs of pairs: ties count as neither).

    Returns:
        (...) float64 in [-1, 1]; 1 for identical rows (``kendall_a``: less, where there are ties). Memory:
        N(N-1)/2 numbers a side.

    Invariances: isotropic scale; orthogonal maps for ``euclidean`` and ``cosine``; offsets of all rows for ``euclidean``;
    offset and scale of each row for ``correlation`` (rotations mix features with their mean: not). Not invertible
    linear maps. Bias: none for independent sites, though pairs sharing a row are not independent samples. NaN with
    one warning when all dissimilarities of a side are equal.

    Kriegeskorte, Mur & Bandettini 2008; Nili et al. 2014 (kendall_a).

        >>> x = torch.randn(10, 5, dtype=torch.float64)
        >>> round(float(rsa(x, 2 * x)), 9)
        1.0
    """
    check_matched(x, y, "rsa")
    return _compare(_prepare(x, kind, comparison), _prepare(y, kind, comparison), comparison)


class RSA(PairStage):
    """``rsa`` between two sites. For two kinds in one pipeline give one of them another ``out_keys`` root.

    Args:
        kind, comparison: see ``rsa``.
        in_keys, out_keys: see ``Stage``.

        >>> x = torch.randn(10, 5)
        >>> round(float(RSA(kind="euclidean")(sample_a=x, sample_b=-x)), 6)
        1.0
    """

    reads = MATCHED_ROWS
    writes = [("between", "rsa")]

    def __init__(
        self, *, kind: Kind = "correlation", comparison: Comparison = "spearman", **keys: Any
    ) -> None:
        _check(kind, get_args(Kind), "RSA: kind")
        _check(comparison, get_args(Comparison), "RSA: comparison")
        super().__init__(**keys)
        self.kind, self.comparison = kind, comparison

    def prepare(self, sample: Tensor) -> Tensor:
        """The condensed dissimilarities (their ranks, for Spearman), once a site."""
        return _prepare(sample, self.kind, self.comparison)

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """One dot product (or Kendall's count)."""
        return _compare(a, b, self.comparison)
