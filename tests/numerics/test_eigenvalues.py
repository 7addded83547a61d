"""Leading eigenpairs from one tridiagonal form, beside NumPy's full decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from tdgeom.numerics import eigenvalues as _eigen
from tdgeom.numerics.eigenvalues import leading_eigenpairs, symmetric_eigenvalues

ROWS = torch.randn(900, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TURN = torch.linalg.qr(ROWS[:300])[0]
CASES = {
    "wishart": ROWS.mT @ ROWS / 899,
    "spectrum over sixteen decades": (ROWS * torch.logspace(0, -8, 300)).mT
    @ (ROWS * torch.logspace(0, -8, 300)),
    "rank 20": ROWS[:20].mT @ ROWS[:20],
    "two clusters": (TURN * torch.cat([torch.ones(260), torch.full((40,), 3.0)])) @ TURN.mT,
    "identity": torch.eye(300, dtype=torch.float64),
    "zeros": torch.zeros(300, 300, dtype=torch.float64),
    "ones": torch.ones(300, 300, dtype=torch.float64),
    "tiny": 1e-150 * (ROWS.mT @ ROWS),
    "huge": 1e150 * (ROWS.mT @ ROWS),
}


def assert_leading(matrix, values, vectors, k):
    expected = np.linalg.eigvalsh(matrix.numpy())
    size = max(np.abs(expected).max(), 1e-300)
    assert np.abs(values.numpy() - expected).max() <= 1e-13 * size
    assert vectors.shape == (matrix.shape[-1], k)
    assert (matrix @ vectors - vectors * values[-k:]).abs().max() <= 1e-13 * size
    assert (vectors.mT @ vectors - torch.eye(k)).abs().max() < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_pairs_solve_the_eigenvalue_equation(name):
    assert_leading(CASES[name], *leading_eigenpairs(CASES[name], 32), 32)


@pytest.mark.parametrize("k", [1, 75, 76, 300])
def test_any_number_of_vectors(k):
    assert_leading(CASES["wishart"], *leading_eigenpairs(CASES["wishart"], k), k)


def test_a_batch_is_each_of_its_matrices():
    batch = torch.stack([CASES["wishart"], CASES["rank 20"]])
    values, vectors = leading_eigenpairs(batch, 8)
    for matrix, own_values, own_vectors in zip(batch, values, vectors):
        assert_leading(matrix, own_values, own_vectors, 8)
    np.testing.assert_array_equal(symmetric_eigenvalues(batch), np.linalg.eigvalsh(batch.numpy()))


def test_a_tridiagonal_solver_that_fails_is_stood_in_for(monkeypatch):
    def fails(*args, **options):
        raise np.linalg.LinAlgError("stemr: no convergence")

    monkeypatch.setattr(_eigen, "eigh_tridiagonal", fails)
    assert_leading(CASES["wishart"], *leading_eigenpairs(CASES["wishart"], 32), 32)


def test_gradients_pass_through_torch():
    matrix = CASES["wishart"].clone().requires_grad_()
    values, _ = leading_eigenpairs(matrix, 4)
    values.sum().backward()
    torch.testing.assert_close(matrix.grad, torch.eye(300, dtype=torch.float64), atol=1e-10, rtol=0)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # what torch itself uses for make_dual
def test_transforms_pass_through_torch():
    batch = torch.stack([CASES["wishart"], CASES["rank 20"]])
    mapped = torch.vmap(lambda one: leading_eigenpairs(one, 8)[0])(batch)
    torch.testing.assert_close(mapped, symmetric_eigenvalues(batch), rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(torch.vmap(symmetric_eigenvalues)(batch), mapped, rtol=1e-12, atol=1e-10)
    matrix, direction = CASES["wishart"], torch.eye(300, dtype=torch.float64)
    ones = torch.ones(300, dtype=torch.float64)  # moving along the identity moves every eigenvalue alike
    torch.testing.assert_close(torch.func.jvp(symmetric_eigenvalues, (matrix,), (direction,))[1], ones)
    with forward_ad.dual_level():
        values, _ = leading_eigenpairs(forward_ad.make_dual(matrix, direction), 4)
        torch.testing.assert_close(forward_ad.unpack_dual(values).tangent, ones)
