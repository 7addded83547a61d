"""Counts of eigenvalues above noise, against planted numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict

import tdgeom as tg
from tdgeom import functional as F


def spectrum(n: int, width: int, planted: int, seed: int) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((n, width))
    strength = 1 + (width / n) ** 0.25
    x[:, :planted] *= np.linspace(3, 8, planted) * strength
    return torch.as_tensor(np.linalg.eigvalsh(np.cov(x.T))[::-1].clip(0).copy())


@pytest.mark.parametrize(("n", "width", "planted"), [(400, 40, 3), (150, 300, 4), (1000, 100, 10)])
def test_the_planted_number_is_found(n: int, width: int, planted: int) -> None:
    found = [int(F.noise_rank(spectrum(n, width, planted, seed), n).signal_rank) for seed in range(20)]
    assert found.count(planted) >= 17 and max(found) <= planted + 1


def test_noise_alone_is_called_signal_as_often_as_the_level_says() -> None:
    found = np.array([int(F.noise_rank(spectrum(200, 50, 0, seed), 200).signal_rank) for seed in range(200)])
    assert np.mean(found > 0) < 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5 and np.mean(found > 0) > 0.01


def test_the_edge_is_marchenko_and_pasturs_and_the_variance_the_noises() -> None:
    n, width = 4000, 1000
    null = F.noise_rank(4.0 * spectrum(n, width, 0, 0), n)
    assert float(null.noise_variance) == pytest.approx(4.0, rel=0.01)
    assert float(null.edge) == pytest.approx(4.0 * (1 + (width / n) ** 0.5) ** 2, rel=0.02)


def test_the_stage_reads_a_stream() -> None:
    x = torch.randn(500, 30, generator=torch.Generator().manual_seed(0))
    x[:, :4] *= 5
    td = tg.Pipeline(tg.StreamingCovariance(), tg.EigenSpectrum(), tg.NoiseRank())(TensorDict({"tokens": x}))
    assert int(td["noise", "signal_rank"]) == 4


def test_no_variance_is_said() -> None:
    with pytest.warns(tg.UndefinedMeasureWarning, match="noise_rank"):
        assert int(F.noise_rank(torch.zeros(5), 10).signal_rank) == -1
    with pytest.raises(ValueError, match="level is one of"):
        F.noise_rank(torch.ones(5), 10, 0.2)


def test_of_rows_in_documents_the_number_of_documents_counts() -> None:
    generator = np.random.default_rng(0)
    document = np.repeat(np.arange(100), 4)
    for _ in range(5):
        own = generator.standard_normal((100, 60))
        own[:, :3] *= [9, 7, 5]
        x = own[document] + generator.standard_normal((400, 60))
        values = torch.as_tensor(np.linalg.eigvalsh(np.cov(x.T))[::-1].clip(0).copy())
        assert int(F.noise_rank(values, 100).signal_rank) == 3 < int(F.noise_rank(values, 400).signal_rank)
