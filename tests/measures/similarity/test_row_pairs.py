"""N x N measures block by block: the numbers of SciPy's dense ones, ties known, exact medians, refusals, sampled pairs."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist, pdist
from scipy.stats import rankdata, spearmanr

import tdgeom as tg
from tdgeom import functional as F
from tdgeom.measures.similarity.middle_distance import middle_distance
from tdgeom.measures.similarity.row_pairs import RowPairs, sampled_pairs

MODULES = [sys.modules[f"tdgeom.measures.similarity.{name}"] for name in ("row_pairs", "middle_distance")]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(MODULES[0], "_BLOCK", 7)
    monkeypatch.setattr(MODULES[1], "_SAMPLE", 8)
    monkeypatch.setattr(sys.modules["tdgeom.measures.similarity.rsa"], "_AT_ONCE", 50)


def pair(n=60, d=6, e=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    return x, x[:, :2] @ torch.randn(2, e, generator=g, dtype=torch.float64) + torch.randn(
        n, e, generator=g, dtype=torch.float64
    )


def centred_alignment(k, m):
    h = np.eye(len(k)) - 1 / len(k)
    k, m = h @ k @ h, h @ m @ h
    return (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())


def rbf(s):
    return np.exp(-cdist(s, s, "sqeuclidean") / (2 * np.median(pdist(s)) ** 2))


DENSE = {
    "rbf_cka": lambda x, y: centred_alignment(rbf(x), rbf(y)),
    "distance_correlation": lambda x, y: np.sqrt(centred_alignment(cdist(x, x), cdist(y, y))),
    "pearson": lambda x, y: np.corrcoef(pdist(x, "correlation"), pdist(y, "correlation"))[0, 1],
}
BLOCKED = {
    "rbf_cka": (F.rbf_cka, tg.RBFCKA),
    "distance_correlation": (F.distance_correlation, tg.DistanceCorrelation),
    "pearson": (
        lambda x, y, memory: F.rsa(x, y, comparison="pearson", memory=memory),
        lambda memory: tg.RSA(comparison="pearson", memory=memory),
    ),
}


@pytest.mark.parametrize("name", BLOCKED)
@pytest.mark.parametrize("memory", [1, 2**31])
@pytest.mark.parametrize("massive", [1, 1e4])
def test_blocks_are_the_dense_formula(name, memory, massive, small_blocks):
    x, y = pair(61)
    x[3] *= massive
    expected = DENSE[name](x.numpy(), y.numpy())
    function, stage = BLOCKED[name]
    assert float(function(x, y, memory=memory)) == pytest.approx(expected, rel=1e-9)
    assert float(stage(memory=memory)(sample_a=x, sample_b=y)) == pytest.approx(expected, rel=1e-9)
    graph = x.clone().requires_grad_()
    assert float(function(graph, y, memory=memory).detach()) == pytest.approx(expected, rel=1e-9)
    many = torch.stack([x, x.flip(0)])
    torch.testing.assert_close(
        torch.vmap(lambda a: function(a, y, memory=memory))(many),
        function(many, y, memory=memory),
        rtol=1e-12,
        atol=0,
    )


@settings(max_examples=25)
@given(
    seed=st.integers(0, 9999),
    n=st.integers(20, 60),
    kind=st.sampled_from(["plain", "integers", "copies", "massive"]),
)
def test_the_median_is_exact_in_any_memory(seed, n, kind):
    x, _ = pair(n, 3, seed=seed)
    if kind == "integers":
        x = x.round()
    if kind == "copies":
        x[: n // 2] = x[0]
    if kind == "massive":
        x[0] *= 1e6
    with pytest.MonkeyPatch.context() as patch:
        for module, setting, value in (
            (MODULES[0], "_BLOCK", 7),
            (MODULES[1], "_SAMPLE", 8),
            (MODULES[1], "_BINS", 16),
        ):
            patch.setattr(module, setting, value)
        pairs = RowPairs(x)
        held = float(middle_distance(pairs, 2**31))
        for room in (3, 40):
            low, high = MODULES[1]._within_brackets(
                pairs, ((n * (n - 1) // 2 - 1) // 2, n * (n - 1) // 4), room
            )
            assert float((low.sqrt() + high.sqrt()) / 2) == pytest.approx(held, rel=1e-12, abs=1e-12)
    assert held == pytest.approx(
        np.median(pdist(x.numpy())), rel=1e-7 if kind == "massive" else 1e-9, abs=1e-8
    )


@pytest.mark.parametrize("kind", ["correlation", "euclidean", "cosine"])
def test_near_pairs_keep_their_digits(kind):
    """Clusters far apart and narrow: what lies within one is lost to a difference of products."""
    x, _ = pair(30, 8)
    x[15:] = x[:15] * (1 + 1e-7) + 1e-6 * x[:15].flip(1)
    x = x + 100 * torch.eye(8, dtype=torch.float64)[torch.arange(30) % 5]
    found = F.rdm(x, kind).numpy()
    if kind == "euclidean":
        np.testing.assert_allclose(found, pdist(x.numpy()), rtol=1e-12)
        return
    z = x.numpy().astype(np.longdouble)
    z = z - z.mean(1, keepdims=True) if kind == "correlation" else z
    z = z / np.sqrt((z**2).sum(1, keepdims=True))
    right = np.array([((z[i] - z[j]) ** 2).sum() / 2 for i in range(30) for j in range(i + 1, 30)])
    np.testing.assert_allclose(np.sqrt(found), np.sqrt(right.astype(float)), rtol=0, atol=1e-15)


TIED = {
    "binary": lambda g: torch.randint(0, 2, (60, 9), generator=g),
    "ratings": lambda g: torch.randint(1, 6, (60, 4), generator=g),
    "one-hot": lambda g: torch.eye(7)[torch.randint(0, 7, (60,), generator=g)],
    "clusters": lambda g: 40 * torch.eye(6)[torch.randint(0, 6, (60,), generator=g)] + torch.randint(0, 2, (60, 6), generator=g),
}  # fmt: skip


@settings(max_examples=15)
@given(seed=st.integers(0, 9999), factor=st.sampled_from([0.1, 3.0, 1e-7, 1 / 3]), offset=st.integers(-9, 9))
@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("kind", ["euclidean", "cosine"])
def test_tied_dissimilarities_are_equal_in_any_unit(name, kind, seed, factor, offset):
    g = torch.Generator().manual_seed(seed)
    x, y = TIED[name](g).double() + 1, torch.randint(0, 3, (60, 5), generator=g).double() + 1
    exact = [np.rint(pdist(side.numpy(), "sqeuclidean")) for side in (x, y)]  # integers
    if kind == "cosine":
        exact = []
        for side in (x, y):
            z = side.numpy()
            i, j = np.triu_indices(60, 1)
            # equal cosines have equal squares, a ratio of integers; all products here are above 0
            exact.append(-np.round((z @ z.T)[i, j] ** 2 / ((z**2).sum(1)[i] * (z**2).sum(1)[j]), 12))
    right = spearmanr(*exact).statistic
    m = len(exact[0])
    signs = [np.sign(np.subtract.outer(e, e)) for e in exact]
    tau = (signs[0] * signs[1]).sum() / (m * (m - 1))
    moved = [factor * x, x + 0.0] + (
        [x + offset, factor * x + factor * offset] if kind == "euclidean" else []
    )
    for rows in moved:
        assert float(F.rsa(rows, y, kind)) == pytest.approx(right, abs=1e-9)
        assert float(F.rsa(rows, y, kind, "kendall_a")) == pytest.approx(tau, abs=1e-9)
    assert float(F.rsa(x, y.float(), kind)) == pytest.approx(right, abs=1e-9)


def test_rows_at_one_distance_from_each_other_have_no_order():
    simplex = 0.1 * torch.eye(12, dtype=torch.float64)
    for comparison in ("spearman", "pearson", "kendall_a"):
        with pytest.warns(tg.UndefinedMeasureWarning, match="all dissimilarities of one side are equal"):
            assert F.rsa(simplex, pair(12)[0], "euclidean", comparison).isnan()


def test_ranks_in_pieces_share_ties(small_blocks):
    module = sys.modules["tdgeom.measures.similarity.rsa"]
    for values in (torch.randint(0, 3, (500,)).double(), torch.randn(500).double(), torch.ones(120).double()):
        expected = rankdata(values.numpy())
        np.testing.assert_array_equal(module._rank_(values.clone()).numpy(), expected)


def test_ranks_beyond_memory_are_refused_with_what_to_do():
    x, y = pair(400)
    for call in (
        lambda **given: F.rsa(x, y, memory=2**20, **given),
        lambda **given: tg.RSA(memory=2**20, **given)(sample_a=x, sample_b=y),
    ):
        with pytest.raises(
            ValueError, match=r"79,800 pairs of N = 400 rows.*memory=1,048,576.*pairs_sample=.*pearson"
        ):
            call()
        assert call(pairs_sample=5000).isfinite() and call(comparison="pearson").isfinite()


@pytest.mark.parametrize("comparison", ["spearman", "pearson", "kendall_a"])
def test_sampled_pairs_are_the_same_on_both_sides(comparison):
    x, y = pair(80)
    i, j = sampled_pairs(80, 700, 3, x.device)
    assert len(set(zip(i.tolist(), j.tolist()))) == 700 and bool((i < j).all())
    a, b = ((side[i] - side[j]).norm(dim=-1).numpy() for side in (x, y))
    signs = [np.sign(np.subtract.outer(side, side)) for side in (a, b)]
    right = {
        "spearman": spearmanr(a, b).statistic,
        "pearson": np.corrcoef(a, b)[0, 1],
        "kendall_a": (signs[0] * signs[1]).sum() / (700 * 699),
    }[comparison]
    given = {"kind": "euclidean", "comparison": comparison, "pairs_sample": 700, "seed": 3}
    assert float(F.rsa(x, y, **given)) == pytest.approx(right, rel=1e-9)
    assert float(tg.RSA(**given)(sample_a=x, sample_b=y)) == pytest.approx(right, rel=1e-9)
    assert F.rsa(x, y, comparison=comparison, pairs_sample=10**6) == F.rsa(x, y, comparison=comparison)
    with pytest.raises(ValueError, match="pairs_sample counts pairs of rows, 3 or more"):
        F.rsa(x, y, pairs_sample=2)


def test_every_pair_is_as_likely_as_any():
    counts = torch.zeros(12, 12)
    for seed in range(2000):
        i, j = sampled_pairs(12, 20, seed, torch.device("cpu"))
        counts[i, j] += 1
    expected = 2000 * 20 / 66
    seen = counts[tuple(torch.triu_indices(12, 12, 1))]
    assert (
        float((seen - expected).square().sum() / expected) < 66 + 5 * (2 * 66) ** 0.5
        and counts.tril().sum() == 0
    )


def test_stages_keep_small_kernels_and_not_large_ones():
    x, _ = pair(50)
    assert tg.RBFCKA().prepare(x).matrix.shape == (50, 50)
    assert tg.RBFCKA(memory=8 * 50 * 50).prepare(x).rows.shape == (50, 6)
    assert tg.RSA(comparison="pearson", memory=8 * 50 * 50).prepare(x).rows.shape == (50, 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKED)
def test_memory_is_bounded_whatever_the_number_of_rows(name):
    import subprocess

    program = (
        "import resource, torch, tdgeom.functional as F\n"
        "x, y = torch.randn(20000, 8), torch.randn(20000, 8)\n"
        f"f = (lambda a, b: F.rsa(a, b, comparison='pearson')) if {name!r} == 'pearson' else getattr(F, {name!r}, None)\n"
        "f(x[:50], y[:50]); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "f(x, y); print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**31
