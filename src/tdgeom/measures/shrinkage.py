"""Covariances shrunk towards a sphere, from streamed moments: better than the sample's where rows are few for their features."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tdgeom.core.keys import Keys
from tdgeom.core.stage import Stage
from tdgeom.numerics.centring import real_rows, warn_undefined
from tdgeom.numerics.forgetting import refuse_weighted

__all__ = ["Shrunk", "ShrunkCovariance", "ledoit_wolf", "oracle_approximating"]

_REASON = "it needs 2 rows or more and some variance."


class Shrunk(NamedTuple):
    """The covariance (*B, D, D), and the share of the sphere in it (*B,), in [0, 1]."""

    covariance: Tensor
    shrinkage: Tensor


def ledoit_wolf(count: Tensor, covariance: Tensor, norm4: Tensor) -> Shrunk:
    r"""Ledoit and Wolf's shrunk covariance (1-s)·S + s·(tr S/D)·I, the nearest to the truth that moments of the rows can tell.

    With S = Σ u uᵀ/N of centred rows u, s = min(1, β²/δ²) where δ² = ||S - (tr S/D)I||²_F and β² = (Σ|u|⁴/N - ||S||²_F)/N, the
    variance of S itself: no rows are needed beyond what ``StreamingCovariance`` sums.

    Args:
        count: (\*B,) rows N. covariance: (\*B, D, D) unbiased. norm4: (\*B,) Σ|x - x̄|⁴.

    Returns:
        ``covariance``, on the scale of 1/N as S is, and ``shrinkage``. NaN with one warning where there is no variance.

    Ledoit and Wolf 2004, J. Multivariate Analysis 88. Equal to ``sklearn.covariance.LedoitWolf`` of the rows.

        >>> x = torch.randn(30, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> norm4 = (x - x.mean(0)).square().sum(-1).square().sum()
        >>> round(float(ledoit_wolf(torch.tensor(30), x.T.cov(), norm4).shrinkage), 2)
        0.82
    """
    n, sample = _sample(count, covariance, "ledoit_wolf")
    mean, apart = _from_sphere(sample)
    own = (norm4.double() / n - sample.square().sum((-2, -1))) / n
    return _mixed(sample, mean, torch.where(apart > 0, (own.clamp(min=0) / apart).clamp(max=1), 0.0), n)


def oracle_approximating(count: Tensor, covariance: Tensor) -> Shrunk:
    r"""The oracle approximating shrinkage (OAS) of a covariance, for Gaussian rows: as ``ledoit_wolf``, with

    s = min(1, (||S||²_F/D² + (tr S/D)²)/((N+1)(||S||²_F/D² - (tr S)²/D³))), the form that scikit-learn has.

    Args:
        count: (\*B,) rows N. covariance: (\*B, D, D) unbiased.

    Chen, Wiesel, Eldar and Hero 2010, IEEE Trans. Signal Process. 58. Equal to ``sklearn.covariance.OAS`` of the rows.

        >>> float(oracle_approximating(torch.tensor(10), torch.eye(3, dtype=torch.float64)).shrinkage)
        1.0
    """
    n, sample = _sample(count, covariance, "oracle_approximating")
    width = sample.shape[-1]
    mean, _ = _from_sphere(sample)
    square = sample.square().mean((-2, -1))
    above, below = square + mean.square(), (n + 1) * (square - mean.square() / width)
    return _mixed(sample, mean, torch.where(below > 1e-14 * square, above / below, 1.0).clamp(max=1), n)


def _sample(count: Tensor, covariance: Tensor, measure: str) -> tuple[Tensor, Tensor]:
    covariance = real_rows(covariance, measure).double()
    if covariance.ndim < 2 or covariance.shape[-1] != covariance.shape[-2]:
        raise ValueError(f"{measure} expects a covariance (..., D, D), got {tuple(covariance.shape)}.")
    n = torch.as_tensor(count, device=covariance.device).double()
    return n, covariance * ((n - 1) / n)[..., None, None]


def _from_sphere(sample: Tensor) -> tuple[Tensor, Tensor]:
    """tr S/D, and the squared distance of S from that times the identity."""
    mean = sample.diagonal(dim1=-2, dim2=-1).mean(-1)
    sphere = torch.diag_embed(mean.unsqueeze(-1).expand(sample.shape[:-1]))
    return mean, (sample - sphere).square().sum((-2, -1))


def _mixed(sample: Tensor, mean: Tensor, shrinkage: Tensor, n: Tensor) -> Shrunk:
    shrinkage = torch.where((n >= 2) & (mean > 0), shrinkage, torch.nan)
    warn_undefined(shrinkage, "the shrunk covariance", _REASON)
    part = shrinkage[..., None, None]
    sphere = torch.diag_embed(mean.unsqueeze(-1).expand(sample.shape[:-1]))
    return Shrunk((1 - part) * sample + part * sphere, shrinkage)


class ShrunkCovariance(Stage):
    """A covariance shrunk towards a sphere, from the moments of all rows: see ``ledoit_wolf`` and ``oracle_approximating``.

    Args:
        rule: ``"ledoit_wolf"`` (any distribution) or ``"oas"`` (Gaussian rows; better there when rows are very few).
        in_keys: default ``("moments", "count")``, ``("moments", "covariance")`` and ``("moments", "norm4")``.
        out_keys: default ``("shrunk", "covariance")`` (D, D) and ``("shrunk", "shrinkage")`` (). For the spectrum of it:
            ``EigenSpectrum(in_keys=[("shrunk", "covariance")], out_keys=[...])``.

        >>> import tdgeom as tg
        >>> from tensordict import TensorDict
        >>> rows = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
        >>> td = tg.ShrunkCovariance()(tg.StreamingCovariance()(TensorDict({"tokens": rows})))
        >>> td["shrunk", "covariance"].shape
        torch.Size([30, 30])
    """

    reads = {("moments", "count"): "", ("moments", "covariance"): "D D", ("moments", "norm4"): ""}
    writes = [("shrunk", "covariance"), ("shrunk", "shrinkage")]

    def __init__(
        self,
        *,
        rule: Literal["ledoit_wolf", "oas"] = "ledoit_wolf",
        in_keys: Keys = None,
        out_keys: Keys = None,
    ) -> None:
        if rule not in ("ledoit_wolf", "oas"):
            raise ValueError(f"ShrunkCovariance: rule is 'ledoit_wolf' or 'oas', got {rule!r}.")
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.rule = rule

    def compute(self, count: Tensor, covariance: Tensor, norm4: Tensor) -> Shrunk:
        """By the rule."""
        refuse_weighted("ShrunkCovariance", norm4, covariance, "how much to shrink")
        if self.rule == "oas":
            return oracle_approximating(count, covariance)
        return ledoit_wolf(count, covariance, norm4)
