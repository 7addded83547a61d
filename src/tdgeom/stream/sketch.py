"""``StreamingSketch``: the leading spectrum of very wide sites without a D x D matrix."""

from __future__ import annotations

from functools import lru_cache

import torch
from scipy.special import gammaincinv
from torch import Tensor

from tdgeom.core.keys import Keys
from tdgeom.core.streaming_stage import StreamingStage
from tdgeom.numerics.centring import warn_undefined
from tdgeom.numerics.moments import about_running_mean

__all__ = ["StreamingSketch", "gaussian_columns", "nystrom"]

SKETCH_LEAVES = (
    "count", "mean", "eigenvalues", "eigenvectors", "total_variance", "d_pr", "d_pr_standard_error", "error_bound"
)  # fmt: skip
_FAILURE = 1e-6  # probability with which the error bound may be exceeded


@lru_cache(maxsize=4)
def gaussian_columns(width: int, columns: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(width, columns) standard normal numbers, the same for the same seed on every device; shared by all sites."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(width, columns, generator=generator, dtype=torch.float32, device="cpu").to(
        device, dtype
    )


def nystrom(product: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending) and eigenvectors of the Nyström approximation ``Y (ΩᵀY)⁺ Yᵀ`` of a positive A.

    Args:
        product: (D, size) Y = AΩ, float64. test: (D, size) Ω.

    Returns:
        (size,) and (D, size). Without rounding A minus the approximation is positive, so that no eigenvalue is too
        large.

    Directions of ``ΩᵀY`` below 1e-10 of its largest are rounding and left out.

        >>> a = torch.diag(torch.tensor([3.0, 2.0, 0.0, 0.0], dtype=torch.float64))
        >>> nystrom(a @ (test := torch.randn(4, 3, dtype=torch.float64)), test)[0]
        tensor([3., 2., 0.], dtype=torch.float64)
    """
    core = test.mT @ product
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    keep = values > values[-1:] * 1e-10
    root = torch.where(keep, torch.where(keep, values, 1).rsqrt(), 0)
    directions, singular, _ = torch.linalg.svd(product @ (vectors * root), full_matrices=False)
    return singular.square(), directions


class StreamingSketch(StreamingStage):
    """Leading eigenvalues and eigenvectors of the covariance, total variance and participation ratio of wide rows.

    Holds ``Y = Σ u (uᵀΩ)``, u the rows about their mean, for a seeded Gaussian Ω of ``size + probes`` columns: a
    D x (size + probes) matrix in place of the D x D one. The first ``size`` columns give the Nyström approximation
    ``Â = Y(ΩᵀY)⁺Yᵀ`` of the covariance A, whose eigenvalues never exceed A's (but for rounding); the ``probes`` are
    independent of it and measure what it misses: ``E = A - Â`` by ``Eω``.

    Leaves:
        count, mean: n and (D,).
        eigenvalues: (D,) descending, the first k as they are found and NaN beyond (0 where k+1 rows or fewer leave no
            more); ``SpectrumMetrics(source="sketch")`` uses them, what needs a whole spectrum refuses them.
        eigenvectors: (D, k) columns, largest entry positive.
        total_variance: tr A, exact.
        d_pr, d_pr_standard_error: ``(tr A)²/|A|²_F`` and its error, from the unbiased
            ``|A|²_F = |Â|²_F + mean over probes of |Aω|² - |Âω|²``.
        error_bound: ``sqrt(Σ|Eω|²/q) >= |A - Â|₂``, q the 1e-6 quantile of χ² with ``probes`` degrees of freedom: but
            for that probability no eigenvalue is further off.

    The bound holds for any spectrum, and is wide for a flat one (it grows as \\|E\\|_F): a small bound proves the
    eigenvalues, a large one says that ``size`` is too small to.

    Why a block randomised method and not frequent directions: Y is linear in Σ u uᵀ, so any batch split, order and
    merge gives the same answer to rounding; frequent directions depend on the order of rows, and need a singular value
    decomposition every ``size`` rows. Measured at D = 2048 with the same number of columns (tests/benchmarks/
    similarity.py prints the table): 3 to 4 times faster; worst error of the first 32 eigenvalues 0.23 instead of 0.32
    on a spectrum 1/i with 256 columns, 0.11 instead of 0.12 with 512; 0.010 instead of 0.006 on exp(-i/40). So flat
    tails, which is what activations have, go to this method, and fast decays to either.

    Memory: 8·D·(size + probes) bytes a site, and as many once for Ω. Time: 4·D·(size + probes) flops a row, in float64. For D
    up to a few thousand ``StreamingCovariance`` is exact and as cheap.

    Args:
        k: eigenpairs published. size: columns of the approximation, at least k. probes: columns that measure it, 8 or
            more. seed: of Ω; stages to be merged must share it.
        in_keys, out_keys: see ``Stage``.

    Tropp, Yurtsever, Udell & Cevher 2017, arXiv 1706.05736 (approximation from one pass); Meyer et al. 2021, arXiv
    2010.09649 (traces with deflation); Ghashami et al. 2016, arXiv 1501.01711 (frequent directions).

        >>> rows = torch.randn(500, 100) * torch.tensor([30.0] + 99 * [0.1])
        >>> stage = StreamingSketch(k=1, size=16)
        >>> count, mean, eigenvalues, eigenvectors, total, d_pr, *_ = stage(tokens=rows)
        >>> bool((eigenvalues[0] / rows[:, 0].var() - 1).abs() < 1e-3), round(float(d_pr), 2)
        (True, 1.0)
    """

    reads = {"tokens": "N D"}
    writes = [("sketch", name) for name in SKETCH_LEAVES]
    publishing = frozenset({"k"})

    count: Tensor
    mean: Tensor
    total: Tensor
    product: Tensor

    def __init__(
        self,
        *,
        k: int = 32,
        size: int = 256,
        probes: int = 32,
        seed: int = 0,
        in_keys: Keys = None,
        out_keys: Keys = None,
    ) -> None:
        if not 1 <= k <= size or probes < 8:
            raise ValueError(
                f"StreamingSketch: expected 1 <= k <= size and 8 probes or more, got k={k}, size={size}, "
                f"probes={probes}. Take size 4 to 8 times k."
            )
        super().__init__(in_keys=in_keys, out_keys=out_keys)
        self.k, self.size, self.probes, self.seed = k, size, probes, seed
        self.add_state("count", torch.int64)
        for name in ("mean", "total", "product"):
            self.add_state(name, torch.float64)
        self._tests: dict[tuple[int, torch.device], Tensor] = {}

    def start(self, tokens: Tensor) -> dict[str, Tensor]:
        """Zeros of the rows' width."""
        d = tokens.shape[-1]
        shapes = {"count": (), "mean": (d,), "total": (), "product": (d, self.size + self.probes)}
        return {
            name: torch.zeros(shape, dtype=torch.float64, device=tokens.device)
            for name, shape in shapes.items()
        }

    def accumulate(self, tokens: Tensor) -> None:
        """Add a block of rows: two thin products."""
        if tokens.shape[-1] != self.mean.shape[0]:
            raise ValueError(
                f"StreamingSketch has seen rows of width {self.mean.shape[0]} and now gets {self.in_keys[0]!r} of shape "
                f"{tuple(tokens.shape)}. Use one stage a width, or reset()."
            )
        before = self.count.double()
        y, self.mean, step = about_running_mean([tokens], self.mean, self.count)
        self.total = self.total + y[:-1].square().sum() + before * step.square().sum()
        self.product.addmm_(y.mT, y @ self._test())
        self.count = self.count + tokens.shape[0]

    def combine(self, other: StreamingSketch) -> None:
        """Add another's sums, both about the common mean."""
        mean, count = other.mean.to(self.mean.device), other.count.to(self.mean.device)
        n, m = self.count.double(), count.double()
        delta = mean - self.mean
        weight = n * m / (n + m)
        self.product.add_(other.product.to(self.mean.device)).addr_(delta * weight, self._test().mT @ delta)
        self.total = self.total + other.total.to(self.mean.device) + weight * delta.square().sum()
        self.mean = self.mean + delta * (m / (n + m))
        self.count = self.count + count

    def result(self) -> dict[str, Tensor]:
        """One decomposition of (D, size), and what the probes say of it."""
        degrees = self.count.double() - 1
        product, test = self.product / degrees, self._test()
        known, probed = product[:, : self.size], product[:, self.size :]
        if not torch.isfinite(known).all() or not known.any():
            values, vectors = torch.full_like(known[0], torch.nan), torch.full_like(known, torch.nan)
        else:
            values, vectors = nystrom(known, test[:, : self.size])
        approximated = vectors @ (values[:, None] * (vectors.mT @ test[:, self.size :]))
        missed = (probed - approximated).square().sum(0)
        gains = probed.square().sum(0) - approximated.square().sum(0)
        square = values.square().sum() + gains.mean()
        total = self.total / degrees
        d_pr = total.square() / square
        quantile = 2 * float(gammaincinv(self.probes / 2, _FAILURE))  # of chi-squared
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
        k, d, rank = min(self.k, values.shape[0]), self.mean.shape[0], int(self.count) - 1
        leading = torch.cat([values[:k], values.new_full((d - k,), torch.nan)])
        if rank <= k:  # so few rows have no further directions
            leading = torch.where(torch.arange(d, device=values.device) < rank, leading, 0 * values[0])
        reason = f"no variance over {rank + 1} rows."
        return {
            "count": self.count.clone(),
            "mean": self.mean.clone(),
            "eigenvalues": leading,
            "eigenvectors": vectors[:, :k].clone(),
            "total_variance": total,
            "d_pr": warn_undefined(d_pr, "StreamingSketch (eigenvalues and d_pr)", reason),
            "d_pr_standard_error": d_pr * gains.std() / self.probes**0.5 / square,
            "error_bound": (missed.sum() / quantile).sqrt(),
        }

    def _test(self) -> Tensor:
        width, columns = self.mean.shape[0], self.size + self.probes
        key = (width, self.mean.device)
        if key not in self._tests:  # kept here too, so that a compiled update sees a tensor and no cache
            self._tests[key] = gaussian_columns(width, columns, self.seed, torch.float64, self.mean.device)
        return self._tests[key]
