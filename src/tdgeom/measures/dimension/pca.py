"""Dimension from covariance spectra: counting rules on all rows, and the participation ratio without its bias."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tdgeom.core.keys import Keys
from tdgeom.measures.dimension.estimate import Copies, DimensionEstimate, DimensionStage
from tdgeom.numerics.centring import real_rows, refuse_nonfinite, upcast, warn_undefined
from tdgeom.numerics.copies import first_alike, first_copies
from tdgeom.numerics.eigenvalues import refuse_truncated
from tdgeom.numerics.forgetting import refuse_weighted
from tdgeom.numerics.near_copies import rounding_radius

__all__ = [
    "LOCAL_PCA_RULES",
    "PCA_RULES",
    "GlobalPCA",
    "ParticipationRatio",
    "counting_rule",
    "global_pca",
    "participation_ratio",
    "pca_dimension",
    "spectrum_of",
]

PCA_RULES = ("fukunaga_olsen", "participation_ratio", "ratio", "kaiser", "broken_stick")
LOCAL_PCA_RULES = (*PCA_RULES, "maxgap")  # of a neighbourhood also


def pca_dimension(
    eigenvalues: Tensor,
    *,
    rule: str = "fukunaga_olsen",
    alpha: float = 0.05,
    share: float = 0.95,
    number: Tensor | None = None,
) -> Tensor:
    r"""How many dimensions a covariance spectrum shows: (\*B, n) eigenvalues λ, descending, to (\*B,) float64.

    - ``"fukunaga_olsen"``: the number of λ > alpha·λ₁ (alpha 0.05);
    - ``"participation_ratio"``: (Σλ)²/Σλ², the only rule that is no whole number (``d_pr`` of
      ``SpectrumMetrics``);
    - ``"ratio"``: the smallest number of leading λ that hold ``share`` of the variance (0.95;
      scikit-dimension's ``alphaRatio`` is this share, with the default 0.05);
    - ``"kaiser"``: the number of λ above their mean;
    - ``"broken_stick"``: the leading λ/Σλ that reach their expectation under a stick broken at random,
      (1/n) Σ_{j>=i} 1/j;
    - ``"maxgap"``: the number of λ before the largest quotient λ_i/λ_{i+1}, 1 to n-1 (scikit-dimension's and tdhook's of that
      name); where λ end, at their number: eigenvalues below 1e-13·λ₁ are rounding and count as 0. For neighbourhoods: over all
      rows the gap to the last noise is often the largest, and ``GlobalPCA`` does not take it.

    Eigenvalues are those of the centred covariance, clipped at 0; their unit does not matter. No variance
    gives NaN. ``number`` (\*B,): how many of the n are meant at most, zeros behind them being padding; None: all.

    Fukunaga & Olsen 1971; Kaiser 1960; Frontier 1976; Bruske & Sommer 1998 (the largest gap).

    >>> import torch
    >>> spectrum = torch.tensor([4.0, 3.0, 2.0, 0.1])
    >>> [round(float(pca_dimension(spectrum, rule=rule)), 2) for rule in LOCAL_PCA_RULES]
    [3.0, 2.85, 3.0, 2.0, 0.0, 3.0]
    """
    if rule not in LOCAL_PCA_RULES:
        raise ValueError(f"rule is one of {list(LOCAL_PCA_RULES)}, got {rule!r}.")
    if not 0 < alpha < 1 or not 0 < share <= 1:
        raise ValueError(f"alpha lies in (0, 1) and share in (0, 1], got {alpha!r} and {share!r}.")
    refuse_truncated(eigenvalues, "pca_dimension", "eigenvalues")
    values = eigenvalues.double().clamp(min=0)
    values = values / values[..., :1]  # NaN where there is no variance
    total = values.sum(-1, keepdim=True)
    if rule == "participation_ratio":
        return total.squeeze(-1).square() / values.square().sum(-1)
    n = values.shape[-1]
    size = torch.full_like(total, n) if number is None else number.clamp(max=n).unsqueeze(-1).double()
    if rule == "fukunaga_olsen":
        above = values > alpha
    elif rule == "ratio":
        # one more than the leading sums that fall short, to 1e-9 as k90 is
        short = values.cumsum(-1) / total < share - 1e-9
        above = torch.cat((torch.ones_like(short[..., :1]), short[..., :-1]), -1)
    elif rule == "kaiser":
        above = values > total / size
    elif rule == "maxgap":
        above = _before_largest_gap(values, size)
    else:
        place = torch.arange(1, n + 1, dtype=torch.float64, device=values.device)
        stick = torch.where(place <= size, 1 / place, 0.0).flip(-1).cumsum(-1).flip(-1) / size
        above = ((values / total >= stick) & (place <= size)).cumprod(-1).bool()
    return torch.where(torch.isnan(total.squeeze(-1)), torch.nan, above.sum(-1).double())


def _before_largest_gap(values: Tensor, size: Tensor) -> Tensor:
    """Which of the first ``size`` (*B, 1) of (*B, n) descending shares of λ₁ stand before the largest quotient of neighbours."""
    n = values.shape[-1]
    place = torch.arange(1, n + 1, dtype=torch.float64, device=values.device)
    resolved = torch.where((values > 1e-13) & (place <= size), values, 0.0)
    upper, lower = resolved[..., :-1], resolved[..., 1:]
    # Where the eigenvalues end within those meant, the quotient is infinite; beyond there is none.
    quotient = torch.where(
        lower > 0, upper / torch.where(lower > 0, lower, 1.0), torch.where(upper > 0, torch.inf, 0.0)
    )
    quotient = torch.where(place[1:] <= size, quotient, 0.0)
    if n == 1:
        return torch.ones_like(values, dtype=torch.bool)
    return place <= quotient.argmax(-1, keepdim=True) + 1


def counting_rule(
    rule: str, alpha: float, share: float, rules: tuple[str, ...] = PCA_RULES
) -> Callable[..., Tensor]:
    """``pca_dimension`` with these settings, refused now if they are wrong."""
    if rule not in rules:
        raise ValueError(f"rule is one of {list(rules)}, got {rule!r}.")
    count = partial(pca_dimension, rule=rule, alpha=alpha, share=share)
    count(torch.ones(1, dtype=torch.float64, device="cpu"))
    return count


def spectrum_of(rows: Tensor, kept: Tensor | None = None) -> Tensor:
    """Covariance eigenvalues (unbiased, centred) of (*B, N, D), descending: (*B, min(N, D)) in float64.

    The smaller of D x D and N x N is decomposed. ``kept`` (*B, N) leaves rows out: zeros follow where fewer are left.
    """
    rows = rows.double()
    n, width = rows.shape[-2:]
    if kept is None:
        rows, count = rows - rows.mean(-2, keepdim=True), torch.full((), n, device=rows.device)
    else:
        kept, count = kept.unsqueeze(-1), kept.sum(-1, keepdim=True)
        mean = torch.where(kept, rows, 0.0).sum(-2, keepdim=True) / count.unsqueeze(-1)
        rows = torch.where(kept, rows - mean, 0.0)
    product = rows.mT @ rows if width <= n else rows @ rows.mT
    return torch.linalg.eigvalsh(product).flip(-1).clamp(min=0) / (count - 1).clamp(min=1)


def global_pca(
    x: Tensor, *, rule: str = "fukunaga_olsen", alpha: float = 0.05, share: float = 0.95
) -> DimensionEstimate:
    r"""Linear dimension of rows (\*B, N, D) from the covariance of all of them: see ``pca_dimension`` for the rules.

    Copies are dropped first and counted. ``scale`` is the root-mean-square distance to the mean;
    ``standard_error`` is NaN (a counting rule has none). NaN with a warning where the rows do not vary.
    scikit-dimension's ``lPCA``.

    >>> import torch
    >>> sheet = torch.randn(300, 2, generator=torch.Generator().manual_seed(0)) @ torch.eye(2, 10)
    >>> float(global_pca(sheet).estimate)
    2.0
    """
    rows = upcast(real_rows(x, "GlobalPCA"))
    if x.ndim < 2 or x.shape[-2] < 2 or x.shape[-1] < 1:
        raise ValueError(f"GlobalPCA expects rows of shape (..., N, D) with N >= 2, got {tuple(x.shape)}.")
    refuse_nonfinite(rows, "GlobalPCA")
    n = x.shape[-2]
    own = torch.arange(n, device=x.device)
    kept = first_alike(rows.detach(), rounding_radius(x.dtype)) == own
    number = kept.sum(-1)
    copies = Copies(n - number, (first_copies(rows.detach()) == own).sum(-1) - number)
    rank = number - 1  # of centred rows
    return _counted(spectrum_of(rows, kept), counting_rule(rule, alpha, share), number, copies, rank)


def _counted(
    values: Tensor,
    count: Callable[..., Tensor],
    rows: Tensor,
    copies: Copies,
    number: Tensor | None = None,
) -> DimensionEstimate:
    estimate = warn_undefined(count(values, number=number), "GlobalPCA", "the rows do not vary.")
    spread = values.double().clamp(min=0).sum(-1).sqrt()
    return DimensionEstimate(estimate, torch.full_like(estimate, torch.nan), spread, rows, *copies)


def participation_ratio(count: Tensor, covariance: Tensor, norm4: Tensor) -> DimensionEstimate:
    r"""Participation ratio (tr Σ)²/tr Σ² of the *population* covariance Σ, without the bias of finite N.

    Numerator and denominator are estimated separately, each without bias, by averages over disjoint rows (the
    row estimator of Chun et al.). With the sample's N, scatter S = (N-1)·covariance, T = (tr S)², F = tr S²
    and Q = Σ|x - x̄|⁴ these averages are, up to one common factor, A and B.

    Formula:
        participation_ratio = A/B
        A = T - N Q/(N-2) + (2F - T)/((N-1)(N-2))
        B = F - N Q/(N-2) + T/((N-1)(N-2))

    No distribution is assumed: ``norm4`` carries what heavy tails do. The plain ratio T/F (``d_pr`` of
    ``SpectrumMetrics``) never exceeds N-1 and is far too small when N is not far above the dimension.

    Args:
        count: (\*B,) rows N >= 4. covariance: (\*B, D, D) unbiased. norm4: (\*B,) Σ|x - x̄|⁴: all as
            ``StreamingCovariance`` writes them.

    Returns:
        ``estimate`` (\*B,) (at least 1 for the population; the ratio of two unbiased estimates can leave the
        range on few rows); ``standard_error`` NaN (not available from these moments); ``scale`` the
        root-mean-square distance to the mean, sqrt(tr Σ); ``rows`` = count; ``duplicates`` and ``near_duplicates`` -1 (moments
        do not tell; a copy counts as a row). NaN with a warning for fewer than 4 rows, no variance, or B <= 0 (too
        few rows to tell the dimension from infinity).

    Chun, Canatar, Chung, Lee: "Estimating dimensionality of neural representations from finite samples",
    2025, arXiv 2509.26560 (its ``row`` estimator).

    >>> import torch
    >>> x = torch.randn(40, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> norm4 = (x - x.mean(0)).square().sum(-1).square().sum()
    >>> plain = torch.linalg.eigvalsh(x.T.cov())
    >>> result = participation_ratio(torch.tensor(40), x.T.cov(), norm4)
    >>> print(f"plain {plain.sum() ** 2 / (plain**2).sum():.0f}, without bias {result.estimate:.0f}, true 100")
    plain 28, without bias 103, true 100
    """
    covariance, norm4 = real_rows(covariance, "ParticipationRatio").double(), norm4.double()
    n = torch.as_tensor(count, device=covariance.device).double()
    size = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    # Divided by tr Σ first, so that no unit overflows or vanishes in the fourth power.
    unit = torch.where(size > 0, size, torch.nan)
    trace = (n - 1).square()
    frobenius = (covariance / unit[..., None, None]).square().sum((-1, -2)) * (n - 1).square()
    quartic = n * (norm4 / unit / unit) / (n - 2)
    both = (n - 1) * (n - 2)
    above = trace - quartic + (2 * frobenius - trace) / both
    below = frobenius - quartic + trace / both
    estimate = torch.where((n >= 4) & (below > 1e-12 * frobenius), above / below, torch.nan)
    warn_undefined(
        estimate,
        "ParticipationRatio",
        "it needs at least 4 rows, some variance, and enough rows to tell the dimension from infinity.",
    )
    count = torch.as_tensor(count, device=covariance.device)
    nan = torch.full_like(estimate, torch.nan)
    unknown = torch.full_like(count, -1)
    return DimensionEstimate(estimate, nan, size.sqrt(), count, unknown, unknown.clone())


class GlobalPCA(DimensionStage):
    r"""Linear dimension from the covariance of all rows, by a counting rule: see ``pca_dimension`` and ``global_pca``.

    Args:
        rule: ``"fukunaga_olsen"``, ``"participation_ratio"``, ``"ratio"``, ``"kaiser"`` or
            ``"broken_stick"``.
        alpha: share of λ₁ that an eigenvalue must exceed under ``"fukunaga_olsen"``.
        share: share of the variance to hold under ``"ratio"``.
        source: ``"sample"`` (copies dropped and counted) or ``"eigenvalues"`` (of ``EigenSpectrum``, over all
            rows: then ``duplicates`` and ``near_duplicates`` are -1, unknown). Rules count over min(N-1, D) eigenvalues from
            either; N, and ``rows``, come from ``("moments", "count")`` where that is present, else ``rows`` is -1 and rules
            count over D.
        in_keys, out_keys: default ``"sample"`` or ``"eigenvalues"`` and ``("moments", "count")``, and root ``("dimension",
            "global_pca")``.

    Writes ``estimate``, ``standard_error`` (NaN), ``scale``, ``rows``, ``duplicates``, ``near_duplicates``, each ().

    >>> import torch, tdgeom as tg
    >>> sheet = torch.randn(300, 2, generator=torch.Generator().manual_seed(0)) @ torch.eye(2, 10)
    >>> float(tg.GlobalPCA(rule="kaiser")(sample=sheet)[0])
    2.0
    """

    name = "global_pca"
    sources: ClassVar = {
        "sample": {"sample": "N D"},
        "eigenvalues": {"eigenvalues": "D", ("moments", "count"): ""},
    }
    optional: ClassVar = frozenset({"count"})

    def __init__(
        self,
        *,
        rule: str = "fukunaga_olsen",
        alpha: float = 0.05,
        share: float = 0.95,
        source: Literal["sample", "eigenvalues"] = "sample",
        in_keys: Keys = None,
        out_keys: Keys = None,
    ) -> None:
        super().__init__(source=source, in_keys=in_keys, out_keys=out_keys)
        self.rule, self.alpha, self.share = rule, alpha, share
        self.count = counting_rule(rule, alpha, share)

    def compute(self, *inputs: Any) -> DimensionEstimate:
        """The five outputs."""
        if self.source == "sample":
            return global_pca(inputs[0], rule=self.rule, alpha=self.alpha, share=self.share)
        values, count = inputs
        unknown = torch.full(values.shape[:-1], -1, dtype=torch.int64, device=values.device)
        rows, rank = (unknown, None) if count is None else (count.expand_as(unknown), count - 1)
        return _counted(values, self.count, rows.clone(), Copies(unknown, unknown.clone()), rank)


class ParticipationRatio(DimensionStage):
    r"""Participation ratio of the population covariance, corrected for finite N: see ``participation_ratio``.

    Args:
        in_keys: default ``("moments", "count")``, ``("moments", "covariance")``, ``("moments", "norm4")``, as
            ``StreamingCovariance`` writes them: over all rows, not a sample.
        out_keys: default root ``("dimension", "participation_ratio")``.

    Writes ``estimate``, ``standard_error`` (NaN), ``scale``, ``rows``, ``duplicates`` and ``near_duplicates`` (-1), each ().

    >>> import torch, tdgeom as tg
    >>> from tensordict import TensorDict
    >>> rows = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    >>> td = TensorDict({"tokens": rows})
    >>> td = tg.ParticipationRatio()(tg.StreamingCovariance()(td))
    >>> print(f"{td['dimension', 'participation_ratio', 'estimate']:.0f}")
    28
    """

    name = "participation_ratio"
    sources: ClassVar = {
        "moments": {("moments", "count"): "", ("moments", "covariance"): "D D", ("moments", "norm4"): ""}
    }

    def __init__(self, *, in_keys: Keys = None, out_keys: Keys = None) -> None:
        super().__init__(source="moments", in_keys=in_keys, out_keys=out_keys)

    def compute(self, *inputs: Tensor) -> DimensionEstimate:
        """The five outputs."""
        refuse_weighted("ParticipationRatio", inputs[2], inputs[1], "its correction for few rows")
        return participation_ratio(*inputs)
