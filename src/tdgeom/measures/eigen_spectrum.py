"""The spectrum of a covariance: its eigenvalues, all of them, and its leading eigenvectors."""

from __future__ import annotations

import torch
from torch import Tensor

from tdgeom.core.keys import Keys
from tdgeom.core.stage import Stage
from tdgeom.numerics.centring import holds, real_rows
from tdgeom.numerics.eigenvalues import leading_eigenpairs, symmetric_eigenvalues

__all__ = ["EigenSpectrum", "covariance_eigenvalues", "eigen_spectrum", "eigenvalue_error"]

_FINE = 2.0**-44  # entries this exact move no eigenvalue that is above the rounding floor


def eigen_spectrum(
    covariance: Tensor, k: int = 32, rank: int | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending and clipped at 0, and the first k eigenvectors as columns, of (*B, D, D).

    float64 throughout. Returns (*B, D) and (*B, D, min(k, D)); the sign of each vector is fixed (its largest-magnitude
    entry is positive). Eigenvalues beyond ``rank`` (rows less 1; an int or (*B,)) are exactly 0. A covariance that is not
    finite gives NaN.

    >>> eigen_spectrum(torch.diag(torch.tensor([1.0, 4.0])), k=1)[0]
    tensor([4., 1.], dtype=torch.float64)
    """
    k = min(k, covariance.shape[-1])
    covariance, finite = _finite(covariance)
    values, vectors = leading_eigenpairs(covariance, k)
    vectors = vectors.flip(-1)
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
    values = torch.where(finite, _zero_beyond(values.flip(-1).clamp(min=0), rank), torch.nan)
    return values, torch.where(finite[..., None], vectors, torch.nan)


def _finite(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """eigh raises on NaN: such a matrix goes in as zeros and comes out as NaN, the others of the batch as they are."""
    covariance = real_rows(covariance, "the spectrum of a covariance")
    finite = torch.isfinite(covariance).all(-1).all(-1)[..., None]
    return torch.where(finite[..., None], covariance.double(), 0.0), finite


def _zero_beyond(values: Tensor, rank: int | Tensor | None) -> Tensor:
    """What is left beyond the rank is rounding, and measures of √λ would count it."""
    if rank is None:
        return values
    if isinstance(rank, Tensor):
        rank = rank.to(values.device).unsqueeze(-1)
    return torch.where(torch.arange(values.shape[-1], device=values.device) < rank, values, 0.0)


def covariance_eigenvalues(covariance: Tensor, rank: int | Tensor | None = None) -> Tensor:
    """Eigenvalues of (*B, D, D), descending, clipped at 0, and exactly 0 beyond ``rank``; NaN where it is not finite."""
    covariance, finite = _finite(covariance)
    values = symmetric_eigenvalues(covariance).flip(-1).clamp(min=0)
    return torch.where(finite, _zero_beyond(values, rank), torch.nan)


def eigenvalue_error(covariance: Tensor, relative_error: Tensor) -> Tensor | None:
    """What the rounding of a covariance's products can have moved each eigenvalue by: (*B, D, D), (*B,) -> (*B, D), descending λ.

    Entries are off by e·√(C_ii C_jj) at most, e the ``relative_error``. Along an eigenvector v that is e·√D·Σ_j v_j² C_jj: small
    in directions that massive features have no part in. None where e is that of float64, which is below what eigenvalues resolve.

    >>> eigenvalue_error(torch.diag(torch.tensor([100.0, 1.0])), torch.tensor(1e-6))
    tensor([1.4142e-04, 1.4142e-06], dtype=torch.float64)
    """
    if not holds((relative_error > _FINE).any()):
        return None
    covariance, finite = _finite(covariance)
    _, vectors = torch.linalg.eigh(covariance)
    variance = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0)
    along = (variance.unsqueeze(-1) * vectors.flip(-1).square()).sum(-2)
    error = relative_error.double().unsqueeze(-1) * covariance.shape[-1] ** 0.5 * along
    return torch.where(finite, error, torch.nan)


class EigenSpectrum(Stage):
    """Eigenvalues of a covariance, all of them, and its leading eigenvectors.

    λ descending, clipped at 0; eigenvectors as columns with a fixed sign. The covariance is taken as it is (unbiased and
    centred when it comes from ``StreamingCovariance``).

    Reads ``("moments", "covariance")`` (*B, D, D) and where present ``("moments", "count")`` (*B,): with fewer rows than
    features the eigenvalues beyond count-1 are 0, not rounding. Which of the others are more than rounding says
    ``tdgeom.functional.numerical_rank``, and ``SpectrumMetrics`` beside its measures. Writes ``"eigenvalues"`` (*B, D) and
    ``"eigenvectors"`` (*B, D, min(k, D)), float64.

        >>> import torch, tdgeom as tg
        >>> values, vectors = tg.EigenSpectrum(k=1)(moments_covariance=torch.diag(torch.tensor([1.0, 3.0])))
        >>> values.tolist(), vectors.flatten().tolist()
        ([3.0, 1.0], [0.0, 1.0])
    """

    reads = {("moments", "covariance"): "D D", ("moments", "count"): ""}
    optional = frozenset({"count"})
    writes = ["eigenvalues", "eigenvectors"]
    one_thread_a_site = True

    def __init__(self, *, k: int = 32, in_keys: Keys = None, out_keys: Keys = None) -> None:
        if k < 1:
            raise ValueError(f"EigenSpectrum: k must be at least 1, got {k}.")
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.k = k

    def compute(self, covariance: Tensor, count: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See ``eigen_spectrum``."""
        return eigen_spectrum(covariance, self.k, None if count is None else count - 1)
