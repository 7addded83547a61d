"""Representational similarity analysis: do two sites call the same rows alike?"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tdgeom.core.keys import Keys
from tdgeom.core.pair_stage import PairStage
from tdgeom.measures.similarity.pair_sources import MATCHED_ROWS
from tdgeom.measures.similarity.row_distances import condensed, distances, squared_distances
from tdgeom.measures.similarity.row_pairs import MEMORY, Block, RowPairs, pair_sums, sampled_pairs
from tdgeom.numerics.centring import centre, check_matched, finite_rows, warn_undefined
from tdgeom.numerics.differentiation import is_differentiated
from tdgeom.numerics.opaque import opaque

__all__ = ["RSA", "rdm", "rsa"]

Kind = Literal["correlation", "euclidean", "cosine"]
Comparison = Literal["spearman", "pearson", "kendall_a"]
_TIE = 1e-12  # of a dissimilarity: what float64 products round it by is less
_AT_ONCE = 2**20  # numbers
_WORK = {"spearman": 40, "kendall_a": 96}  # bytes a pair that ranking both sides takes at most
_SHARE = 8  # of ``memory`` that one side's dissimilarities may take, where they are kept for many pairs
_REASON = "all dissimilarities of one side are equal, there are fewer than 3 rows, or a row has no direction."


def rdm(x: Tensor, kind: Kind = "correlation") -> Tensor:
    """Representational dissimilarity matrix in condensed form: (..., N, D) -> (..., N(N-1)/2), float64.

    Pairs in the order (0, 1), (0, 2), ..., as SciPy's ``pdist``. ``correlation``: 1 - Pearson correlation between two
    rows over their features (columns are not centred first); ``cosine``: 1 - cosine; ``euclidean``: distance, right to 1e-13
    of itself however near two rows are (the others are half the square of one between unit vectors, right to 1e-15). Equal
    rows are at 0.

        >>> rdm(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), "euclidean")
        tensor([5.], dtype=torch.float64)
    """
    _check(kind, get_args(Kind), "rdm: kind")
    x = finite_rows(x, "rdm")
    return _differentiable(x.double(), kind) if is_differentiated(x) else _dissimilarities(x.double(), kind)


def _check(given: str, known: tuple[str, ...], what: str) -> None:
    if given not in known:
        raise ValueError(f"{what} is one of {list(known)}, got {given!r}.")


def _differentiable(x: Tensor, kind: str) -> Tensor:
    if kind == "euclidean":
        rows, scale = centre(x)
        found = distances(condensed(squared_distances(rows))) * scale[..., None]
        return torch.where(scale[..., None] == 0, 0.0, found)
    rows = _directions(x, kind)
    return 1 - condensed(rows @ rows.mT)


def _directions(x: Tensor, kind: str) -> Tensor:
    """Rows of unit length (less their own mean, for correlation); NaN for one without a direction."""
    x = x / x.abs().amax(-1, keepdim=True)  # a row of any magnitude has a norm; a zero row becomes NaN
    if kind == "correlation":
        low, high = x.aminmax(dim=-1, keepdim=True)
        x = torch.where(low == high, 0, x - x.mean(-1, keepdim=True))
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def _empty_vectors(x: Tensor, kind: str, count: int = 0, *others: Any) -> Tensor:
    return x.new_empty((*x.shape[:-2], count or x.shape[-2] * (x.shape[-2] - 1) // 2))


@opaque(_empty_vectors)
def _dissimilarities(x: Tensor, kind: str) -> Tensor:
    """``rdm`` of float64 rows."""
    return _stacked([_condensed(one, kind) for one in x.reshape(-1, *x.shape[-2:])], x)


def _condensed(x: Tensor, kind: str) -> Tensor:
    pairs, scale = _row_pairs(x, kind)
    return _of_squares(pairs.condensed(), kind, scale)


def _stacked(vectors: list[Tensor], x: Tensor) -> Tensor:
    """(..., M) of the data sets of ``x``; one vector is not copied."""
    if not vectors:
        return x.new_empty((*x.shape[:-2], x.shape[-2] * (x.shape[-2] - 1) // 2))
    whole = vectors[0] if len(vectors) == 1 else torch.stack(vectors)
    return whole.reshape(*x.shape[:-2], whole.shape[-1])


def _row_pairs(x: Tensor, kind: str) -> tuple[RowPairs, Tensor]:
    """Rows (N, D) of one data set whose squared distances are its dissimilarities, but for ``_of_squares``."""
    if kind == "euclidean":
        rows, scale = centre(x)
        unit = (
            torch.where(scale > 0, scale, 1).log2().floor().exp2()
        )  # dividing by a power of two loses no digit
        return RowPairs(torch.nan_to_num(rows * (scale / unit)), x / unit), unit
    rows = _directions(x, kind)
    undefined = rows.isnan().any(-1)
    rows = torch.where(undefined[:, None], 0, rows)
    return RowPairs(rows, rows, undefined), x.new_ones(())


def _of_squares(squares: Tensor, kind: str, scale: Tensor) -> Tensor:
    """Dissimilarities, in place: of directions u and v, 1 - u·v = |u - v|²/2, below 1e-30 equal but for rounding."""
    if kind == "euclidean":
        return squares.sqrt_().mul_(scale)
    return squares.div_(2).masked_fill_(squares < 1e-30, 0)


def _rank_(values: Tensor) -> Tensor:
    """(M,) ranks from 1, ties (to ``_TIE``) sharing their mean rank, in place of the values; NaN where any is."""
    if bool(values.isnan().any()):
        return values.fill_(torch.nan)
    # NumPy's argsort makes no sorted copy
    order = torch.from_numpy(values.numpy().argsort()) if values.device.type == "cpu" else values.argsort()
    m = len(values)
    begins = torch.ones(m, dtype=torch.bool, device=values.device)
    for s in range(1, m, _AT_ONCE):
        ordered = values[order[s - 1 : s + _AT_ONCE]]
        begins[s : s + _AT_ONCE] = ordered.diff() > _TIE * ordered[1:].abs()
    s = 0
    while s < m:  # piece by piece, each of whole runs of ties
        end = min(s + _AT_ONCE, m)
        if end < m:
            further = int(begins.view(torch.uint8)[end:].argmax())
            end = end + further if bool(begins[end + further]) else m
        start = begins[s:end].nonzero().squeeze(-1)
        mean = start.double()
        mean[:-1] += start[1:]
        mean[-1] += end - s
        values[order[s:end]] = mean.add_(1).div_(2).add_(s)[begins[s:end].cumsum(0) - 1]
        s = end
    return values


def _unit_(ranks: Tensor) -> Tensor:
    """(M,) about their mean and of unit length, in place; NaN where they are equal."""
    if bool(ranks.amin() == ranks.amax()):
        return ranks.fill_(torch.nan)
    ranks.sub_(ranks.mean())
    return ranks.div_(torch.linalg.vector_norm(ranks))


def _unit(values: Tensor) -> Tensor:
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    equal = high - low <= _TIE * torch.maximum(high.abs(), low.abs())
    centred = torch.where(equal, 0, values - values.mean(-1, keepdim=True))
    return centred / torch.linalg.vector_norm(centred, dim=-1, keepdim=True)


@opaque(_empty_vectors)
def _rank_vectors(x: Tensor, kind: str, count: int, seed: int, unit: bool) -> Tensor:
    """(..., M) ranks of the dissimilarities of all pairs of rows, or of ``count`` of them; of unit length, or as they are."""
    vectors = []
    for one in x.reshape(-1, *x.shape[-2:]):
        ranks = _rank_(_some(one, kind, count, seed) if count else _condensed(one, kind))
        vectors.append(_unit_(ranks) if unit else ranks)
    return _stacked(vectors, x)


@opaque(lambda a, b: a.new_empty(torch.broadcast_shapes(a.shape, b.shape)[:-1]))
def _kendall_a(a: Tensor, b: Tensor) -> Tensor:
    """(concordant - discordant)/all pairs of pairs, of ranks, from SciPy's O(m log m) tau-b, which leaves out ties below."""
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


class _Rows(NamedTuple):
    """Rows (..., N, D) in float64 whose dissimilarities are made block by block."""

    rows: Tensor


class _Settings(NamedTuple):
    kind: Kind
    comparison: Comparison
    pairs_sample: int | None
    seed: int
    memory: int


def _settings(
    kind: Kind, comparison: Comparison, pairs_sample: int | None, seed: int, memory: int, owner: str
) -> _Settings:
    _check(kind, get_args(Kind), f"{owner}: kind")
    _check(comparison, get_args(Comparison), f"{owner}: comparison")
    if pairs_sample is not None and (isinstance(pairs_sample, bool) or pairs_sample < 3):
        raise ValueError(
            f"{owner}: pairs_sample counts pairs of rows, 3 or more, or is None, got {pairs_sample!r}."
        )
    return _Settings(kind, comparison, pairs_sample, seed, memory)


def _prepare(x: Tensor, asked: _Settings) -> Tensor | _Rows:
    """Dissimilarities or their ranks (..., M), of unit length but for Kendall; rows where memory does not hold these."""
    rows = finite_rows(x, "rsa").double()
    n, lead = x.shape[-2], max(1, x.shape[:-2].numel())
    m = n * (n - 1) // 2
    if m < 2:
        return rows.new_full((*x.shape[:-2], 1), torch.nan)
    count = 0 if asked.pairs_sample is None or asked.pairs_sample >= m else asked.pairs_sample
    needed, pearson = (count or m) * lead, asked.comparison == "pearson"
    if pearson and not count and 8 * needed > asked.memory // _SHARE and not is_differentiated(x):
        return _Rows(rows)
    work = 0 if pearson else _WORK[asked.comparison]
    if work * needed > asked.memory:
        fits = int((2 * asked.memory / work / lead) ** 0.5)
        raise ValueError(
            f"rsa: the ranks of {needed:,} pairs of N = {n:,} rows (shape {tuple(x.shape)}) take about "
            f"{work * needed / 2**30:.3g} GiB, more than memory={asked.memory:,} bytes ({asked.memory / 2**30:.3g} GiB) allows. "
            f"Compare sampled pairs (pairs_sample=1_000_000, the same on both sides by seed=), take comparison='pearson' (any "
            f"number of rows), at most {fits:,} rows, or more memory=."
        )
    if pearson:
        return _unit(_sampled(rows, asked.kind, count, asked.seed) if count else rdm(x, asked.kind))
    return _rank_vectors(rows.detach(), asked.kind, count, asked.seed, asked.comparison == "spearman")


@opaque(_empty_vectors)
def _sampled(x: Tensor, kind: str, count: int, seed: int) -> Tensor:
    """(..., count) dissimilarities of pairs of rows, the same pairs for every data set of as many rows."""
    return _stacked([_some(one, kind, count, seed) for one in x.detach().reshape(-1, *x.shape[-2:])], x)


def _some(x: Tensor, kind: str, count: int, seed: int) -> Tensor:
    pairs, scale = _row_pairs(x, kind)
    return _of_squares(pairs.between(*sampled_pairs(len(x), count, seed, x.device)), kind, scale)


@opaque(lambda x, y, kind: x.new_empty(torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])))
def _pearson_by_blocks(x: Tensor, y: Tensor, kind: str) -> Tensor:
    """Pearson's correlation of all dissimilarities, none kept."""
    lead = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    x, y = (side.expand(*lead, *side.shape[-2:]).reshape(-1, *side.shape[-2:]) for side in (x, y))
    values = [_pearson(_row_pairs(a, kind)[0], _row_pairs(b, kind)[0], kind) for a, b in zip(x, y)]
    return torch.stack(values).reshape(lead) if values else x.new_empty(lead)


def _pearson(a: RowPairs, b: RowPairs, kind: str) -> Tensor:
    n = len(a)
    m = n * (n - 1)
    one = a.rows.new_ones(())  # the unit does not matter to a correlation

    def block(pairs: RowPairs) -> Block:
        return lambda i, j: _of_squares(pairs.squares(i, j), kind, one)

    sums = pair_sums(block(a), block(b), n, diagonal=False)
    first, second = sums.rows_a.sum(), sums.rows_b.sum()
    covariance = sums.ab - first * second / m
    spreads = [sums.aa - first**2 / m, sums.bb - second**2 / m]
    means = [sums.shift_a + first / m, sums.shift_b + second / m]
    varies = [spread / m > (_TIE * mean) ** 2 for spread, mean in zip(spreads, means)]
    value = covariance / (spreads[0].sqrt() * spreads[1].sqrt())
    return torch.where(varies[0] & varies[1], value, torch.nan)


def _compare(a: Tensor | _Rows, b: Tensor | _Rows, asked: _Settings) -> Tensor:
    if isinstance(a, _Rows) and isinstance(b, _Rows):
        value = _pearson_by_blocks(a.rows, b.rows, asked.kind).clamp(-1, 1)
    else:
        p, q = (_unit(rdm(side.rows, asked.kind)) if isinstance(side, _Rows) else side for side in (a, b))
        value = (
            _kendall_a(p.detach(), q.detach())
            if asked.comparison == "kendall_a"
            else torch.linalg.vecdot(p, q).clamp(-1, 1)
        )
    return warn_undefined(value, "rsa", _REASON)


def rsa(
    x: Tensor,
    y: Tensor,
    kind: Kind = "correlation",
    comparison: Comparison = "spearman",
    *,
    pairs_sample: int | None = None,
    seed: int = 0,
    memory: int = MEMORY,
) -> Tensor:
    """Correlation between the two sites' dissimilarities of all pairs of rows.

    Formula:
        rsa = corr_{i<j}(d(x_i, x_j), d(y_i, y_j)); of ranks under ``spearman``
        d(x_i, x_j) = 1 - corr(x_i, x_j); kind ``correlation``; ``|x_i - x_j|`` under ``euclidean``

    Args:
        x: (..., N, D) rows. y: (..., N, E) the same rows on the other side. kind: see ``rdm``.
        comparison: ``spearman`` (rank correlation, ties share their mean rank), ``pearson``, or ``kendall_a``
            (concordant minus discordant over all pairs of pairs: ties count as neither). Dissimilarities that agree to 1e-12
            of themselves are tied.
        pairs_sample: compare so many pairs of rows, drawn without repetition by ``seed`` and the same on both sides, instead of
            all N(N-1)/2: an unbiased sample of them, with an error of at least 1/√pairs_sample (pairs share rows). Without
            gradients.
        memory: bytes that may be taken beside float64 copies of the rows. ``pearson`` goes block by block where a condensed
            matrix would take more than an eighth of it.

    Returns:
        (...) float64 in [-1, 1]; 1 for identical rows (``kendall_a``: less, where there are ties).

    Raises:
        ValueError: ranks of all pairs that take more than ``memory``: from 10,000 rows at 2 GiB (``kendall_a``: 6,600).

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
    asked = _settings(kind, comparison, pairs_sample, seed, memory, "rsa")
    return _compare(_prepare(x, asked), _prepare(y, asked), asked)


class RSA(PairStage):
    """``rsa`` between two sites. For two kinds in one pipeline give one of them another ``out_keys`` root.

    Args:
        kind, comparison, pairs_sample, seed, memory: see ``rsa``.
        in_keys, out_keys: see ``Stage``.

        >>> x = torch.randn(10, 5)
        >>> round(float(RSA(kind="euclidean")(sample_a=x, sample_b=-x)), 6)
        1.0
    """

    reads = MATCHED_ROWS
    writes = [("between", "rsa")]

    def __init__(
        self,
        *,
        kind: Kind = "correlation",
        comparison: Comparison = "spearman",
        pairs_sample: int | None = None,
        seed: int = 0,
        memory: int = MEMORY,
        in_keys: Keys = None,
        out_keys: Keys = None,
    ) -> None:
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        _settings(kind, comparison, pairs_sample, seed, memory, "RSA")
        self.kind, self.comparison = kind, comparison
        self.pairs_sample, self.seed, self.memory = pairs_sample, seed, memory

    def _asked(self) -> _Settings:
        return _Settings(self.kind, self.comparison, self.pairs_sample, self.seed, self.memory)

    def prepare(self, sample: Tensor) -> Tensor | _Rows:
        """The condensed dissimilarities (their ranks, for Spearman and Kendall) or the rows, once a site."""
        return _prepare(sample, self._asked())

    def reordered(self, side: Tensor | _Rows, order: Tensor) -> Tensor | _Rows | None:
        """A prepared side, its rows in another order (N,) int64; None where it must be prepared anew."""
        n = len(order)
        if isinstance(side, _Rows):
            return _Rows(side.rows[..., order, :])
        if side.shape[-1] != n * (n - 1) // 2:  # of drawn pairs, which are others then
            return None
        ends = order[torch.triu_indices(n, n, 1, device=order.device)]
        first, second = ends.amin(0), ends.amax(0)
        return side[..., first * n - first * (first + 3) // 2 + second - 1]

    def compare(self, a: Tensor | _Rows, b: Tensor | _Rows) -> Tensor:
        """One dot product (or Kendall's count), at once or block by block."""
        return _compare(a, b, self._asked())
