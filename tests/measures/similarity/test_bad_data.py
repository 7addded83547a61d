"""Float32 rows as they come (one massive row, large offsets, features that depend on each other) against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

import tdgeom as tg
from tdgeom import functional as F


def pair(n, d, e, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g)
    return x, x @ torch.randn(d, e, generator=g) / d**0.5 + torch.randn(n, e, generator=g)


def debiased_reference(x, y):
    """Song et al. 2012 from N x N kernels without their diagonals, in NumPy's float64."""

    def kernel(rows):
        rows = rows.double().numpy()
        k = (rows - rows.mean(0)) @ (rows - rows.mean(0)).T
        return k - np.diag(np.diag(k))

    def hsic(a, b):
        n = len(a)
        return (a * b).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * a.sum(0) @ b.sum(0)

    k, m = kernel(x), kernel(y)
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


@pytest.mark.parametrize("shape", [(400, 60, 50), (400, 60, 500), (300, 500, 400)])
@pytest.mark.parametrize("factor", [1, 100, 10_000])
def test_one_massive_row_rounds_no_other_away(shape, factor):
    x, y = pair(*shape)
    x[7] *= factor
    y[7] *= factor
    assert float(F.linear_cka_debiased(x, y)) == pytest.approx(debiased_reference(x, y), rel=1e-6)
    stage = tg.LinearCKA(estimator="debiased")(sample_a=x, sample_b=y)
    assert float(stage) == pytest.approx(debiased_reference(x, y), rel=1e-6)


def reference(x, y):
    """Mean canonical correlation, its square, R² of y from x and CKA, in NumPy's float64."""
    x, y = (side.double().numpy() for side in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    (p, _), (q, _) = np.linalg.qr(x), np.linalg.qr(y)
    rho = np.linalg.svd(p.T @ q, compute_uv=False)
    r2 = 1 - ((y - p @ (p.T @ y)) ** 2).sum() / (y**2).sum()
    cka = ((x.T @ y) ** 2).sum() / np.sqrt(((x.T @ x) ** 2).sum() * ((y.T @ y) ** 2).sum())
    return {"cca_mean": rho.mean(), "cca_r2": (rho**2).mean(), "linear_r2_ab": r2, "linear_cka": cka}


@settings(max_examples=12)
@given(
    seed=st.integers(0, 999),
    power=st.floats(0, 6),
    shape=st.sampled_from([(3000, 16, 12), (2000, 5, 30), (2500, 24, 1)]),
)
def test_an_offset_moves_nothing_from_rows_or_moments(seed, power, shape):
    x, y = pair(*shape, seed)
    x, y = x + 10**power, y - 10**power
    td = tg.StreamingCrossMoments(["a", "b"])(TensorDict({("tokens", "a"): x, ("tokens", "b"): y}))
    for stage in (tg.CCA(source="moments"), tg.LinearR2(source="moments"), tg.LinearCKA(source="moments")):
        td = tg.ForEachPair(stage, ["a", "b"])(td)
    for name, right in reference(x, y).items():
        assert float(getattr(F, name)(x, y)) == pytest.approx(right, rel=1e-4), name
        assert float(td["between", "a->b", name]) == pytest.approx(right, rel=1e-4), name


@settings(max_examples=20)
@given(seed=st.integers(0, 999), rank=st.integers(1, 24), power=st.integers(-24, 18))
def test_dependent_features_are_told_in_float32_and_widened(seed, rank, power):
    few, y = pair(300, rank, 6, seed)
    wide = few.double() @ torch.randn(
        rank, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    x = (wide * 10.0**power).float()
    for name in ("cca_mean", "cca_r2", "linear_r2_ab"):
        right = reference(few, y)[name]
        for rows in (x, x.double()):
            assert float(getattr(F, name)(rows, y)) == pytest.approx(
                right, rel=1e-3 if rank > 20 else 1e-4
            ), name
