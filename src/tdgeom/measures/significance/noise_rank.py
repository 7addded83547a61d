"""How many eigenvalues of a covariance stand above those of noise alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tdgeom.core.keys import Keys
from tdgeom.core.stage import Stage
from tdgeom.numerics.centring import occurs, real_rows, warn_undefined
from tdgeom.numerics.forgetting import equal_weights_needed

__all__ = ["NoiseEdge", "NoiseRank", "noise_rank"]

# Quantiles of the Tracy-Widom law of real Wishart matrices (β = 1), upper tail: Bejan 2005, table A.1
_TRACY_WIDOM = {0.1: 0.4501, 0.05: 0.9793, 0.01: 2.0234, 0.005: 2.4224, 0.001: 3.2724}
_REASON = "it needs more than 2 rows and features, and a spectrum that varies."


class NoiseEdge(NamedTuple):
    """Each (*B,): eigenvalues above noise, the variance of the noise, and where its spectrum ends."""

    signal_rank: Tensor
    noise_variance: Tensor
    edge: Tensor


def noise_rank(eigenvalues: Tensor, rows: Tensor | float, level: float = 0.05) -> NoiseEdge:
    r"""The number of eigenvalues that noise alone would not give: Marchenko and Pastur's edge, Tracy and Widom's law.

    Noise of variance σ² in each of D features, alike in all directions, gives N rows a sample covariance whose eigenvalues fill
    [σ²(1-√(D/N))², σ²(1+√(D/N))²], although the true ones are all σ². One eigenvalue after another is tested: with k signals
    assumed, λ_(k+1) is one too if it lies above σ²(k)·(μ + s(level)·ξ), μ and ξ centre and scale of the largest of N x (D-k)
    noise and s the Tracy-Widom quantile; σ²(k) is the variance of what is left, freed of what signals leak into it (Kritchman and
    Nadler's estimate). The first that does not ends the count.

    Args:
        eigenvalues: (\*B, D) of an unbiased covariance, descending, *all* of them. rows: N, a number or (\*B,): **independent**
            rows. Tokens of a document are not: give the number of documents as a cautious choice.
        level: chance of a count above the truth: 0.1, 0.05, 0.01, 0.005 or 0.001.

    Returns:
        ``signal_rank`` (int64), ``noise_variance``, ``edge`` (the last threshold, in units of the eigenvalues). Signals whose
        variance is below σ²√(D/N) above the noise cannot be told from it by any method. NaN and -1 with one warning where it
        is undefined.

    Noise of unequal variance between features is no such noise: standardise features first, or read the count as that of
    directions above a *common* noise.

    Marchenko and Pastur 1967; Johnstone 2001; Kritchman and Nadler 2009, IEEE Trans. Signal Process. 57.

        >>> rows = torch.randn(500, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> rows[:, :3] *= 4
        >>> noise_rank(torch.linalg.eigvalsh(rows.T.cov()).flip(0), 500).signal_rank
        tensor(3)
    """
    if level not in _TRACY_WIDOM:
        raise ValueError(f"noise_rank: level is one of {sorted(_TRACY_WIDOM)}, got {level}.")
    values = real_rows(eigenvalues, "noise_rank").double()
    if values.ndim < 1 or values.shape[-1] < 1:
        raise ValueError(f"noise_rank expects eigenvalues of shape (..., D), got {tuple(values.shape)}.")
    width = values.shape[-1]
    n = torch.as_tensor(rows, dtype=torch.float64, device=values.device)
    most = torch.minimum(n - 1, torch.full_like(n, width))  # eigenvalues that are not 0 by lack of rows
    left = values.clamp(min=0).flip(-1).cumsum(-1).flip(-1)  # Σ of the eigenvalues from k on
    batch = values.shape[:-1]
    count = torch.zeros(batch, dtype=torch.int64, device=values.device)
    variance = torch.full(batch, torch.nan, dtype=torch.float64, device=values.device)
    edge, going = variance.clone(), torch.ones_like(count, dtype=torch.bool)
    for k in range(width):
        going = going & (k < most - 1)
        if not torch.compiler.is_compiling() and not occurs(going):
            break
        own = _noise_variance(values[..., :k], left[..., k], n, width, k)
        centre = ((n - 1.5).sqrt() + (width - k - 0.5) ** 0.5).square() / (n - 1)
        scale = (centre / (n - 1)).sqrt() * (1 / (n - 1.5).sqrt() + 1 / (width - k - 0.5) ** 0.5) ** (1 / 3)
        threshold = own * (centre + _TRACY_WIDOM[level] * scale)
        variance, edge = torch.where(going, own, variance), torch.where(going, threshold, edge)
        going = going & (values[..., k] > threshold)
        count = count + going
    undefined = ~(variance > 0)
    variance = warn_undefined(torch.where(undefined, torch.nan, variance), "noise_rank", _REASON)
    return NoiseEdge(torch.where(undefined, -1, count), variance, torch.where(undefined, torch.nan, edge))


def _noise_variance(signals: Tensor, left: Tensor, n: Tensor, width: int, k: int) -> Tensor:
    """σ² with k signals: the mean of the other eigenvalues, and what the signals have taken from it by leaning towards noise.

    A signal of true size ρ + σ² shows as λ = (ρ + σ²)(1 + (D-k)/n · σ²/ρ); solved for the true size, and again.
    """
    others = width - k
    variance = left / others
    if k == 0:
        return variance
    for _ in range(30):
        sigma = variance.unsqueeze(-1)
        b = signals + sigma - sigma * others / n.unsqueeze(-1)
        root = (b.square() - 4 * signals * sigma).clamp(min=0).sqrt()
        true = (b + root) / 2
        variance = (left + (signals - true).sum(-1)) / others
    return variance


class NoiseRank(Stage):
    """How many eigenvalues of a site stand above those of noise: see ``noise_rank``.

    Args:
        level: chance of a count above the truth.
        in_keys: default ``"eigenvalues"`` (all of them, as ``EigenSpectrum`` writes) and ``("moments", "count")``. Rows must be
            independent (see there).
        out_keys: default root ``"noise"``.

    Writes ``("noise", "signal_rank" | "noise_variance" | "edge")``, each ().

        >>> import tdgeom as tg
        >>> x = torch.randn(400, 20, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0] * 2 + [1.0] * 18)
        >>> values = torch.linalg.eigvalsh(x.double().T.cov()).flip(0)
        >>> int(tg.NoiseRank()(eigenvalues=values, moments_count=torch.tensor(400))[0])
        2
    """

    reads = {"eigenvalues": "D", ("moments", "count"): "", ("moments", "effective_sample_size"): ""}
    optional = frozenset({"effective_sample_size"})
    writes = [("noise", "signal_rank"), ("noise", "noise_variance"), ("noise", "edge")]

    def __init__(self, *, level: float = 0.05, in_keys: Keys = None, out_keys: Keys = None) -> None:
        if level not in _TRACY_WIDOM:
            raise ValueError(f"NoiseRank: level is one of {sorted(_TRACY_WIDOM)}, got {level}.")
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.level = level

    def compute(self, eigenvalues: Tensor, count: Tensor, effective: Tensor | None = None) -> NoiseEdge:
        """See ``noise_rank``."""
        if effective is not None and occurs(effective < (1 - 1e-9) * count):
            raise equal_weights_needed("NoiseRank", "the edge of noise")
        return noise_rank(eigenvalues, count, self.level)
