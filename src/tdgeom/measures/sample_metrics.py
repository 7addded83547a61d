"""Measures of a uniform sample of rows: its spectrum, cosines between rows, row norms."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.core.stage import Stage
from tdgeom.core.warnings import tell_few_rows
from tdgeom.measures.eigen_spectrum import covariance_eigenvalues
from tdgeom.measures.spectrum_metrics import entropy_dimension
from tdgeom.numerics.centring import holds, real_rows, refuse_nonfinite, upcast, warn_undefined
from tdgeom.numerics.hashing import fingerprint
from tdgeom.numerics.numerical_rank import above_rounding, numerical_rank
from tdgeom.numerics.products import gram, in_own_precision
from tdgeom.numerics.quantiles import quantiles

__all__ = [
    "PRODUCTS",
    "SAMPLE_METRICS",
    "SampleMetrics",
    "SampleSpectrum",
    "SampleStage",
    "cosine_similarity",
    "sample_eigenvalues",
    "sample_metrics",
]

SAMPLE_METRICS = (
    "sv_effective_rank", "sv_stable_rank", "sv_participation_ratio", "cos_sim_mean", "cos_sim_std",
    "ve_4", "ve_8", "ve_16", "ve_32",
    "norm_mean", "norm_q05", "norm_q50", "norm_q95", "norm_max", "top_feature_share",
    "sv_numerical_rank", "sv_few_rows",
)  # fmt: skip
PRODUCTS: dict[Key, str] = {
    "sample_eigenvalues": "E", "sample_covariance": "E E", "sample_unit_covariance": "E E", "sample_fingerprint": "",
}  # fmt: skip
"""What ``SampleSpectrum`` writes, and its shapes; E may be another sample's D."""
_MOMENTS: dict[str, str] = {"count": "", "mean": "F", "covariance": "F F", "relative_error": ""}
_ROUNDING = 1e-10  # of a variance: more than float64 sums of the same rows differ by


def working(rows: Tensor) -> Tensor:
    """Rows in float32 or float64: half precision becomes float32, integers float64."""
    return upcast(real_rows(rows, "a measure of a sample"))


def covariance_of(rows: Tensor) -> Tensor:
    """Unbiased covariance (*B, D, D) in float64, of rows scaled so that no product under- or overflows."""
    y, scale = _unit_scale(centred(rows))
    return gram(y) * (scale.square() / (rows.shape[-2] - 1))


def centred(rows: Tensor) -> Tensor:
    """Rows about their mean (*B, N, D), in float64; a constant feature is exactly 0."""
    rows = working(rows)
    varies = rows.detach().amin(-2, keepdim=True) != rows.detach().amax(-2, keepdim=True)
    y = rows.double()
    y = y - y.mean(-2, keepdim=True)
    if rows.dtype == torch.float64:  # the mean of float32 rows is right to more digits than they have
        y = y - y.mean(-2, keepdim=True)
    return torch.where(varies, y, 0.0)


def _unit_scale(y: Tensor) -> tuple[Tensor, Tensor]:
    """Rows whose largest magnitude is 1, so that no square of theirs under- or overflows, and what it was."""
    scale = torch.maximum(y.amax((-2, -1), keepdim=True), -y.amin((-2, -1), keepdim=True))
    scale = torch.where(scale > 0, scale, 1)
    return y / scale, scale


@in_own_precision
def sample_eigenvalues(sample: Tensor) -> Tensor:
    """Eigenvalues of the sample's covariance, descending, clipped at 0: (*B, N, D) -> (*B, D) in float64.

    At most N-1 are not zero.

    >>> sample_eigenvalues(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
    tensor([2., 0.], dtype=torch.float64)
    """
    return covariance_eigenvalues(covariance_of(sample), rank=sample.shape[-2] - 1)


def unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows at unit L2 norm (*B, N, D), rows of zeros stay zero; and which have a direction, bool (*B, N)."""
    # The largest magnitude is divided out first, so that the squares of rows of any scale are numbers.
    scale = torch.maximum(rows.amax(-1, keepdim=True), -rows.amin(-1, keepdim=True)).detach()
    rows = rows / torch.where(scale > 0, scale, 1)
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / torch.where(norm > 0, norm, 1), norm[..., 0] > 0


@in_own_precision
def cosine_similarity(sample: Tensor, unit_covariance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of the cosine over ordered pairs of different rows, uncentred.

    (*B, N, D) -> two (*B,), in [-1, 1] and >= 0. Both follow from the mean of the unit rows and the D x D products of
    what is left, so no N x N matrix is made; where N < D the Gram matrix of rows is the smaller one. Rows of zeros have
    no direction and are left out. The unbiased covariance of the unit rows may be given, (*B, D, D).

    >>> mean, std = cosine_similarity(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]]))
    >>> round(float(mean), 4), round(float(std), 4)
    (-0.3333, 0.5164)
    """
    unit, directed = unit_rows(working(sample).double())
    n = directed.sum(-1).double()
    # With u = m + e, a cosine is |m|² plus a_i + a_j + e_i·e_j, a = m·e: small where rows are nearly parallel, so that
    # the spread is not the difference of two large sums. m is the mean to rounding; rest is what that leaves.
    m = (unit.sum(-2) / n.unsqueeze(-1)).unsqueeze(-2)
    e = (unit - m) * directed.unsqueeze(-1)
    a = (e @ m.mT)[..., 0]
    rest = e.sum(-2)
    own = 2 * a + e.square().sum(-1)
    a_sum, turned = a.sum(-1), (a.unsqueeze(-2) @ e)[..., 0, :]
    first = 2 * n * a_sum + rest.square().sum(-1) - own.sum(-1)
    second = 2 * n * a.square().sum(-1) + 2 * a_sum.square() + 4 * (turned * rest).sum(-1)
    second = second + _products_squared(e, rest, directed, unit_covariance) - own.square().sum(-1)
    pairs = n * (n - 1)
    mean = first / pairs
    variance = (second - pairs * mean.square()) / (pairs - 1)
    return m.square().sum((-2, -1)) + mean, variance.clamp(min=0).sqrt()


def _products_squared(e: Tensor, rest: Tensor, directed: Tensor, covariance: Tensor | None) -> Tensor:
    """Σ_ij (e_i·e_j)² = ||EᵀE||²_F, from the covariance where that is of these very rows."""
    rows = e.shape[-2]
    if covariance is not None and holds(directed.all()):
        # EᵀE is taken about m, the covariance about the mean: they differ by rest·restᵀ/N.
        products = covariance.double() * (rows - 1)
        turned = (products @ rest.unsqueeze(-1))[..., 0]
        off_centre = 2 / rows * (rest * turned).sum(-1) + (rest.square().sum(-1) / rows).square()
        return products.square().sum((-2, -1)) + off_centre
    products = gram(e) if rows > e.shape[-1] else gram(e.mT)
    return products.square().sum((-2, -1))


def _variances(sample: Tensor) -> Tensor:
    """(*B, D) variance of each feature, up to one common factor."""
    return _unit_scale(centred(sample))[0].square().sum(-2)


@in_own_precision
def sample_metrics(
    sample: Tensor,
    eigenvalues: Tensor | None = None,
    covariance: Tensor | None = None,
    unit_covariance: Tensor | None = None,
) -> dict[str, Tensor]:
    """Every measure of ``SampleMetrics`` by name: (*B, N, D) -> (*B,) each.

    What ``SampleSpectrum`` writes may be given and is then not computed again.

    >>> round(float(sample_metrics(torch.eye(3))["sv_stable_rank"]), 6)
    2.0
    """
    values = sample_eigenvalues(sample) if eigenvalues is None else eigenvalues.double()
    values = torch.where(above_rounding(values) | values.isnan(), values, 0.0)
    p = values / values.sum(-1, keepdim=True)
    mean, std = cosine_similarity(sample, unit_covariance)
    norms = _norms(sample)
    low, middle, high = quantiles(norms, (0.05, 0.5, 0.95))
    spread = _variances(sample) if covariance is None else covariance.diagonal(dim1=-2, dim2=-1).double()
    return {
        "sv_effective_rank": entropy_dimension(values.sqrt()),
        "sv_stable_rank": 1 / p[..., 0],
        "sv_participation_ratio": 1 / p.square().sum(-1),
        "cos_sim_mean": mean,
        "cos_sim_std": std,
        **{f"ve_{k}": p[..., :k].sum(-1) for k in (4, 8, 16, 32)},
        "norm_mean": norms.mean(-1),
        "norm_q05": low,
        "norm_q50": middle,
        "norm_q95": high,
        "norm_max": norms.amax(-1),
        "top_feature_share": spread.amax(-1) / spread.sum(-1),
        "sv_numerical_rank": numerical_rank(values),
        "sv_few_rows": sample.shape[-2] < 10 / p.square().sum(-1),
    }


def _norms(sample: Tensor) -> Tensor:
    """(*B, N) in float64; the largest magnitude is divided out first, so that rows of any scale have one."""
    rows = working(sample)
    size = torch.maximum(rows.amax(-1), -rows.amin(-1)).detach().double()
    used = torch.where(size > 0, size, 1)
    return (
        torch.linalg.vector_norm(rows / used.to(rows.dtype).unsqueeze(-1), dim=-1, dtype=torch.float64) * used
    )


class SampleStage(Stage):
    """A stage on a sample of two rows or more, which uses what ``SampleSpectrum`` wrote of these very rows."""

    def checked(self, sample: Tensor) -> Tensor:
        """The sample, of two finite rows or more."""
        if sample.shape[-2] < 2:
            raise ValueError(
                f"{type(self).__name__} needs at least 2 rows, got {self.in_keys[0]!r} of shape {tuple(sample.shape)}. Give "
                f"the run more data, or a larger RowSample(size=)."
            )
        if sample.is_floating_point():
            refuse_nonfinite(sample, f"{type(self).__name__}")
        return sample

    @staticmethod
    def products_of(sample: Tensor, products: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """``PRODUCTS`` but the fingerprint, or None for each where the fingerprint is missing or of other rows."""
        unknown: list[Tensor | None] = [None] * (len(PRODUCTS) - 1)
        *known, of = products or (*unknown, None)
        same = of is not None and of.shape == sample.shape[:-2] and holds((of == fingerprint(sample)).all())
        return known if same else unknown


class SampleSpectrum(SampleStage):
    """What several stages need of one sample, computed once: its covariance, that of its unit rows, its eigenvalues.

    Reads ``"sample"`` (*B, N, D); writes, unbiased, centred and in float64, ``"sample_eigenvalues"`` (*B, D) descending,
    ``"sample_covariance"`` (*B, D, D), and ``"sample_unit_covariance"`` (*B, D, D) of the rows at unit L2 norm; and
    ``"sample_fingerprint"`` (*B,), by which ``SampleMetrics``, ``NormalizationAblation`` and ``LinearCKA`` know that these are
    of the sample they read. Of another sample they use none of it, and compute their own. Where the moments and eigenvalues of
    the stream are there, in float64, and the sample is all rows of it (as many, of the same means and variances of features
    and of sums of them), the first two are those.

        >>> import torch, tdgeom as tg
        >>> values, covariance, *_ = tg.SampleSpectrum()(sample=torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
        >>> values.tolist(), covariance.tolist()
        ([2.0, 0.0], [[2.0, 0.0], [0.0, 0.0]])
    """

    reads = {
        "sample": "N D",
        "eigenvalues": "F",
        **{("moments", name): shape for name, shape in _MOMENTS.items()},
    }
    optional = frozenset({"eigenvalues", *_MOMENTS})
    writes = list(PRODUCTS)
    one_thread_a_site = True

    def compute(
        self, sample: Tensor, eigenvalues: Tensor | None = None, *moments: Tensor | None
    ) -> tuple[Tensor, ...]:
        """See ``sample_eigenvalues``."""
        covariance = _of_all_rows(self.checked(sample), *moments)
        if covariance is None:
            covariance, eigenvalues = covariance_of(sample), None
        if eigenvalues is None or eigenvalues.shape != covariance.shape[:-1]:
            eigenvalues = covariance_eigenvalues(covariance, rank=sample.shape[-2] - 1)
        unit = covariance_of(unit_rows(working(sample).double())[0])
        return eigenvalues.double(), covariance, unit, fingerprint(sample)


def _of_all_rows(
    sample: Tensor,
    count: Tensor | None = None,
    mean: Tensor | None = None,
    covariance: Tensor | None = None,
    relative_error: Tensor | None = None,
) -> Tensor | None:
    """The stream's covariance (*B, D, D), where the sample is all of its rows: as many, alike in every mean and variance, also
    along directions across features (each feature in an order of its own has the means and variances, and another covariance).
    """
    if count is None or mean is None or covariance is None or relative_error is None:
        return None
    n, like = sample.shape[-2], (*sample.shape[:-2], sample.shape[-1])
    if mean.shape != like or not holds((count == n).all() & (relative_error <= _ROUNDING).all()):
        return None
    rows = working(sample).double()
    variance = covariance.double().diagonal(dim1=-2, dim2=-1)
    own = rows.mean(-2)
    spread = (rows - own.unsqueeze(-2)).square().sum(-2) / (n - 1)
    apart = torch.maximum((own - mean).square(), (spread - variance).abs()) > _ROUNDING * variance
    varies = sample.detach().amin(-2) != sample.detach().amax(-2)
    # Signs by the binary digits of a feature's number, and all alike.
    places = torch.arange(sample.shape[-1], device=sample.device)
    digits = (
        places.unsqueeze(-1) >> torch.arange(int(sample.shape[-1]).bit_length() + 1, device=sample.device)
    ) & 1
    across = (1 - 2 * digits.double()) / torch.where(
        varies & (variance > 0), variance, torch.inf
    ).sqrt().unsqueeze(-1)
    along = ((rows - own.unsqueeze(-2)) @ across).square().sum(-2) / (n - 1)
    told = ((covariance.double() @ across) * across).sum(-2)
    turned = (along - told).abs() > 1e-8 * sample.shape[-1]
    if not holds(~((apart & varies).any() | turned.any())):
        return None
    return torch.where(varies.unsqueeze(-1) & varies.unsqueeze(-2), covariance.double(), 0.0)


class SampleMetrics(SampleStage):
    """Spectrum, cosine and norm measures of a uniform sample of rows.

    Formula:
        sv_effective_rank = exp(-Σ q ln q); ``q = s/Σs``, s the singular values of the *centred* sample
        sv_stable_rank = Σs²/s₁²
        sv_participation_ratio = (Σs²)²/Σs⁴
        ve_4 = Σ_{i<=4} s_i² / Σs²; the share of variance in the first components; ``ve_8``, ``ve_16``, ``ve_32`` likewise
        cos_sim_mean = mean_{i≠j} ⟨x_i, x_j⟩/(|x_i| |x_j|); *uncentred*; ``cos_sim_std`` is unbiased
        top_feature_share = max_j C_jj / tr C; C the covariance

    The first three are ``effective_rank``, ``stable_rank`` and ``d_pr`` of the sample. Beyond these: row norms
    (``norm_mean``, quantiles ``norm_q05``, ``norm_q50``, ``norm_q95``, ``norm_max``); a ``top_feature_share`` near 1 means
    massive activations. ``sv_numerical_rank``: eigenvalues that are more than rounding, the others count as 0;
    ``sv_few_rows``: there are fewer rows than 10·sv_participation_ratio, which say more of the sample than of what it was
    drawn from. Products are float64; rows of any dtype, scale and offset count as float64 rows of the same numbers do.

    Reads ``"sample"`` (*B, N, D), and where present what ``SampleSpectrum`` wrote of the same rows; writes
    ``("sample_metrics", name)`` (*B,). Raises ValueError below 2 rows and for NaN or Inf; identical rows give NaN with one
    ``UndefinedMeasureWarning``, few rows a ``FewRowsWarning``.

        >>> import torch, tdgeom as tg
        >>> from tensordict import TensorDict
        >>> td = tg.SampleMetrics()(TensorDict(sample=torch.eye(3)))
        >>> round(float(td["sample_metrics", "cos_sim_mean"]), 3)
        0.0
    """

    reads = {"sample": "N D", **PRODUCTS}
    optional = frozenset(map(str, PRODUCTS))
    writes = [("sample_metrics", name) for name in SAMPLE_METRICS]
    one_thread_a_site = True

    def compute(self, sample: Tensor, *products: Tensor | None) -> Mapping[str, Tensor]:
        """See ``sample_metrics``."""
        metrics = sample_metrics(self.checked(sample), *self.products_of(sample, products))
        reason = f"all rows of {self.in_keys[0]!r} are the same."
        warn_undefined(metrics["sv_stable_rank"], "SampleMetrics (what is spectral)", reason)
        if holds(metrics["sv_few_rows"].any()):
            called = "10 for each of sv_participation_ratio's dimensions"
            tell_few_rows(
                "SampleMetrics",
                "sv_participation_ratio and its kin",
                sample.shape[-2],
                called,
                "Give a larger sample",
            )
        return metrics
