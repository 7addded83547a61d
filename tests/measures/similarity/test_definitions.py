"""Measures without a golden number, against their definitions in NumPy, SciPy and scikit-learn."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.spatial.distance import cdist, pdist
from scipy.stats import kendalltau, spearmanr
from sklearn.cross_decomposition import CCA as SkCCA
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from tdgeom.measures.similarity.cca import cca_mean, cca_r2, pwcca_ab, pwcca_ba, svcca
from tdgeom.measures.similarity.cknna import CKNNA, cknna
from tdgeom.measures.similarity.kernel_alignment import distance_correlation, rbf_cka
from tdgeom.measures.similarity.linear_cka import linear_cka, linear_cka_debiased
from tdgeom.measures.similarity.linear_r2 import linear_r2_ab, linear_r2_ba
from tdgeom.measures.similarity.matching import soft_matching
from tdgeom.measures.similarity.rsa import rdm, rsa


def _pair(n=60, d=6, e=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    y = x[:, :2] @ torch.randn(2, e, generator=g, dtype=torch.float64)
    return x, y + torch.randn(n, e, generator=g, dtype=torch.float64)


def hsic1(k, m):
    """Song et al. 2012, from N x N kernels."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    ones = np.ones(n)
    middle = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    return ((k * m.T).sum() + middle - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))


def debiased(x, y):
    x, y = (np.asarray(side, dtype=np.float64) for side in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    k, m = x @ x.T, y @ y.T
    return hsic1(k, m) / np.sqrt(hsic1(k, k) * hsic1(m, m))


@pytest.mark.parametrize("shape", [(60, 6, 4), (20, 40, 30), (20, 40, 5), (20, 5, 40), (4, 3, 2), (30, 1, 1)])
def test_debiased_cka_is_song_hsic(shape):
    x, y = _pair(shape[0], max(shape[1], 2), shape[2])
    x = x[:, : shape[1]]
    assert linear_cka_debiased(x, y).item() == pytest.approx(debiased(x, y), rel=1e-9)
    centred = [np.asarray(s - s.mean(0)) for s in (x, y)]
    k, m = (c @ c.T for c in centred)
    expected = (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())
    assert linear_cka(x, y).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [30, 85, 100, 300])
def test_debiased_cka_of_float32_rows_beside_a_massive_one(n):
    x, y = _pair(n, 90, 80)
    y = y + x[:, :80]
    x[1, 3] += 3000
    y[1, 3] += 3000
    x, y = x.float(), y.float()
    assert linear_cka_debiased(x, y).item() == pytest.approx(debiased(x, y), abs=1e-6)


def test_independent_data_is_at_zero_debiased_and_far_from_it_biased():
    values = []
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        x, y = torch.randn(256, 768, generator=g), torch.randn(256, 768, generator=g)
        values.append(linear_cka_debiased(x, y).item())
    values = np.array(values)
    assert abs(values.mean()) < 4 * values.std(ddof=1) / np.sqrt(8) < 0.01
    assert values.min() < 0  # never clamped
    assert linear_cka(x, y).item() == pytest.approx(0.75, abs=0.01)


def test_cca_against_scikit_learn():
    x, y = _pair()
    model = SkCCA(n_components=4, max_iter=10_000, tol=1e-12).fit(x.numpy(), y.numpy())
    a, b = model.transform(x.numpy(), y.numpy())
    expected = np.mean([np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(4)])
    assert cca_mean(x, y).item() == pytest.approx(expected, rel=1e-6)


def _pwcca(x, y):
    """Morcos et al. with explicit canonical variables, by QR."""
    x, y = (np.asarray(s - s.mean(0)) for s in (x, y))
    qx, qy = np.linalg.qr(x)[0], np.linalg.qr(y)[0]
    u, rho, _ = np.linalg.svd(qx.T @ qy, full_matrices=False)
    weights = np.abs((qx @ u).T @ x).sum(1)
    return (weights * rho).sum() / weights.sum()


def test_pwcca_against_explicit_canonical_variables():
    x, y = _pair()
    assert pwcca_ab(x, y).item() == pytest.approx(_pwcca(x, y), rel=1e-9)
    assert pwcca_ba(x, y).item() == pytest.approx(_pwcca(y, x), rel=1e-9)
    assert pwcca_ab(x, y) != pwcca_ba(x, y)


def test_pwcca_of_equal_correlations_takes_the_principal_axes():
    """Three features are shared, so three correlations are 1: by the definition alone any rotation of them would do."""
    x, _ = _pair(d=6)
    y = torch.cat([x[:, :3] @ torch.randn(3, 3, dtype=torch.float64), _pair(seed=1)[1]], 1)
    centred = np.asarray(x - x.mean(0))
    basis, other = (np.linalg.qr(np.asarray(side - side.mean(0)))[0] for side in (x, y))
    u, rho, _ = np.linalg.svd(basis.T @ other, full_matrices=False)
    assert np.allclose(rho[:3], 1) and rho[3] < 0.99
    h = basis @ u
    axes = PCA().fit(h[:, :3] @ h[:, :3].T @ centred).transform(h[:, :3] @ h[:, :3].T @ centred)[:, :3]
    h[:, :3] = axes / np.linalg.norm(axes, axis=0)
    weights = np.abs(h.T @ centred).sum(1)
    expected = (weights * rho).sum() / weights.sum()
    assert pwcca_ab(x, y).item() == pytest.approx(expected, rel=1e-9)
    order = torch.randperm(len(x))
    turned = y @ torch.randn(7, 7, dtype=torch.float64) + 3
    assert pwcca_ab(1e3 * x[order] + 10, turned[order]).item() == pytest.approx(expected, rel=1e-7)


def test_svcca_against_its_recipe():
    x, y = _pair(d=12)
    x = x * torch.logspace(0, -3, 12)

    def reduced(s):
        c = np.asarray(s - s.mean(0))
        u, sv, _ = np.linalg.svd(c, full_matrices=False)
        keep = np.searchsorted(np.cumsum(sv**2) / (sv**2).sum(), 0.99) + 1
        return u[:, :keep]

    a, b = reduced(x), reduced(y)
    assert a.shape[1] < 12
    expected = np.linalg.svd(a.T @ b, compute_uv=False).mean()
    assert svcca(x, y).item() == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="share of the variance"):
        svcca(x, y, variance=1.5)


def dependent_features(n, dtype, offset):
    """Wide sites of rank 6 and 7, rounded to ``dtype``, and the few columns that they are made of."""
    g = torch.Generator().manual_seed(0)
    few = torch.randn(n, 10, generator=g, dtype=torch.float64)
    x, y = few[:, :6], torch.cat([few[:, :3], few[:, 6:]], 1)
    wide = [f @ torch.randn(f.shape[1], d, generator=g, dtype=torch.float64) for f, d in ((x, 40), (y, 30))]
    return (x, y), [(rows + offset).to(dtype) for rows in wide]


@pytest.mark.parametrize("offset", [0, 10, 1000])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6), (torch.bfloat16, 1e-3)]
)
def test_rounding_of_dependent_features_is_no_direction(dtype, tolerance, offset):
    if dtype == torch.bfloat16 and offset == 1000:
        offset = 1  # 1000 leaves it no digits
    (x, y), (a, b) = dependent_features(500, dtype, offset)
    for name in (cca_mean, cca_r2):
        assert name(a, b).item() == pytest.approx(name(x, y).item(), abs=tolerance)
    exact = [side.double().numpy() for side in dependent_features(500, torch.float64, 0)[1]]
    for name, (p, q) in ((linear_r2_ab, (0, 1)), (linear_r2_ba, (1, 0))):
        few, wide = (x, y)[p].numpy(), exact[q]
        expected = Ridge(alpha=1e-12).fit(few, wide)
        score = r2_score(wide, expected.predict(few), multioutput="variance_weighted")
        assert name(a, b).item() == pytest.approx(score, abs=tolerance)


def test_rows_that_are_all_rounding_keep_a_value():
    x = 1000 + torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float16, torch.bfloat16):
        rounded = x.to(dtype)
        expected = cca_mean(rounded[:, :3].double(), rounded[:, 3:].double()).item()
        assert cca_mean(rounded[:, :3], rounded[:, 3:]).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("ridge", [0.0, 0.3, 20.0])
def test_linear_r2_against_scikit_learn(ridge):
    x, y = _pair()
    for a, b, value in ((x, y, linear_r2_ab(x, y, ridge)), (y, x, linear_r2_ba(x, y, ridge))):
        a, b = a.numpy(), b.numpy()
        alpha = ridge * ((a - a.mean(0)) ** 2).sum() / a.shape[1]
        fitted = Ridge(alpha=alpha).fit(a, b).predict(a)
        assert value.item() == pytest.approx(r2_score(b, fitted, multioutput="variance_weighted"), rel=1e-8)
    with pytest.raises(ValueError, match="0 or more"):
        linear_r2_ab(x, y, ridge=-1)


@pytest.mark.parametrize("fraction", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("n", [40, 41])
def test_rbf_cka_against_its_definition(n, fraction):
    x, y = _pair(n)

    def kernel(s):
        k = np.exp(-cdist(s, s, "sqeuclidean") / (2 * (fraction * np.median(pdist(s))) ** 2))
        h = np.eye(n) - 1 / n
        return h @ k @ h

    k, m = kernel(x.numpy()), kernel(y.numpy())
    expected = (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())
    assert rbf_cka(x, y, fraction).item() == pytest.approx(expected, rel=1e-10)


def test_distance_correlation_against_its_definition():
    x, y = _pair(50)

    def centred(s):
        a = cdist(s, s)
        return a - a.mean(0) - a.mean(1)[:, None] + a.mean()

    a, b = centred(x.numpy()), centred(y.numpy())
    expected = np.sqrt((a * b).mean() / np.sqrt((a * a).mean() * (b * b).mean()))
    assert distance_correlation(x, y).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("kind", ["correlation", "euclidean", "cosine"])
def test_rsa_against_scipy(kind):
    x, y = _pair(30)
    a, b = pdist(x.numpy(), kind), pdist(y.numpy(), kind)
    np.testing.assert_allclose(rdm(x, kind), a, rtol=1e-10)
    assert rsa(x, y, kind).item() == pytest.approx(spearmanr(a, b).statistic, rel=1e-10)
    assert rsa(x, y, kind, "pearson").item() == pytest.approx(np.corrcoef(a, b)[0, 1], rel=1e-10)
    assert rsa(x, y, kind, "kendall_a").item() == pytest.approx(kendalltau(a, b).statistic, rel=1e-10)


def test_rsa_shares_ranks_among_ties():
    x = torch.tensor([[0.0], [1.0], [2.0], [4.0], [4.0]]).double()
    y = torch.tensor([[0.0], [1.0], [3.0], [3.0], [5.0]]).double()
    a, b = pdist(x.numpy()), pdist(y.numpy())
    assert rsa(x, y, "euclidean").item() == pytest.approx(spearmanr(a, b).statistic, rel=1e-12)
    signs = [
        np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i in range(len(a)) for j in range(i)
    ]  # every pair of pairs, ties 0
    assert rsa(x, y, "euclidean", "kendall_a").item() == pytest.approx(np.mean(signs), rel=1e-12)


def _cknna(x, y, k):
    """The published code, dense, without its 1e-6."""
    n = len(x)
    grams = [np.asarray(s @ s.T) for s in (x, y)]
    masks = []
    for gram in grams:
        hat = gram - np.diag(np.full(n, np.inf))
        mask = np.zeros((n, n))
        np.put_along_axis(mask, np.argsort(-hat, axis=1)[:, :k], 1, axis=1)
        masks.append(mask)
    (k_, l_), (mk, ml) = grams, masks
    m = mk * ml
    return hsic1(m * k_, m * l_) / np.sqrt(hsic1(mk * k_, mk * k_) * hsic1(ml * l_, ml * l_))


@pytest.mark.parametrize("k", [2, 5, 20])
def test_cknna_against_the_dense_formula(k):
    x, y = _pair(50)
    assert cknna(x, y, k).item() == pytest.approx(_cknna(x, y, k), rel=1e-9)
    assert CKNNA(k=k)(sample_a=x, sample_b=y) == cknna(x, y, k)
    with pytest.raises(ValueError, match="2 <= k < N"):
        cknna(x, y, 50)


def test_cknna_over_several_blocks(monkeypatch):
    x, y = _pair(50)
    expected = cknna(x, y)
    monkeypatch.setattr(sys.modules["tdgeom.measures.similarity.cknna"], "_BLOCK", 7)
    torch.testing.assert_close(cknna(x, y), expected)


def _transport(x, y):
    c = np.corrcoef(x.T, y.T)[: x.shape[1], x.shape[1] :]
    d, e = c.shape
    rows = [np.kron(np.eye(d)[i], np.ones(e)) for i in range(d)]
    columns = [np.kron(np.ones(d), np.eye(e)[j]) for j in range(e)]
    bounds = np.r_[np.full(d, 1 / d), np.full(e, 1 / e)]
    return -linprog(-c.ravel(), A_eq=np.stack(rows + columns), b_eq=bounds).fun


@pytest.mark.parametrize("shape", [(6, 6), (6, 4), (5, 3), (4, 1)])
def test_soft_matching_is_the_optimal_transport(shape):
    x, y = _pair(40, *shape)
    assert soft_matching(x, y).item() == pytest.approx(_transport(x.numpy(), y.numpy()), rel=1e-9)


def test_soft_matching_as_a_linear_programme(monkeypatch):
    x, y = _pair(40, 6, 4)
    expected = soft_matching(x, y).item()
    monkeypatch.setattr(sys.modules["tdgeom.measures.similarity.matching"], "_ASSIGNMENT_LIMIT", 0)
    assert soft_matching(x, y).item() == pytest.approx(expected, rel=1e-9)
