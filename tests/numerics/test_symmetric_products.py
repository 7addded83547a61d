"""Symmetric products by halves against NumPy: any width, upper triangle, mirrored, in float64 and in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

import tdgeom as tg
from tdgeom.numerics import moments, products


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=15)
@given(width=st.integers(1, 420), rows=st.integers(1, 40), seed=st.integers(0, 1000))
def test_upper_triangle_mirror_and_vector(width, rows, seed):
    y, vector = normal(rows, width, seed=seed), normal(width, seed=seed + 1)
    expected = y.numpy().T @ y.numpy()
    scratch = torch.zeros(width, width, dtype=torch.float64)
    products.add_upper(scratch, products.factors(y))
    np.testing.assert_allclose(np.triu(scratch), np.triu(expected), rtol=0, atol=1e-11)
    # what lies below the diagonal counts for nothing
    spoiled = torch.where(torch.ones(width, width).tril(-1).bool(), 1e3, scratch)
    np.testing.assert_allclose(
        products.upper_times(spoiled, vector), expected @ vector.numpy(), rtol=0, atol=1e-9
    )
    whole = products.mirror(spoiled)
    assert torch.equal(whole, whole.T)
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-11)
    assert torch.equal(products.gram(y), products.gram(y).T)
    np.testing.assert_allclose(products.gram(y[None]).squeeze(0), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "kind", ["gaussian", "binary", "rare", "massive row", "massive feature", "tiny feature"]
)
@pytest.mark.parametrize("rows", [300, 1500])
def test_float32_products_keep_their_error(kind, rows):
    y = normal(rows, 200)
    if kind in ("binary", "rare"):
        y = (y > (0 if kind == "binary" else 1.6)).double()
    if kind == "massive row":
        y[5] *= 1e4
    if "feature" in kind:
        y[:, 3] *= 1e4 if kind == "massive feature" else 1e-24
    y -= y.mean(0)
    total = torch.zeros(200, 200, dtype=torch.float64)
    products.add_upper(total, products.factors(y, torch.float32))
    exact = y.numpy().T @ y.numpy()
    scale = np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))
    assert (np.abs(products.mirror(total).numpy() - exact) / scale).max() <= products.product_error(
        torch.float32
    )


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.bool])
def test_parts_of_a_block_are_one_block(monkeypatch, precision, dtype):
    """A block is centred and multiplied a part at a time: no part's size changes a number, or the symmetry."""
    rows = (3 * normal(700, 130) + 20).to(dtype) if dtype != torch.bool else normal(700, 130) > 0
    found = {}
    for fewest in (1, 97, 10_000):
        monkeypatch.setattr(moments, "_FEWEST", fewest)
        monkeypatch.setattr(moments, "_CACHED", 1)
        stage = tg.StreamingCovariance(precision=precision)
        for block in rows.split([200, 1, 499]) if fewest > 1 else rows[:60].split(30):
            stage.update(TensorDict(tokens=block))
        published = stage.publish(TensorDict({}))["moments"]
        assert torch.equal(published["covariance"], published["covariance"].T)
        found[fewest] = published
        x = (rows if fewest > 1 else rows[:60]).double().numpy()
        exact = np.cov(x.T)
        allowed = 1e-12 if precision == "float64" else float(published["relative_error"])
        scale = np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))
        assert (np.abs(published["covariance"].numpy() - exact) <= allowed * scale).all()
        y = x - x.mean(0)
        np.testing.assert_allclose(published["norm4"], ((y**2).sum(1) ** 2).sum(), rtol=max(allowed, 1e-12))
        np.testing.assert_allclose(published["mean"], x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(
        found[97]["norm2_x"],
        found[10_000]["norm2_x"],
        rtol=0,
        atol=max(1e-9, allowed) * float(found[97]["norm4"]) ** 0.75,
    )
