"""TwoNN: intrinsic dimension from the ratio of the distances to the two nearest neighbours."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tdgeom.measures.dimension.estimate import (
    DimensionEstimate,
    DimensionStage,
    copies_in,
    masked_mean,
    need_columns,
)
from tdgeom.measures.neighbors.nearest_neighbors import distinct_neighbors
from tdgeom.numerics.centring import warn_undefined

__all__ = ["TwoNN", "twonn", "twonn_curve", "twonn_from_distances"]


def twonn(
    x: Tensor, *, discard: float = 0.1, method: Literal["fit", "ml"] = "fit", memory: int | None = None
) -> DimensionEstimate:
    r"""Intrinsic dimension of rows (\*B, N, D) by TwoNN: see ``twonn_from_distances``.

    Copies, exact or up to rounding, are dropped first and counted.

    >>> import torch
    >>> flat = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0)) @ torch.eye(3, 20)
    >>> print(f"{twonn(flat).estimate:.1f} in {flat.shape[1]} features")
    3.0 in 20 features
    """
    table = distinct_neighbors(x, 2, memory=memory)
    return twonn_from_distances(
        table.distance, table.duplicates, table.near_duplicates, discard=discard, method=method
    )


def twonn_from_distances(
    distances: Tensor,
    duplicates: Tensor | None = None,
    near_duplicates: Tensor | None = None,
    *,
    discard: float = 0.1,
    method: Literal["fit", "ml"] = "fit",
) -> DimensionEstimate:
    r"""Intrinsic dimension from the distances r₁ <= r₂ to the two nearest distinct rows.

    Formula:
        F(μ) = 1 - μ^(-d); ``μ = r₂/r₁``: sorted points ``(ln μ_i, -ln(1 - i/N))`` lie on a line through the origin of slope d
        twonn = -Σ ln μ_i ln(1 - i/N) / Σ (ln μ_i)²; method "fit": least squares
        twonn = (N-1) / Σ ln μ_i; method "ml"

    ``"fit"`` goes over the first min(int((1-discard)·N), N-1) points, ``"ml"`` over all (``discard`` is not used).

    Conventions: natural logarithms; ``discard=0.1`` drops the largest tenth of the ratios (as DADApy's
    ``mu_fraction=0.9`` and scikit-dimension's default); ``discard=0`` drops only the last point, where -ln(1-F) is
    infinite: that is tdhook's TwoNN.

    Args:
        distances: (\*B, N, >=2) ascending; a row of NaN (a later copy) is left out.
        duplicates, near_duplicates: (\*B,) numbers of copies, passed on; None: the number of NaN rows, and -1.

    Returns:
        ``estimate`` (\*B,) > 0, no unit; ``standard_error`` d/√N (the Fisher error; a regression's own would
        be 20 to 40 times too small, for sorted points are not independent); ``scale`` (mean r₁ + mean r₂)/2
        in the data's unit; ``rows``; ``duplicates``. NaN with a warning for fewer than 3 distinct rows or
        when every r₂ = r₁.

    Facco, d'Errico, Rodriguez, Laio: "Estimating the intrinsic dimension of datasets by a minimal
    neighborhood information", Scientific Reports 7 (2017).

    >>> import torch
    >>> r = torch.tensor([[1.0, 2.0], [1.0, 4.0], [1.0, 8.0]], dtype=torch.float64)
    >>> print(f"{twonn_from_distances(r, method='ml').estimate:.6f}")  # 2 / ln 64
    0.480898
    """
    log_ratio, valid, scale = _log_ratios(distances)
    rows = valid.sum(-1)
    n = rows.double()
    if method == "ml":
        estimate = (n - 1) / torch.where(valid, log_ratio, 0.0).sum(-1)
    elif method == "fit":
        x, y, kept = _curve(log_ratio, valid, discard)
        x, y = torch.where(kept, x, 0.0), torch.where(kept, y, 0.0)
        estimate = (x * y).sum(-1) / (x * x).sum(-1)
    else:
        raise ValueError(f"TwoNN: method is 'fit' or 'ml', got {method!r}.")
    defined = (rows >= 3) & torch.isfinite(estimate) & (estimate > 0)
    estimate = torch.where(defined, estimate, torch.nan)
    warn_undefined(
        estimate,
        "TwoNN",
        "it needs at least 3 distinct rows whose second neighbour is farther than the first.",
    )
    copies = copies_in(distances, duplicates, near_duplicates)
    return DimensionEstimate(estimate, estimate / n.sqrt(), scale, rows, *copies)


def twonn_curve(distances: Tensor, *, discard: float = 0.0) -> Tensor:
    r"""The points that TwoNN fits: (\*B, N, 2) of (ln μ, -ln(1 - F)), by ascending μ; NaN beyond the kept ones.

    On data of one dimension they lie on a line through the origin whose slope is the dimension.

    >>> import torch
    >>> twonn_curve(torch.tensor([[1.0, 1.0], [1.0, 4.0]], dtype=torch.float64))[0].tolist()
    [0.0, 0.6931471805599453]
    """
    log_ratio, valid, _ = _log_ratios(distances)
    x, y, kept = _curve(log_ratio, valid, discard)
    return torch.stack((x, y), -1).where(kept.unsqueeze(-1), torch.nan)


def _log_ratios(distances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ln(r₂/r₁) (*B, N), where it is defined, and the mean scale."""
    pair = need_columns(distances, 2, "TwoNN")
    valid = torch.isfinite(pair[..., 1]) & (pair[..., 0] > 0)
    pair = torch.where(
        valid.unsqueeze(-1), pair, 1.0
    )  # or the logarithm of NaN rows would spoil the gradient
    return (pair[..., 1] / pair[..., 0]).log(), valid, masked_mean(pair.mean(-1), valid)


def _curve(log_ratio: Tensor, valid: Tensor, discard: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted ln μ, -ln(1 - i/N) and the mask of the points kept, each (*B, N)."""
    if not 0 <= discard < 1:
        raise ValueError(f"TwoNN: discard is a share in [0, 1), got {discard!r}.")
    n = valid.sum(-1, keepdim=True).double()
    x = torch.where(valid, log_ratio, torch.inf).sort(-1).values
    i = torch.arange(1, x.shape[-1] + 1, dtype=torch.float64, device=x.device)
    kept = i <= torch.minimum(((1 - discard) * n).floor(), n - 1)
    return x, -torch.log(1 - torch.where(kept, i / n, 0.0)), kept


class TwoNN(DimensionStage):
    r"""Intrinsic dimension by TwoNN, from a sample (default) or from a neighbour table.

    The formula, conventions and errors are those of ``twonn_from_distances``. ``discard=0`` is tdhook's
    TwoNN.

    Args:
        discard: share of the largest ratios left out of the fit, in [0, 1).
        method: ``"fit"`` or ``"ml"``.
        curve: also write the points (ln μ, -ln(1-F)), (N, 2), as ``curve``.
        source, memory, in_keys, out_keys: as in ``DimensionStage``, which says what is written and refused.

    >>> import torch, tdgeom as tg
    >>> sheet = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0))
    >>> estimate, error, scale, rows, duplicates, near = tg.TwoNN()(sample=torch.cat((sheet, sheet[:100])))
    >>> f"{estimate:.1f} +- {error:.1f}, {rows} rows, {duplicates} copies dropped"
    '2.1 +- 0.1, 1000 rows, 100 copies dropped'
    """

    name = "twonn"

    def __init__(
        self,
        *,
        discard: float = 0.1,
        method: Literal["fit", "ml"] = "fit",
        curve: bool = False,
        **source_and_keys: Any,
    ) -> None:
        super().__init__(further=["curve"] if curve else [], **source_and_keys)
        if method not in ("fit", "ml"):
            raise ValueError(f"TwoNN: method is 'fit' or 'ml', got {method!r}.")
        if not 0 <= discard < 1:
            raise ValueError(f"TwoNN: discard is a share in [0, 1), got {discard!r}.")
        self.discard, self.method, self.curve = discard, method, curve

    def neighbors_needed(self, n: int) -> int:
        """Two, whatever n."""
        return 2

    def measure(self, distances: Tensor, *copies: Tensor) -> tuple[Tensor, ...]:
        """The outputs and, on request, the curve."""
        result = twonn_from_distances(distances, *copies, discard=self.discard, method=self.method)
        return (*result, twonn_curve(distances, discard=self.discard)) if self.curve else result
