"""The decimation profile: a dimension estimator on ever smaller subsets, hence at ever larger scales."""

from __future__ import annotations

import torch
from torch import Tensor

from tdgeom.core.keys import Keys
from tdgeom.core.stage import Stage
from tdgeom.measures.dimension.estimate import DimensionEstimate, DimensionStage
from tdgeom.measures.dimension.twonn import TwoNN

__all__ = ["Decimation"]


class Decimation(Stage):
    r"""An estimator on N, N/2, N/4, ... rows: where it stops changing, the noise has been left behind.

    Level l cuts the sample into 2^l disjoint runs of N // 2^l rows; in hash order (``RowSample``'s) every run
    is a uniform sample, the first one the prefix. ``estimate``, ``scale`` and ``rows`` are means over the
    runs; ``standard_error`` is their sd/√(number of runs), and at level 0, where there is one run, the
    estimator's own. Runs share no row, so their estimates are independent.

    Args:
        estimator: a dimension stage that reads ``"sample"`` and writes one number; default ``TwoNN()``.
        min_rows: no level has fewer rows than this.
        max_repeats: runs at a level that are estimated (the first ones); None: all of them (at most twice the
            work of level 0 in total).
        in_keys: the rows, default ``"sample"``, in hash order.
        out_keys: default root ``("dimension", "<estimator>_decimation")``.

    Writes ``estimate``, ``standard_error``, ``scale``, ``rows`` of shape (scales,), finest scale (all rows)
    first, and ``duplicates`` and ``near_duplicates`` (), the copies in the whole sample (dropped within each run).

    Raises:
        ValueError: fewer rows than ``min_rows``.

    Facco et al. 2017, fig. 3 (block analysis of TwoNN).

    >>> import torch, tdgeom as tg
    >>> g = torch.Generator().manual_seed(0)
    >>> noisy = torch.rand(4096, 2, generator=g) @ torch.eye(2, 10) + 0.005 * torch.randn(4096, 10, generator=g)
    >>> estimate, error, scale, rows, *copies = tg.Decimation(min_rows=256)(sample=noisy)
    >>> rows.tolist()
    [4096.0, 2048.0, 1024.0, 512.0, 256.0]
    >>> bool((estimate.diff() < 0).all()), bool((scale.diff() > 0).all())
    (True, True)
    """

    reads = {"sample": "N D"}

    def __init__(
        self,
        *,
        estimator: DimensionStage | None = None,
        min_rows: int = 64,
        max_repeats: int | None = None,
        in_keys: Keys = None,
        out_keys: Keys = None,
    ) -> None:
        estimator = TwoNN() if estimator is None else estimator
        fields = list(DimensionEstimate._fields)
        if (
            not isinstance(estimator, DimensionStage)
            or estimator.source != "sample"
            or estimator.out_names != fields
        ):
            raise ValueError(
                f"Decimation needs a dimension stage with source='sample' that writes {fields}, got {estimator!r}."
            )
        if min_rows < 4:
            raise ValueError(f"Decimation: min_rows is at least 4, got {min_rows!r}.")
        if max_repeats is not None and max_repeats < 1:
            raise ValueError(f"Decimation: max_repeats is None or at least 1, got {max_repeats!r}.")
        name = f"{estimator.name}_decimation"
        super().__init__(
            in_keys=in_keys, out_keys=out_keys, writes=[("dimension", name, leaf) for leaf in fields]
        )
        self.estimator, self.min_rows, self.max_repeats = estimator, min_rows, max_repeats

    def compute(self, sample: Tensor) -> DimensionEstimate:
        """The outputs."""
        n = sample.shape[-2]
        if n < self.min_rows:
            raise ValueError(
                f"Decimation starts at min_rows={self.min_rows}, the sample has {n} rows (shape {tuple(sample.shape)})."
            )
        levels = []
        runs = 1
        while n // runs >= self.min_rows:
            levels.append(self._level(sample, runs))
            runs *= 2
        estimate, error, scale, rows, *copies = (torch.stack(leaf, -1) for leaf in zip(*levels))
        # Level 0 is one run of all rows: its copies are the sample's.
        return DimensionEstimate(estimate, error, scale, rows, *(count[..., 0] for count in copies))

    def _level(self, sample: Tensor, runs: int) -> tuple[Tensor, ...]:
        size = sample.shape[-2] // runs
        used = runs if self.max_repeats is None else min(runs, self.max_repeats)
        parts = sample[..., : used * size, :].unflatten(-2, (used, size))
        result = DimensionEstimate(*self.estimator.compute(parts))
        if result.estimate.shape != parts.shape[:-2]:
            raise ValueError(
                f"Decimation needs an estimator of one number a data set; {type(self.estimator).__name__} gave "
                f"{tuple(result.estimate.shape)} for {tuple(parts.shape)}."
            )
        error = result.standard_error[..., 0] if used == 1 else result.estimate.std(-1) / used**0.5
        means = result.estimate.mean(-1), error, result.scale.mean(-1), result.rows.double().mean(-1)
        return *means, result.duplicates.sum(-1), result.near_duplicates.sum(-1)
