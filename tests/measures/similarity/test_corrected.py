"""Estimates for sampled features and few rows, against populations whose value is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import tdgeom as tg
from tdgeom import functional as F

LATENT = 200
POWER = torch.arange(1, LATENT + 1).double() ** -0.5
CUT = torch.where(torch.arange(LATENT) < 100, POWER, 0.0)


def features(spectrum: Tensor, number: int, generator: torch.Generator) -> Tensor:
    return torch.randn(LATENT, number, dtype=torch.float64, generator=generator) * spectrum.sqrt()[:, None]


def latent(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, LATENT, dtype=torch.float64, generator=generator)


def test_sixty_four_features_tell_the_population_s_cka() -> None:
    truth = float((POWER * CUT).sum() / (POWER.square().sum() * CUT.square().sum()).sqrt())
    g = torch.Generator().manual_seed(0)
    corrected, debiased = [], []
    for _ in range(40):
        z = latent(300, g)
        x, y = z @ features(POWER, 64, g), z @ features(CUT, 64, g)
        corrected.append(float(F.linear_cka_sampled(x, y)))
        debiased.append(float(F.linear_cka_debiased(x, y)))
    error = np.std(corrected) / len(corrected) ** 0.5
    assert abs(np.mean(corrected) - truth) < 3.5 * error and error < 0.015
    assert np.mean(debiased) < 0.5 * truth


@pytest.mark.parametrize(("n", "number"), [(200, 64), (100, 300), (300, 300)])
def test_the_participation_ratio_of_a_population(n: int, number: int) -> None:
    truth = float(POWER.sum() ** 2 / POWER.square().sum())
    g = torch.Generator().manual_seed(1)
    found = [
        float(F.participation_ratio_sampled(latent(n, g) @ features(POWER, number, g))) for _ in range(40)
    ]
    error = np.std(found) / len(found) ** 0.5
    assert abs(np.mean(found) - truth) < 3.5 * error + 0.01 * truth


def test_feature_by_feature_sums_are_the_definition() -> None:
    """Σ_{a≠b} by a loop over pairs of features, each by the unbiased estimators of one feature's kernel."""
    x, y = (
        torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1)
    )
    x, y = (side[:, :4] + 2 * side[:, 4:] for side in (x, y))  # features of one side have something in common

    def hsic(k: np.ndarray, l: np.ndarray) -> float:
        n = len(k)
        k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))
        one = np.ones(n)
        return (
            np.trace(k @ l)
            + one @ k @ one * (one @ l @ one) / ((n - 1) * (n - 2))
            - 2 / (n - 2) * (one @ k @ l @ one)
        ) / (n * (n - 3))

    kernels = [[np.outer(s[:, a], s[:, a]) for a in range(4)] for s in (x.numpy(), y.numpy())]
    between = np.mean([hsic(k, l) for k in kernels[0] for l in kernels[1]])
    own = [np.mean([hsic(s[a], s[b]) for a in range(4) for b in range(4) if a != b]) for s in kernels]
    assert min(own) > 0
    assert float(F.linear_cka_sampled(x, y)) == pytest.approx(between / np.sqrt(own[0] * own[1]), rel=1e-9)


def test_one_feature_alone_tells_nothing_of_its_population() -> None:
    alone = torch.randn(12, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.warns(tg.UndefinedMeasureWarning, match="linear_cka_sampled"):
        assert F.linear_cka_sampled(alone, alone).isnan()


def brute_force_error(x: Tensor, y: Tensor, row: Tensor, of_x: Tensor, of_y: Tensor, groups: int) -> float:
    """J₁ - J₂/2 by calling the measure anew on whatever is left."""

    def left(r: tuple[int, ...] = (), a: tuple[int, ...] = (), b: tuple[int, ...] = ()) -> float:
        kept = [~torch.isin(of, torch.tensor(out)) for of, out in ((row, r), (of_x, a), (of_y, b))]
        return float(F.linear_cka_sampled(x[kept[0]][:, kept[1]], y[kept[0]][:, kept[2]]))

    g, theta = range(groups), left()
    alone = {kind: np.array([left(**{kind: (i,)}) for i in g]) for kind in "rab"}
    first = sum((groups - 1) / groups * ((v - v.mean()) ** 2).sum() for v in alone.values())
    second = 0.0
    for one, other in ("ra", "rb", "ab"):
        values = np.array([[left(**{one: (i,), other: (j,)}) for j in g] for i in g])
        apart = values - values.mean(0) - values.mean(1)[:, None] + values.mean()
        second += (groups - 1) ** 2 / groups**2 * (apart**2).sum()
    for kind, v in alone.items():
        q = [
            groups * theta - (groups - 1) * (v[i] + v[j]) + (groups - 2) * left(**{kind: (i, j)})
            for i in g
            for j in range(i)
        ]
        second += np.var(q) * len(q) * ((groups - 3) / (groups * (groups - 1))) ** 2
    return float(np.sqrt(max(first - second / 2, first / 4)))


def test_the_error_of_sampled_features_is_its_definition() -> None:
    """Five documents and five features a side: each is a group of its own, however it is dealt."""
    g = torch.Generator().manual_seed(3)
    x, y = (torch.randn(40, 5, dtype=torch.float64, generator=g) for _ in range(2))
    x, y = x + 2 * x[:, :1] + 7, y + 2 * x[:, :1]
    document = torch.arange(40) // 8
    found = F.linear_cka_sampled_error(x, y, document)
    each = torch.arange(5)
    assert float(found.standard_error) == pytest.approx(
        brute_force_error(x, y, document, each, each, 5), rel=1e-9
    )
    both = F.linear_cka_sampled_error(x.expand(2, -1, -1), torch.stack((y, x)), document)
    assert both.value[0] == pytest.approx(float(found.value)) and both.standard_error[0] == pytest.approx(
        float(found.standard_error)
    )


def test_intervals_hold_the_cka_of_the_populations_from_sixty_four_features() -> None:
    truth = float((POWER * CUT).sum() / (POWER.square().sum() * CUT.square().sum()).sqrt())
    g, held, found = torch.Generator().manual_seed(1), 0, []
    for seed in range(30):
        z = latent(300, g)
        x, y = z @ features(POWER, 64, g), z @ features(CUT, 64, g)
        value, error = F.linear_cka_sampled_error(x, y, seed=seed)
        low, high = F.error_interval(value, error, 19)
        held += int(low <= truth <= high)
        found.append([float(value), float(error)])
    values, errors = np.array(found).T
    assert held >= 26 and 0.8 < np.sqrt((errors**2).mean()) / values.std() < 1.6


def test_few_documents_have_no_error_of_sampled_features() -> None:
    x = torch.randn(40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x + 2 * x[:, :1]
    with pytest.warns(tg.FewRowsWarning, match="no standard error of 4 document"):
        assert F.linear_cka_sampled_error(x, x, torch.arange(40) // 10).standard_error.isnan()
    with pytest.raises(ValueError, match="document of shape"):
        F.linear_cka_sampled_error(x, x, torch.arange(3))


def test_intervals_of_an_analysis_hold_sampled_features() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.Linear(40, 30))
    batches = [{"input": torch.randn(400, 6)}]
    results = tg.analyze_model(
        model, batches, sites="module_output:*", metrics=[tg.SampledCKA()], errors=True, progress=False
    )
    row = tg.intervals(results).set_index("metric").loc["linear_cka_sampled"]
    assert row["low"] < row["value"] < row["high"] and row["se"] > 0
    assert not [name for name in results.pairs if name.endswith("_se_se")]


def test_procrustes_bounds_hold_the_truth_between_them() -> None:
    g = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, 31).double() ** -1
    turn = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64, generator=g))[0]
    noise = 0.09
    truth = 2 - 2 * float(spectrum.sum() / (spectrum.sum() + 30 * noise))
    found = []
    for _ in range(12):
        z = torch.randn(400, 30, dtype=torch.float64, generator=g) * spectrum.sqrt()
        x = z + noise**0.5 * torch.randn(400, 30, dtype=torch.float64, generator=g)
        y = (z + noise**0.5 * torch.randn(400, 30, dtype=torch.float64, generator=g)) @ turn
        found.append([float(value) for value in F.procrustes_bounds(x, y)])
    lower, upper, estimate = np.mean(found, 0)
    assert lower < truth < upper and abs(estimate - truth) < 0.5 * min(truth - lower, upper - truth)


def test_the_lower_bound_is_procrustes() -> None:
    x, y = torch.randn(60, 5), torch.randn(60, 9)
    assert float(F.procrustes_bounds(x, y).lower) == pytest.approx(float(F.procrustes(x, y)), rel=1e-6)


def test_overlap_of_the_same_subspace_is_one_under_noise() -> None:
    g = torch.Generator().manual_seed(0)
    plain, corrected = [], []
    for _ in range(12):
        basis = torch.linalg.qr(torch.randn(60, 4, dtype=torch.float64, generator=g))[0]
        z = torch.randn(240, 4, dtype=torch.float64, generator=g) @ basis.mT
        x, y = (z + 0.45 * torch.randn(240, 60, dtype=torch.float64, generator=g) for _ in range(2))
        u, v = (torch.linalg.svd(s - s.mean(0), full_matrices=False).Vh[:4].mT for s in (x, y))
        plain.append(float((u.mT @ v).square().sum() / 4))
        corrected.append(float(F.subspace_overlap_corrected(x, y, k=4)))
    assert np.mean(plain) < 0.92 and abs(np.mean(corrected) - 1) < 0.02


def test_halves_hold_whole_documents() -> None:
    x = torch.randn(40, 5)
    with pytest.raises(ValueError, match="deals documents into 2 parts"):
        F.subspace_overlap_corrected(x, x, torch.zeros(40, dtype=torch.int64), k=2)
    with pytest.raises(ValueError, match="document of shape"):
        F.procrustes_bounds(x, x, torch.arange(3))
