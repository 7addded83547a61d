"""Shuffled documents, calibrated values, joint and adjusted p-values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

import tdgeom as tg
from tdgeom import functional as F


def rows(n: int, width: int, seed: int) -> Tensor:
    return torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.integers(0, 8), min_size=6, max_size=40), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_whole_documents_change_places_with_others_of_their_size(ids: list[int], seed: int) -> None:
    document = torch.tensor(ids)
    sizes = document.bincount()
    alone = sum(int(size) for size in sizes if size and int((sizes == size).sum()) == 1)
    if 2 * alone > len(ids):
        with pytest.raises(ValueError, match="cannot change places"):
            F.document_shuffles(document, 4, seed)
        return
    for order in F.document_shuffles(document, 4, seed):
        assert sorted(order.tolist()) == list(range(len(ids)))
        moved = {}
        for here, there in zip(document.tolist(), document[order].tolist()):
            assert moved.setdefault(here, there) == there and sizes[here] == sizes[there]


def test_every_order_is_as_likely() -> None:
    orders = F.document_shuffles(torch.arange(3), 6000)
    counts = np.unique(orders.numpy(), axis=0, return_counts=True)[1]
    assert len(counts) == 6 and stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(
    "stage",
    [
        tg.LinearCKA(),
        tg.LinearCKA(estimator="debiased"),
        tg.Procrustes(),
        tg.NeighborhoodOverlap(k=4),
        tg.JaccardKNN(k=4),
        tg.CKNNA(k=5),
        tg.RBFCKA(),
        tg.DistanceCorrelation(),
        tg.RSA(),
        tg.RSA(comparison="kendall_a"),
        tg.RSA(comparison="pearson", memory=2000),
    ],
    ids=str,
)
@pytest.mark.parametrize("width", [4, 60])
def test_reordering_a_prepared_side_is_preparing_the_reordered_rows(stage: tg.PairStage, width: int) -> None:
    x, y, order = (
        rows(30, 5, 0),
        rows(30, width, 1),
        torch.randperm(30, generator=torch.Generator().manual_seed(2)),
    )
    a = stage.prepare(x)
    for got, want in zip(
        stage.listed(stage.compare(a, stage.reordered(stage.prepare(y), order))),
        stage.listed(stage.compare(a, stage.prepare(y[order]))),
    ):
        assert float(got) == pytest.approx(float(want), rel=1e-9)


def test_a_calibrated_value_is_nought_by_chance_and_one_for_the_same() -> None:
    x, y = rows(60, 30, 0), rows(60, 30, 1)
    same, apart = (
        F.shuffled_null(F.linear_cka, x, x, repeats=99),
        F.shuffled_null(F.linear_cka, x, y, repeats=99),
    )
    assert float(same.calibrated) == pytest.approx(1.0) and float(same.p) == pytest.approx(0.01)
    assert float(apart.value) > 0.3 and abs(float(apart.calibrated)) < 0.05
    closed = F.linear_cka_null(x, y)
    assert float(apart.null_mean) == pytest.approx(
        float(closed.null_mean), abs=4 * float(closed.null_sd) / 99**0.5
    )


def test_a_distance_is_better_when_smaller() -> None:
    x = rows(60, 3, 0)
    stage = tg.Calibrated(tg.Procrustes(), repeats=19)
    out = dict(zip(stage.out_names, stage(sample_a=x, sample_b=x + 0.1 * rows(60, 3, 1))))
    assert float(out["procrustes_p"]) == pytest.approx(0.05) and float(out["procrustes_z"]) > 3
    assert 0.9 < float(out["procrustes_calibrated"]) < 1
    assert float(out["procrustes"]) == pytest.approx(float(F.procrustes(x, x + 0.1 * rows(60, 3, 1))))


def test_the_stage_is_the_function_on_its_documents() -> None:
    x, y, document = rows(48, 4, 0), rows(48, 4, 1), torch.arange(48) // 3
    stage = tg.Calibrated(tg.NeighborhoodOverlap(k=4), repeats=49, keep_draws=True, seed=3)
    out = dict(zip(stage.out_names, stage(sample_a=x, sample_b=y, sample_row_id=document << 20)))
    want = F.shuffled_null(lambda a, b: F.neighborhood_overlap(a, b, k=4), x, y, document, repeats=49, seed=3)
    assert torch.allclose(out["neighborhood_overlap_draws"], want.draws)
    assert float(out["neighborhood_overlap_p"]) == float(want.p)


def test_documents_that_are_alike_inside_are_no_evidence() -> None:
    """Rows within a document lean to a direction of its own on either side: by rows that looks like a likeness."""
    by_document, by_row = [], []
    for seed in range(60):
        document = torch.arange(120) // 6
        x, y = (rows(20, 10, 2 * seed + s)[document] + rows(120, 10, 900 + 2 * seed + s) for s in (0, 1))
        by_document.append(float(F.shuffled_null(F.linear_cka, x, y, document, repeats=39, seed=seed).p))
        by_row.append(float(F.shuffled_null(F.linear_cka, x, y, repeats=39, seed=seed).p))
    assert np.mean(np.array(by_row) <= 0.05) > 0.9
    assert np.mean(np.array(by_document) <= 0.05) <= 0.05 + 3 * (0.05 * 0.95 / 60) ** 0.5


def test_a_joint_p_value_is_that_of_the_largest() -> None:
    draws = torch.randn(5, 199, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = torch.tensor([0.5, 2.0, -1.0, 4.0, torch.nan])
    every = np.concatenate((values[:4, None].numpy(), draws[:4].numpy()), 1)
    z = stats.zscore(every, axis=1, ddof=1)
    want = [(1 + int((z[:, 1:].max(0) >= one).sum())) / 200 for one in z[:, 0]]
    got = F.joint_p_values(values, draws)
    assert got[:4].tolist() == pytest.approx(want) and got[4].isnan()


def test_the_best_of_many_is_called_no_more_often_than_said() -> None:
    """Values that are one more draw: scaled by their draws alone the best of 36 would be called in 11 % of sets."""
    sets, generator = 1500, torch.Generator().manual_seed(0)
    every = torch.randn(sets, 36, 40, dtype=torch.float64, generator=generator) ** 3
    found = [float(F.joint_p_values(one[:, 0], one[:, 1:]).amin()) <= 0.05 for one in every]
    assert abs(np.mean(found) - 0.05) < 3.5 * (0.05 * 0.95 / sets) ** 0.5


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_adjusted_p_values_are_those_of_scipy_and_the_definition(p: list[float]) -> None:
    given_p = torch.tensor(p, dtype=torch.float64)
    assert F.adjusted_p_values(given_p, "fdr").numpy() == pytest.approx(stats.false_discovery_control(p))
    order, holm, so_far = np.argsort(p, kind="stable"), np.empty(len(p)), 0.0
    for place, index in enumerate(order):
        so_far = max(so_far, min(1.0, (len(p) - place) * p[index]))
        holm[index] = so_far
    assert F.adjusted_p_values(given_p).numpy() == pytest.approx(holm)


def test_a_nan_is_no_test() -> None:
    got = F.adjusted_p_values(torch.tensor([0.01, torch.nan, 0.03]))
    assert got[[0, 2]].tolist() == pytest.approx([0.02, 0.03]) and got[1].isnan()


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"cannot show p <= 0\.05"):
        tg.Calibrated(tg.LinearCKA(), repeats=10)
    with pytest.raises(TypeError, match="Leave source= out"):
        tg.Calibrated(tg.LinearCKA(source="moments"))
    with pytest.raises(TypeError, match="pair stage on matched rows"):
        tg.Calibrated(tg.TwoNN())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="p-values in"):
        F.adjusted_p_values(torch.tensor([1.5]))
