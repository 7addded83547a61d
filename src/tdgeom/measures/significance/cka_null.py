"""What linear CKA would be by chance: mean, spread and tail over permutations of rows, or over documents, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tdgeom.core.keys import Key, Keys
from tdgeom.core.pair_stage import PairStage
from tdgeom.core.warnings import FewRowsWarning, tell
from tdgeom.measures.significance.document_null import (
    FEWEST,
    DocumentSide,
    document_pairs,
    document_side,
    sign_draws,
)
from tdgeom.measures.significance.documents import sequence_of
from tdgeom.numerics.centring import centre, check_matched, finite_rows, warn_undefined
from tdgeom.numerics.forgetting import refuse_weighted
from tdgeom.numerics.products import gram, in_own_precision

__all__ = ["CKANull", "NullOfCKA", "linear_cka_null"]

_REASON = "it needs 4 exchangeable rows or more, variance on both sides and more rows than each side has dimensions."
_OF_DOCUMENTS = (
    f"it needs {FEWEST} documents or more (in effect, where some are longer), and variance on both sides."
)
_NORMAL_BELOW = 1e-3  # a skewness that no tail shows


class NullOfCKA(NamedTuple):
    """Each (...): the null's mean and standard deviation, and z-score, p-value and calibrated value of the CKA beside it."""

    null_mean: Tensor
    null_sd: Tensor
    z: Tensor
    p: Tensor
    calibrated: Tensor
    null_rows: Tensor


class _Side(NamedTuple):
    """Of the N x N matrix S of a side's inner products: tr S, tr S², tr S³ and Σ S_ii²; and the centred rows."""

    n: Tensor
    trace: Tensor
    square: Tensor
    cube: Tensor
    norm4: Tensor
    rows: Tensor | None


def _side_of_rows(x: Tensor) -> _Side:
    rows = centre(x.double()).rows
    norm2 = rows.square().sum(-1)
    product = gram(rows) if rows.shape[-1] <= rows.shape[-2] else gram(rows.mT)
    n = torch.full(norm2.shape[:-1], rows.shape[-2], dtype=torch.float64, device=rows.device)
    return _Side(n, norm2.sum(-1), *_powers(product), norm2.square().sum(-1), rows)


def _powers(product: Tensor) -> tuple[Tensor, Tensor]:
    """tr A² and tr A³ of a symmetric matrix."""
    return product.square().sum((-2, -1)), (product @ product).mul(product).sum((-2, -1))


def _permuted(a: _Side, b: _Side, value: Tensor) -> NullOfCKA:
    """The exact first two moments over all N! permutations (Kazi-Aoual et al. 1995), the third as N grows."""
    n = a.n if a.n.ndim >= b.n.ndim else b.n
    dimension = [s.trace.square() / s.square for s in (a, b)]
    mean = (dimension[0] * dimension[1]).sqrt() / (n - 1)
    spread = torch.ones_like(n)
    for s, d in zip((a, b), dimension):
        spread = spread * (n * (n + 1) * s.norm4 / s.square - (n - 1) * (d + 2))
    # 2(n-1-β)(n-1-β')/((n+1)(n-1)²(n-2)) · [1 + (n-3)/(2n(n-1)) τ τ'], the two factors of τ that may vanish multiplied out
    plain = (n - 1 - dimension[0]) * (n - 1 - dimension[1])
    variance = 2 / ((n + 1) * (n - 1).square() * (n - 2)) * (plain + spread * (n - 1) / (2 * n * (n - 3)))
    fine = (n >= 4) & (a.square > 0) & (b.square > 0) & (variance > 0)
    mean = torch.where(fine, mean, torch.nan)
    deviation = torch.where(fine, variance, torch.nan).sqrt()
    skewness = 8**0.5 * a.cube * b.cube / (a.square * b.square) ** 1.5
    z = (value - mean) / deviation
    found = mean, deviation, z, _upper_tail(z, skewness), (value - mean) / (1 - mean)
    return NullOfCKA(*found, n.expand_as(mean).clone())


def _upper_tail(z: Tensor, skewness: Tensor) -> Tensor:
    """P(Z >= z) of a standardised gamma variable (Pearson's type III) of that skewness."""
    shape = 4 / skewness.clamp(min=_NORMAL_BELOW).square()
    at = (shape + z * shape.sqrt()).clamp(min=0)
    gamma = torch.special.gammaincc(shape, at)
    return torch.where(skewness < _NORMAL_BELOW, torch.special.ndtr(-z), gamma)


def _alignment(cross: Tensor, a: _Side, b: _Side) -> Tensor:
    return cross / (a.square * b.square).sqrt()


@in_own_precision
def linear_cka_null(x: Tensor, y: Tensor, document: Tensor | None = None) -> NullOfCKA:
    """What biased linear CKA would be if rows of one side were dealt to rows of the other by chance.

    With S = XXᵀ of centred rows, β = (tr S)²/tr S² of either side and N rows, over all N! permutations

        mean = √(β β')/(N-1),   variance = 2(N-1-β)(N-1-β')/((N+1)(N-1)²(N-2)) · [1 + (N-3)/(2N(N-1)) τ τ'],
        τ = (N-1)/((N-3)(N-1-β)) · [N(N+1) Σ S_ii²/tr S² - (N-1)(β+2)],

    both exact; no permutation is drawn. ``p`` is the upper tail of the gamma distribution with these two and the skewness
    √8 tr S³ tr S'³/(tr S² tr S'²)^1.5 that they have as N grows. ``calibrated`` = (CKA - mean)/(1 - mean): 0 by chance, 1
    for identical rows.

    **With** ``document``, tokens of one are not exchangeable. What is judged is then

        T = Σ_(d≠e) M_de,   M_de = Σ_(i in d, j in e) h_ij h'_ij,

    over documents d, e, with h the inner products of rows about the mean of all other documents (``document_side``): no two
    rows of one document are compared, so that T has mean 0 for independent sides, exactly, whatever varies together inside
    documents and however long they are. ``z`` = T/√(2 Σ M_de² · G/(G-2)), G = N²/Σ n_d² the documents in effect; its tail is
    gamma's of the skewness 8 tr M³/(2 Σ M²)^1.5, both as documents grow many. ``null_mean`` is the CKA less T on its scale.

    Args:
        x: (..., N, D) rows. y: (..., N, E) the same rows on the other side.
        document: (N,) int64, which document a row is of; at least 8. Takes 8·N² bytes a few times over. Default: every row is
            a document of its own, in closed form over all permutations.

    Returns:
        ``null_mean``, ``null_sd``, ``z``, ``p``, ``calibrated`` and ``null_rows`` (the rows taken), each (...) float64. NaN with
        one warning for fewer than 4 rows (8 documents) or no variance.

    Kazi-Aoual, Hitier, Sabatier and Lebreton 1995; Josse, Pagès and Husson 2008; with documents
    Chwialkowski, Sejdinovic and Gretton 2014 (multipliers of degenerate kernel statistics).

        >>> x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
        >>> y = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
        >>> by_chance, alike = linear_cka_null(x, y), linear_cka_null(x, x + y)
        >>> round(float(by_chance.null_mean), 2), float(by_chance.p) > 0.01, float(alike.p) < 1e-6
        (0.24, True, True)
    """
    check_matched(x, y, "linear_cka_null")
    x, y = finite_rows(x, "linear_cka_null"), finite_rows(y, "linear_cka_null")
    if document is not None:
        if document.shape != (x.shape[-2],):
            raise ValueError(
                f"linear_cka_null expects document of shape ({x.shape[-2]},), one number a row, got {tuple(document.shape)}."
            )
        index, counts = _documents(document)
        sides = [document_side(side, index, counts) for side in (x, y)] if _enough(counts) else None
        return _by_document(sides, index, counts, x)[0]
    a, b = _side_of_rows(x), _side_of_rows(y)
    return _judged(a, b, _cross(a, b))


def _documents(document: Tensor) -> tuple[Tensor, Tensor]:
    _, index, counts = torch.unique(document, return_inverse=True, return_counts=True)
    return index, counts


def _in_effect(counts: Tensor) -> Tensor:
    return counts.sum().double().square() / counts.double().square().sum()


def _enough(counts: Tensor) -> bool:
    return bool(_in_effect(counts) >= FEWEST)


def _by_document(
    sides: Sequence[DocumentSide] | None,
    index: Tensor,
    counts: Tensor,
    like: Tensor,
    draws: int = 0,
    seed: int = 0,
) -> tuple[NullOfCKA, Tensor]:
    """The null over documents, and ``draws`` values of it on the scale of the CKA."""
    shape = like.shape[:-2]
    rows = torch.full(shape, float(len(index)), dtype=torch.float64, device=like.device)
    if sides is None:
        nan = torch.full_like(rows, torch.nan)
        tell(
            f"linear_cka_p: few documents, {float(_in_effect(counts)):.3g} in effect ({len(index)} rows of {len(counts)}): it "
            f"calls for {FEWEST} documents, else NaN. Give more documents (in a text file blank lines separate them).",
            FewRowsWarning,
        )
        return NullOfCKA(nan, nan, nan, nan, nan, rows), nan[..., None].expand(*shape, draws)
    a, b = sides
    pairs = document_pairs(a, b, index, len(counts))
    # two pairs that share a document share what the means have taken from it: 2/G of the variance
    documents = _in_effect(counts)
    more = documents / (documents - 2)
    squares = 2 * pairs.square().sum((-2, -1))
    deviation = (torch.where(squares > 0, squares, torch.nan) * more).sqrt()
    skewness = 8 * (pairs @ pairs).mul(pairs).sum((-2, -1)) / squares.pow(1.5)
    found = pairs.sum((-2, -1))
    value = (a.products * b.products).sum((-2, -1))
    mean, z = value - found, found / deviation
    p = _upper_tail(z, skewness)
    null = NullOfCKA(mean, deviation, z, p, (value - mean) / (1 - mean), rows)
    warn_undefined(null.null_sd, "the null of linear CKA", _OF_DOCUMENTS)
    if not draws:
        return null, mean
    return null, mean[..., None] + more.sqrt() * sign_draws(pairs, draws, seed)


def _cross(a: _Side, b: _Side) -> Tensor:
    assert a.rows is not None and b.rows is not None
    return (a.rows.mT @ b.rows).square().sum((-2, -1))


def _judged(a: _Side, b: _Side, cross: Tensor) -> NullOfCKA:
    null = _permuted(a, b, _alignment(cross, a, b))
    warn_undefined(null.null_sd, "the null of linear CKA", _REASON)
    return null


class _Rows(NamedTuple):
    rows: Tensor
    made: dict[str, DocumentSide]


class CKANull(PairStage):
    """Null mean and spread, z-score, p-value and calibrated value of linear CKA between two sites: see ``linear_cka_null``.

    Args:
        source: ``"sample"`` reads matched rows. ``"moments"`` reads the leaves of ``StreamingCrossMoments`` (``count``,
            ``covariance``, ``norm4`` of both sides, the pair's ``cross_covariance``): over all rows of the run, at the cost of
            one D x D product a site.
        by: what is exchangeable. ``"document"``: sequences (the row ids are read from ``"sample_row_id"``; without them every
            row counts as one). ``"row"``: every row, right where rows are sequences (pooled, or one position each). Moments do
            not know documents and take ``"row"`` only.
        sample_size: rows that are judged by document, the first of the (hash-ordered) sample.
        draws: values by chance that are written too, as ``"linear_cka_draws"`` (draws,): the same signs of documents for all
            pairs, so that ``joint_p_values`` judges the best of many. By document only. seed: of them.
        in_keys, out_keys: see ``Stage``.

    Writes ``("between", "linear_cka_null_mean" | "linear_cka_null_sd" | "linear_cka_z" | "linear_cka_p" |
    "linear_cka_calibrated" | "linear_cka_null_rows")``, each () and of the rows that it reads.

        >>> x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
        >>> float(CKANull()(sample_a=x, sample_b=x)[3]) < 1e-6
        True
    """

    optional = frozenset({"sample_row_id", "document_id"})
    shared = ("sample_row_id",)

    def __init__(
        self,
        *,
        source: Literal["sample", "moments"] = "sample",
        by: Literal["document", "row"] = "document",
        sample_size: int = 512,
        draws: int = 0,
        seed: int = 0,
        in_keys: Keys = None,
        out_keys: Keys = None,
    ) -> None:
        if source not in ("sample", "moments") or by not in ("document", "row"):
            raise ValueError(
                f"CKANull: source is 'sample' or 'moments', by is 'document' or 'row', got {source!r} and {by!r}."
            )
        if source == "moments" and by == "document":
            raise ValueError(
                "CKANull(source='moments') does not know which rows are of one document, and tokens of a document are not "
                "exchangeable. Where rows are documents (pooled, or one position of each) say by='row'; else take "
                "source='sample', whose row ids tell."
            )
        if draws and by == "row":
            raise ValueError(
                "CKANull: draws= are of documents; with by='row' the closed form needs none. Leave draws out."
            )
        self.source, self.by = source, by
        self.sample_size, self.draws, self.seed = sample_size, draws, seed
        reads: dict[Key, str | None]
        if source == "sample":
            reads = {("sample", "a"): "N D", ("sample", "b"): "N E"}
            reads |= (
                {"sample_row_id": "N", ("sample_carried", "document_id"): "N"} if by == "document" else {}
            )
        else:
            reads = {
                ("cross_moments", side, leaf): shape
                for side, width in (("a", "D"), ("b", "E"))
                for leaf, shape in (("count", ""), ("covariance", f"{width} {width}"), ("norm4", ""))
            }
            reads[("cross_moments", "cross_covariance")] = "D E"
        writes: list[Key] = [("between", f"linear_cka_{name}") for name in NullOfCKA._fields]
        writes += [("between", "linear_cka_draws")] if draws else []
        super().__init__(in_keys=in_keys, out_keys=out_keys, reads=reads, writes=writes)

    def prepare(self, *inputs: Tensor) -> Any:
        """The rows, with room for their products (documents are known only with the pair); or a side's traces."""
        if self.source == "sample":
            return _Rows(finite_rows(inputs[0], "CKANull"), {})
        n, covariance, norm4 = (value.double() for value in inputs)
        refuse_weighted("CKANull", norm4, covariance, "what CKA is by chance")
        scatter = covariance * (n - 1)[..., None, None]
        trace = scatter.diagonal(dim1=-2, dim2=-1).sum(-1)
        # Divided by the trace first, so that no unit overflows in the sixth power.
        unit = torch.where(trace > 0, trace, torch.nan)
        square, cube = _powers(scatter / unit[..., None, None])
        return _Side(n, torch.ones_like(unit), square, cube, norm4 / unit.square(), None), unit

    def compare(self, a: Any, b: Any, *rest: Tensor | None) -> list[Tensor]:
        """The six numbers, and the draws."""
        if self.source == "sample":
            row_id, document = (*rest, None, None)[:2]
            if document is None and row_id is not None:
                document = sequence_of(row_id)
            if document is None and not self.draws:
                return list(linear_cka_null(a.rows, b.rows))
            return self._by_document(a, b, document)
        (side_a, unit_a), (side_b, unit_b) = a, b
        assert rest[0] is not None
        cross = (rest[0].double() * (side_a.n - 1)[..., None, None]).square().sum((-2, -1)) / (
            unit_a * unit_b
        )
        return list(_judged(side_a, side_b, cross))

    def _by_document(self, a: _Rows, b: _Rows, document: Tensor | None) -> list[Tensor]:
        check_matched(a.rows, b.rows, "CKANull")
        x, y = (side.rows[..., : self.sample_size, :] for side in (a, b))
        n = x.shape[-2]
        index, counts = _documents((torch.arange(n) if document is None else document[:n]).to(x.device))
        sides = None
        if _enough(counts):
            for side, rows in ((a, x), (b, y)):
                if "side" not in side.made:  # all pairs share the rows, and so the documents
                    side.made["side"] = document_side(rows, index, counts)
            sides = [side.made["side"] for side in (a, b)]
        null, drawn = _by_document(sides, index, counts, x, self.draws, self.seed)
        return [*null, *([drawn] if self.draws else [])]
