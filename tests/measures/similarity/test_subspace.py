"""Subspace novelty and the cosine between layers, against golden numbers and closed forms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

import tdgeom as tg
from tdgeom.core.warnings import UndefinedMeasureWarning
from tdgeom.measures.similarity.subspace import (
    LayerCosine,
    SubspaceNovelty,
    feature_subspace_novelty,
    layer_cosine_sim,
)

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
LAYERS = torch.from_numpy(np.load(GOLDEN / "inputs.npz")["layers"]).double()
NOVELTY = json.loads((GOLDEN / "reference.json").read_text())["tools"]["representation-geometry"]["novelty"]


def _eigenvectors(x):
    return torch.from_numpy(np.linalg.eigh(np.cov(x.numpy().T))[1][:, ::-1].copy())


def _basis(d, k, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, k, generator=g, dtype=torch.float64))[0]


@pytest.mark.parametrize("i", range(3))
def test_golden_novelty_and_cosine(i):
    a, b = LAYERS[i], LAYERS[i + 1]
    novelty, _ = SubspaceNovelty(k=16)(eigenvectors_a=_eigenvectors(a), eigenvectors_b=_eigenvectors(b))
    assert novelty.item() == pytest.approx(NOVELTY[i]["feature_subspace_novelty"], rel=1e-6)
    cosine = LayerCosine()(sample_a=a.float(), sample_b=b.float())
    assert cosine.item() == pytest.approx(NOVELTY[i]["layer_cosine_sim"], rel=1e-6)


def test_novelty_is_the_mean_sine_of_known_angles():
    angles = torch.tensor([0.1, 0.7, 1.5], dtype=torch.float64)
    u = torch.eye(6, 3, dtype=torch.float64)
    v = torch.cat([angles.cos().diag(), angles.sin().diag()])
    assert feature_subspace_novelty(u, v).item() == pytest.approx(angles.sin().mean().item(), abs=1e-14)


def test_tiny_angles_keep_their_digits():
    # sqrt(1 - cos²) would return 0 or 1.5e-8 here
    u = torch.eye(4, 1, dtype=torch.float64)
    v = torch.tensor([[1.0], [1e-10], [0.0], [0.0]], dtype=torch.float64)
    assert feature_subspace_novelty(u, v).item() == pytest.approx(1e-10, rel=1e-6)


@given(st.integers(0, 10_000), st.integers(1, 8))
def test_novelty_ignores_the_basis_and_a_common_rotation(seed, k):
    u, v = _basis(12, k, seed), _basis(12, k, seed + 1)
    turn, q = _basis(k, k, seed + 2), _basis(12, 12, seed + 3)
    value = feature_subspace_novelty(u, v)
    assert 0 <= value <= 1
    torch.testing.assert_close(feature_subspace_novelty(u @ turn, v), value, rtol=0, atol=1e-12)
    torch.testing.assert_close(feature_subspace_novelty(q @ u, q @ v), value, rtol=0, atol=1e-12)
    torch.testing.assert_close(feature_subspace_novelty(v, u), value, rtol=0, atol=1e-12)
    assert feature_subspace_novelty(u, u @ turn) < 1e-14 * 12


def test_k_is_cut_to_the_columns_there_are():
    u, v = _basis(12, 5, 0), _basis(12, 3, 1)
    expected = feature_subspace_novelty(u[:, :3], v)
    novelty, k_used = SubspaceNovelty(k=32)(eigenvectors_a=u, eigenvectors_b=v)
    assert novelty == expected and k_used == 3


@pytest.mark.parametrize(("n", "rank"), [(20, 19), (5, 4), (3000, 16)])
def test_no_direction_beyond_the_rank_is_used(n, rank):
    basis = torch.randn(16, 64)
    x = torch.randn(n, 16) @ basis if rank == 16 else torch.randn(n, 64)
    y = x * (1 + 1e-4 * torch.rand(64)) if rank == 16 else x + 1e-4 * torch.randn(n, 64)
    td = TensorDict({("tokens", "a"): x, ("tokens", "b"): y})
    for stage in (tg.StreamingCovariance(), tg.EigenSpectrum(k=32)):
        td = tg.ForEach(stage, ["a", "b"])(td)
    with pytest.warns(
        tg.FewRowsWarning, match=rf"SubspaceNovelty: few directions, {rank} of the k=32.*at a->b"
    ):
        td = tg.ForEachPair(tg.SubspaceNovelty(), ["a", "b"])(td)
    u, v = (
        torch.linalg.svd((t - t.mean(0)).double(), full_matrices=False)[2][:rank]
        for t in (x.double(), y.double())
    )
    expected = (1 - torch.linalg.svdvals(u @ v.T).square()).clamp(min=0).sqrt().mean()
    assert int(td["between", "a->b", "k_used"]) == rank
    assert float(td["between", "a->b", "feature_subspace_novelty"]) == pytest.approx(
        float(expected), abs=1e-6
    )


def test_items_of_a_batch_have_their_own_rank():
    u, v = torch.stack([_basis(9, 4, s) for s in (0, 1)]), torch.stack([_basis(9, 4, s) for s in (2, 3)])
    values = torch.tensor([[4.0, 3, 2, 1, 0, 0, 0, 0, 0], [4.0, 3, 1e-16, 1e-17, 0, 0, 0, 0, 0]])
    with pytest.warns(tg.FewRowsWarning, match="few directions, 2 of the k=4"):
        novelty, k_used = SubspaceNovelty()(u, v, values, values)
    assert k_used.tolist() == [4, 2]
    for i, k in enumerate(k_used.tolist()):
        assert float(novelty[i]) == pytest.approx(float(feature_subspace_novelty(u[i, :, :k], v[i, :, :k])))


def test_novelty_batches_over_leading_dimensions():
    u, v = torch.stack([_basis(9, 4, s) for s in (0, 1)]), torch.stack([_basis(9, 4, s) for s in (2, 3)])
    expected = torch.stack([feature_subspace_novelty(u[i], v[i]) for i in range(2)])
    torch.testing.assert_close(feature_subspace_novelty(u, v), expected)


def test_unequal_widths_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"equal D.*linear_cka"):
        feature_subspace_novelty(_basis(12, 3, 0), _basis(10, 3, 0))
    with pytest.raises(ValueError, match="first k = 2"):
        feature_subspace_novelty(_basis(12, 3, 0), _basis(12, 2, 0))
    with pytest.raises(ValueError, match="linear_cka and procrustes"):
        layer_cosine_sim(torch.randn(5, 3), torch.randn(5, 4))
    with pytest.raises(ValueError, match="1 or more"):
        SubspaceNovelty(k=0)


@given(st.integers(0, 10_000), st.floats(1e-6, 1e6))
def test_cosine_ignores_a_common_rotation_and_row_scale(seed, scale):
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(20, 6, generator=g, dtype=torch.float64) for _ in range(2))
    q = _basis(6, 6, seed)
    value = layer_cosine_sim(x, y)
    torch.testing.assert_close(layer_cosine_sim(x @ q, y @ q), value, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer_cosine_sim(scale * x, y), value, rtol=0, atol=1e-12)


def test_cosine_of_identical_rows_is_one_at_any_scale():
    x = torch.randn(50, 7)
    for scale in (1e-30, 1e-5, 1.0, 1e30):
        assert layer_cosine_sim(x * scale, x * scale).item() == pytest.approx(1, abs=1e-15)


def test_zero_rows_are_left_out_and_all_zero_is_undefined():
    x, y = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    expected = torch.nn.functional.cosine_similarity(x[1:], y[1:]).mean()
    x[0] = 0
    torch.testing.assert_close(layer_cosine_sim(x, y), expected)
    with pytest.warns(UndefinedMeasureWarning, match="layer_cosine_sim"):
        assert layer_cosine_sim(torch.zeros(3, 2), torch.ones(3, 2)).isnan()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_not_left_out(bad):
    x, y = torch.randn(6, 4), torch.randn(6, 4)
    x[2, 1] = bad
    with pytest.warns(UndefinedMeasureWarning, match="not finite"):
        assert layer_cosine_sim(x, y).isnan()


def test_sites_without_directions_are_undefined_with_one_warning():
    u = torch.stack([torch.eye(5)[:, :2], torch.full((5, 2), torch.nan)])
    with pytest.warns(UndefinedMeasureWarning, match="feature_subspace_novelty.*not finite") as caught:
        value = feature_subspace_novelty(u, torch.eye(5)[:, 1:3].expand(2, 5, 2))
    assert len(caught) == 1 and value[1].isnan()
    assert value[0] == pytest.approx(0.5)
