"""How sure the alignment of two populations is of which only some features and some rows were recorded."""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tdgeom.core.keys import Keys
from tdgeom.core.pair_stage import PairStage
from tdgeom.core.warnings import FewRowsWarning, tell
from tdgeom.measures.similarity.hsic import hsic1
from tdgeom.measures.similarity.pair_sources import MATCHED_ROWS
from tdgeom.measures.similarity.sampled_features import linear_cka_sampled
from tdgeom.numerics.centring import centre, check_matched, finite_rows, warn_undefined
from tdgeom.numerics.products import in_own_precision

__all__ = ["SampledCKA", "SampledValue", "linear_cka_sampled_error"]

_REASON = "without some groups features share no variance with others: more rows or features are needed."
_GROUPS, _FEWEST = 10, 5
_SHARE_OF_SECOND, _HIGHEST_ORDER = 0.5, 4


class SampledValue(NamedTuple):
    """Each (...): the alignment of the populations, and its standard error."""

    value: Tensor
    standard_error: Tensor


class _Groups(NamedTuple):
    """Rows about their mean, what each group of rows adds to the products, and which group a feature is of."""

    rows: tuple[Tensor, Tensor]  # (..., N, D) and (..., N, E)
    products: tuple[Tensor, Tensor, Tensor]  # (R, ..., D, E), (R, ..., D, D), (R, ..., E, E)
    of_row: Tensor  # (N,)
    of_feature: tuple[Tensor, Tensor]  # (D, F) and (E, F), 1 in one column each


@in_own_precision
def linear_cka_sampled_error(
    x: Tensor, y: Tensor, document: Tensor | None = None, *, seed: int = 0
) -> SampledValue:
    r"""Linear CKA of the populations that rows and features are random samples of, with its standard error.

    The value is that of ``linear_cka_sampled``. Rows (whole documents), features of x and features of y are dealt to 10 groups
    each and left out by groups. A variance that comes from r of these draws at once (a feature of x with a document: r = 2)
    is in the jackknife's variance

        J₁ = Σ (G-1)/G Σ_g (θ₋g - mean)²        over the three kinds of groups

    r times, and in that of two groups left out at once, J₂ (of two kinds: second differences θ₋gh; of one kind: Efron and
    Stein's Q = Gθ - (G-1)(θ₋g + θ₋h) + (G-2)θ₋gh), r(r-1)/2 times. Near CKA = 1 what single draws add cancels between numerator
    and denominators, so that such parts are most of the variance and J₁ is twice too large. The error is

        standard_error² = J₁ - J₂/2,

    in which parts of one and of four draws count once, of two and three 1.5 times; at least J₁/4. The interval is
    value ± t·standard_error, t of 19 degrees of freedom (``error_interval(value, standard_error, 19)``, ``tg.intervals``).

    Args:
        x: (..., N, D) rows, D features drawn at random from many. y: (..., N, E) the same rows on the other side, features drawn
            independently of those of x.
        document: (N,) int64, which document a row is of. Default: every row by itself.
        seed: of the dealing.

    Returns:
        ``value`` and ``standard_error``, (...) float64. The error is NaN with one warning below 5 documents or 5 features a side.
        Takes 10·8·(D+E)² bytes. Where all units of a layer are at hand they are the population: take ``linear_cka_debiased``
        with ``errors=True``.

    Efron and Stein 1981, Ann. Stat. 9; Owen 2007, Ann. Appl. Stat. 1 (crossed draws); Chun, Canatar, Chung and Lee 2025,
    arXiv 2502.15104 (the value). Coverage of the intervals: docs/errors.md.

        >>> g = torch.Generator().manual_seed(0)
        >>> z = torch.randn(500, 10, generator=g)
        >>> x, y = z @ torch.randn(10, 64, generator=g), z @ torch.randn(10, 64, generator=g)  # one population, other features
        >>> found = linear_cka_sampled_error(x, y)
        >>> bool((found.value - 1).abs() < 2.1 * found.standard_error), round(float(found.standard_error), 2)
        (True, 0.05)
    """
    check_matched(x, y, "linear_cka_sampled_error")
    n = x.shape[-2]
    if document is None:
        document = torch.arange(n, device=x.device)
    if document.shape != (n,):
        raise ValueError(
            f"linear_cka_sampled_error expects document of shape ({n},), one number a row, got {tuple(document.shape)}."
        )
    value = linear_cka_sampled(x, y)
    _, document = torch.unique(document, return_inverse=True)
    documents = int(document.max()) + 1 if n else 0
    if min(documents, x.shape[-1], y.shape[-1]) < _FEWEST:
        tell(
            f"linear_cka_sampled_error: no standard error of {documents} document(s) and {x.shape[-1]} and {y.shape[-1]} "
            f"features, NaN: it needs {_FEWEST} of each. Give more documents, or more features.",
            FewRowsWarning,
        )
        return SampledValue(value, torch.full_like(value, torch.nan))
    generator = np.random.default_rng(seed)
    of_row = _dealt(documents, generator).to(x.device)[document.to(x.device)]
    of_feature = [_dealt(side.shape[-1], generator).to(x.device) for side in (x, y)]
    rows = [centre(finite_rows(side, "linear_cka_sampled_error").double()).rows for side in (x, y)]
    variance = _variance(_grouped(rows[0], rows[1], of_row, of_feature[0], of_feature[1]))
    return SampledValue(
        value, warn_undefined(variance.sqrt(), "linear_cka_sampled's standard error", _REASON)
    )


def _dealt(number: int, generator: np.random.Generator) -> Tensor:
    """(number,) a group each, groups of equal size as near as may be."""
    return torch.from_numpy(generator.permutation(number) % min(_GROUPS, number))


def _grouped(x: Tensor, y: Tensor, of_row: Tensor, of_x: Tensor, of_y: Tensor) -> _Groups:
    parts = [(x[..., at, :], y[..., at, :]) for g in range(int(of_row.max()) + 1) for at in [of_row == g]]
    stacked = tuple(
        torch.stack([a.mT @ b for a, b in pairs])
        for pairs in (parts, [(a, a) for a, _ in parts], [(b, b) for _, b in parts])
    )
    hot = [torch.nn.functional.one_hot(one).double() for one in (of_x, of_y)]
    return _Groups((x, y), (stacked[0], stacked[1], stacked[2]), of_row, (hot[0], hot[1]))


def _tables(groups: _Groups, left_out: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """n(n-3) HSIC₁ between every two groups of features, of x and y, x and x, y and y, without some groups of rows: (..., F, F).

    Of a feature with itself only in the first.
    """
    kept = torch.ones_like(groups.of_row, dtype=torch.bool)
    for left in left_out:
        kept &= groups.of_row != left
    n = int(kept.sum())
    sides = []
    for rows, hot in zip(groups.rows, groups.of_feature):
        some = rows[..., kept, :]
        mean = some.mean(-2, keepdim=True)
        squares = (some - mean).square()
        norm2 = squares @ hot
        sides.append((mean, squares, norm2, norm2.sum(-2)))
    a, b = sides
    found = []
    for product, (p, q, f, g) in zip(
        groups.products,
        (
            (a, b, groups.of_feature[0], groups.of_feature[1]),
            (a, a, groups.of_feature[0], groups.of_feature[0]),
            (b, b, groups.of_feature[1], groups.of_feature[1]),
        ),
    ):
        whole = product.sum(0) - sum(product[left] for left in left_out) - n * p[0].mT * q[0]
        off, shared = f.mT @ whole.square() @ g, p[2].mT @ q[2]
        traces = p[3].unsqueeze(-1) * q[3].unsqueeze(-2)
        if p is q:
            own2 = torch.diag_embed(p[1].sum(-2).square() @ f)
            own4 = torch.diag_embed(p[1].square().sum(-2) @ f)
            off, shared, traces = off - own2, shared - own4, traces - own2
        found.append(hsic1(off - shared, shared, traces, torch.ones_like(traces), n))
    return found[0], found[1], found[2]


def _values(
    tables: tuple[Tensor, Tensor, Tensor], kept: tuple[Tensor, Tensor], sizes: tuple[Tensor, Tensor]
) -> Tensor:
    """(..., S, S'): the alignment with some groups of features kept on each side, S and S' choices (S, F) of 0 and 1."""
    left, right = kept
    count = [one @ size for one, size in zip(kept, sizes)]
    between = left @ tables[0] @ right.mT / (count[0].unsqueeze(-1) * count[1])
    own = [((one @ table) * one).sum(-1) / (c * (c - 1)) for one, table, c in zip(kept, tables[1:], count)]
    below = own[0].unsqueeze(-1) * own[1].unsqueeze(-2)
    fine = (own[0] > 0).unsqueeze(-1) & (own[1] > 0).unsqueeze(-2)
    return torch.where(fine, between / below.abs().sqrt(), torch.nan)


def _variance(groups: _Groups) -> Tensor:
    """J₁ - J₂/2, at least J₁/4: (...)."""
    sizes = (groups.of_feature[0].sum(0), groups.of_feature[1].sum(0))
    whole, each, two = zip(*(_left_out(size) for size in sizes))
    (w, v), (e, d), (t, u) = whole, each, two
    r = len(groups.products[0])
    tables = _tables(groups, ())

    def at(left: Tensor, right: Tensor) -> Tensor:
        return _values(tables, (left, right), sizes)

    theta = at(w, v)[..., 0, 0]
    without_x, without_y, both = at(e, v)[..., 0], at(w, d)[..., 0, :], at(e, d)
    by_rows = [
        _values(_tables(groups, (g,)), (torch.cat((w, e)), torch.cat((v, d))), sizes) for g in range(r)
    ]
    rows = torch.stack(by_rows, -3)  # (..., R, 1+F, 1+F')
    without_rows = rows[..., 0, 0]
    pairs = [_values(_tables(groups, pair), (w, v), sizes)[..., 0, 0] for pair in combinations(range(r), 2)]
    first = _single(without_rows) + _single(without_x) + _single(without_y)
    second = _crossed(both) + _crossed(rows[..., 1:, 0]) + _crossed(rows[..., 0, 1:])
    for one, twice in (
        (without_x, at(t, v)[..., 0]),
        (without_y, at(w, u)[..., 0, :]),
        (without_rows, torch.stack(pairs, -1)),
    ):
        second = second + _of_one_kind(theta, one, twice)
    return torch.maximum(first - _SHARE_OF_SECOND * second, first / _HIGHEST_ORDER)


def _left_out(size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Choices of groups: all, all but each, all but each two."""
    number = len(size)
    each = 1 - torch.eye(number, dtype=torch.float64, device=size.device)
    pairs = list(combinations(range(number), 2))
    two = torch.stack([each[i] * each[j] for i, j in pairs])
    return torch.ones_like(each[:1]), each, two


def _single(values: Tensor) -> Tensor:
    """The jackknife's variance of (..., G)."""
    groups = values.shape[-1]
    return (values - values.mean(-1, keepdim=True)).square().sum(-1) * (groups - 1) / groups


def _crossed(values: Tensor) -> Tensor:
    """What two kinds of draws add together, of (..., G, H) with one group of each left out."""
    g, h = values.shape[-2:]
    apart = values - values.mean(-1, keepdim=True) - values.mean(-2, keepdim=True)
    apart = apart + values.mean((-2, -1), keepdim=True)
    return apart.square().sum((-2, -1)) * (g - 1) * (h - 1) / (g * h)


def _of_one_kind(theta: Tensor, each: Tensor, two: Tensor) -> Tensor:
    """What two draws of a kind add together, of (..., G) with one group left out and (..., G(G-1)/2) with two."""
    g = each.shape[-1]
    i, j = torch.tensor(list(combinations(range(g), 2)), device=each.device).T
    q = g * theta.unsqueeze(-1) - (g - 1) * (each[..., i] + each[..., j]) + (g - 2) * two
    return (q - q.mean(-1, keepdim=True)).square().sum(-1) * ((g - 3) / (g * (g - 1))) ** 2


class SampledCKA(PairStage):
    """Linear CKA of two populations of which rows and features are random samples, with its error: ``linear_cka_sampled_error``.

    For features that stand for a larger population (neurons recorded in an animal, a random choice of units). Where all units of
    a layer are at hand they are the population: ``LinearCKA(estimator="debiased")``.

    Args:
        seed: of the dealing to groups.
        in_keys, out_keys: matched rows of both sides; their ids and where present ``("sample_carried", "document_id")`` tell
            documents (without them every row is one).

    Writes ``("between", "linear_cka_sampled")`` and ``("between", "linear_cka_sampled_se")``, each (): ``tg.intervals`` makes
    intervals of them.

        >>> import tdgeom as tg
        >>> z = torch.randn(500, 10, generator=torch.Generator().manual_seed(0))
        >>> mix = torch.randn(10, 128, generator=torch.Generator().manual_seed(1))
        >>> value, error = tg.SampledCKA()(sample_a=z @ mix[:, :64], sample_b=z @ mix[:, 64:])
        >>> round(float(value), 1)
        1.0
    """

    reads = {**MATCHED_ROWS, "sample_row_id": "N", ("sample_carried", "document_id"): "N"}
    writes = [("between", "linear_cka_sampled"), ("between", "linear_cka_sampled_se")]
    optional = frozenset({"sample_row_id", "document_id"})
    shared = ("sample_row_id",)

    def __init__(self, *, seed: int = 0, in_keys: Keys = None, out_keys: Keys = None) -> None:
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.seed = seed

    def prepare(self, sample: Tensor) -> Tensor:
        """The rows: what is left out of one side is left out of the other."""
        return sample

    def compare(
        self, a: Tensor, b: Tensor, row_id: Tensor | None = None, document: Tensor | None = None
    ) -> SampledValue:
        """See ``linear_cka_sampled_error``."""
        if document is None and row_id is not None:
            document = row_id >> 20
        return linear_cka_sampled_error(a, b, document, seed=self.seed)
