"""Chance of measures of single features: one side in another basis."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from tdgeom import functional as F
from tdgeom.measures.significance.rotation_null import random_rotation


def rows(seed: int, n: int = 120, d: int = 6) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rotations_are_haar() -> None:
    """Entries of Haar rotations of the plane: cos of a uniform angle, and a reflection in half of them."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([random_rotation(2, generator) for _ in range(2000)])
    torch.testing.assert_close(
        drawn @ drawn.mT, torch.eye(2, dtype=torch.float64).expand(2000, 2, 2), atol=1e-12, rtol=0
    )
    angles = np.arccos(drawn[:, 0, 0].clamp(-1, 1).numpy())
    assert stats.kstest(angles, stats.uniform(0, np.pi).cdf).pvalue > 0.01
    assert abs(float((torch.linalg.det(drawn) > 0).double().mean()) - 0.5) < 0.04


def test_the_draws_are_the_measure_of_the_turned_side() -> None:
    x, y = rows(0), rows(1) + 3.0
    found = F.rotated_null(F.soft_matching, x, y, repeats=19, seed=4)
    generator = torch.Generator().manual_seed(4)
    centred, mean = y - y.mean(0), y.mean(0)
    own = [F.soft_matching(x, centred @ random_rotation(6, generator) + mean) for _ in range(19)]
    torch.testing.assert_close(found.draws, torch.stack(own))
    assert float(found.p) == (1 + int((found.draws >= found.value).sum())) / 20


def test_sides_in_arbitrary_bases_are_called_alike_as_often_as_the_level_says() -> None:
    """The same space in two bases drawn anew: 300 pairs at 19 rotations; p = 1/20 in one of twenty."""
    generator = torch.Generator().manual_seed(1)
    few = 0
    for seed in range(300):
        x = rows(seed, 40, 3)
        p = F.rotated_null(F.soft_matching, x, x @ random_rotation(3, generator), repeats=19, seed=seed).p
        few += float(p) <= 0.05
    assert 4 <= few <= 28  # 15 ± 3.8


def test_permuted_neurons_are_alike() -> None:
    x = rows(2)
    found = F.rotated_null(F.soft_matching, x, x[:, [3, 1, 0, 2, 5, 4]], repeats=39)
    assert float(found.p) == 1 / 40 and float(found.calibrated) == pytest.approx(1.0)


@pytest.mark.parametrize("measure", [F.linear_cka, F.procrustes, F.neighborhood_overlap])
def test_a_measure_that_is_the_same_in_every_basis_is_refused(measure) -> None:
    with pytest.raises(ValueError, match="the measure is the same in every basis"):
        F.rotated_null(measure, rows(0, 60), rows(1, 60), repeats=19)


def test_too_few_rotations_are_refused() -> None:
    with pytest.raises(ValueError, match="rotated_null: 5 shuffles cannot show"):
        F.rotated_null(F.soft_matching, rows(0), rows(1), repeats=5)
