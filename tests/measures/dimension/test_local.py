"""Local estimators: other tools' numbers, plain loops over rows, known manifolds, copies, units, degenerate rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA
from tensordict import TensorDict

from tdgeom import UndefinedMeasureWarning
from tdgeom.measures.dimension.ca_pca import CAPCA, ca_pca, ca_pca_dimension
from tdgeom.measures.dimension.likelihood import MOM, LevinaBickel, levina_bickel, mom
from tdgeom.measures.dimension.local import LocalKNN, LocalPCA, local_knn, local_pca
from tdgeom.measures.dimension.tle import TLE, tle
from tdgeom.measures.neighbors.nearest_neighbors import NearestNeighbors

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
ESTIMATORS = {
    "levina_bickel": (levina_bickel, LevinaBickel, {"k": 10}),
    "mom": (mom, MOM, {"k": 10}),
    "tle": (tle, TLE, {"k": 10}),
    "local_knn": (local_knn, LocalKNN, {"k": 8}),
    "local_pca": (local_pca, LocalPCA, {"k": 12}),
    "ca_pca": (ca_pca, CAPCA, {"k": 12}),
}
every = pytest.mark.parametrize("name", list(ESTIMATORS))


def run(name: str, x: torch.Tensor):
    function, _, given = ESTIMATORS[name]
    return function(x, **given)


@pytest.fixture(scope="module")
def layers() -> torch.Tensor:
    with np.load(GOLDEN / "inputs.npz") as data:
        return torch.from_numpy(data["layers"])


@pytest.fixture(scope="module")
def tools() -> dict:
    return json.loads((GOLDEN / "reference.json").read_text())["tools"]


@pytest.mark.parametrize(
    "function, k, tool, key",
    [
        (levina_bickel, 20, "scikit-dimension", "mle_k20"),
        (mom, 20, "scikit-dimension", "mom_k20"),
        (local_knn, 10, "tdhook", "local_knn_k10_mean"),
    ],
)
def test_other_tools(layers, tools, function, k, tool, key):
    expected = torch.tensor(tools[tool][key], dtype=torch.float64)
    torch.testing.assert_close(function(layers, k=k).estimate, expected, rtol=1e-6, atol=0)


def neighbours(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    distance = cdist(x, x)
    np.fill_diagonal(distance, np.inf)
    index = np.argsort(distance, 1)[:, :k]
    return np.take_along_axis(distance, index, 1), index


def tight_row(x: np.ndarray, centre: np.ndarray, near: np.ndarray, epsilon: float) -> float:
    """Amsaleg et al. 2019, measurement by measurement."""
    r, k = near[-1], len(near)
    count, total = 0, 0.0
    for i in range(k):
        if near[i] / r >= epsilon:
            count += 1
            total += 2 * np.log(near[i] / r)
        for j in range(k):
            if i == j:
                continue
            seen = []
            for other in (x[j], 2 * centre - x[j]):
                square = ((x[i] - other) ** 2).sum()
                b = near[i] ** 2 + square - near[j] ** 2
                if near[i] == r:
                    seen.append(r * square / (r**2 + square - near[j] ** 2))
                else:
                    a = r**2 - near[i] ** 2
                    seen.append(r * (np.sqrt(b * b + 4 * square * a) - b) / (2 * a))
            if min(seen) / r >= epsilon:
                count += 1
                total += np.log(seen[0] / r) + np.log(seen[1] / r)
    return -2 * count / total


def test_tle_is_the_papers_sum(layers):
    x = layers[0, :60].double().numpy()
    near, index = neighbours(x, 9)
    expected = [tight_row(x[index[i]], x[i], near[i], 1e-4) for i in range(60)]
    local = TLE(k=9, pointwise=True)(sample=torch.from_numpy(x))[-1]
    np.testing.assert_allclose(local.numpy(), expected, rtol=1e-9)


def test_tle_drops_what_is_too_close_relative_to_the_radius():
    x = torch.randn(40, 3, dtype=torch.float64)
    x[1] = x[0] + 1e-6
    near, index = neighbours(x.numpy(), 6)
    for unit in (1.0, 1e-6):
        local = TLE(k=6, pointwise=True)(sample=x * unit)[-1]
        expected = [tight_row(x.numpy()[index[i]], x.numpy()[i], near[i], 1e-4) for i in range(40)]
        np.testing.assert_allclose(local.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("width", [5, 40])
def test_local_pca_is_pca_of_each_neighbourhood(width):
    x = torch.randn(80, width, dtype=torch.float64) * torch.linspace(0.01, 1, width).square()
    _, index = neighbours(x.numpy(), 15)
    spectra = [PCA().fit(x.numpy()[rows]).explained_variance_ for rows in index]
    local = LocalPCA(k=15, pointwise=True)(sample=x)[-1]
    np.testing.assert_array_equal(local.numpy(), [(s > 0.05 * s[0]).sum() for s in spectra])
    local = LocalPCA(k=15, rule="participation_ratio", pointwise=True)(sample=x)[-1]
    np.testing.assert_allclose(local.numpy(), [s.sum() ** 2 / (s**2).sum() for s in spectra], rtol=1e-9)


def largest_gap(values: np.ndarray) -> int:
    """Before which of the eigenvalues above rounding the quotient of neighbours is largest; all of them where they end."""
    above = values[values > 1e-13 * values[0]]
    if len(above) < len(values):
        return len(above)
    return int(np.argmax(above[:-1] / above[1:])) + 1


@pytest.mark.parametrize("width, k", [(5, 15), (40, 15), (3, 8), (6, "auto")])
def test_the_largest_gap_of_each_neighbourhood(width, k):
    x = torch.randn(80, width, dtype=torch.float64) * torch.linspace(0.05, 1, width).square()
    number = 8 if k == "auto" else k  # the root of 80
    _, index = neighbours(x.numpy(), number)
    spectra = [np.linalg.svd(x.numpy()[rows] - x.numpy()[rows].mean(0))[1] ** 2 for rows in index]
    expected = [largest_gap(values[: min(number - 1, width)]) for values in spectra]
    local = LocalPCA(k=k, rule="maxgap", pointwise=True)(sample=x)[-1]
    np.testing.assert_array_equal(local.numpy(), expected)
    assert local_pca(x, k=k, rule="maxgap").estimate == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("dimension", [1, 2, 4])
def test_flat_rows_end_at_their_dimension(dimension):
    g = torch.Generator().manual_seed(dimension)
    flat = (
        torch.randn(300, dimension, generator=g, dtype=torch.float64)
        @ torch.randn(dimension, 12, generator=g).double()
    )
    noisy = flat + 1e-3 * torch.randn(300, 12, generator=g)
    for rows in (flat, 1e6 * flat, flat + 7.0, noisy):
        assert local_pca(rows, k="auto", rule="maxgap").estimate == pytest.approx(dimension, abs=0.02)


@pytest.mark.parametrize("width", [4, 30])
def test_ca_pca_is_the_best_curved_ball_of_each_neighbourhood(width):
    x = torch.randn(70, width, dtype=torch.float64)
    near, index = neighbours(x.numpy(), 13)
    expected = []
    for i in range(70):
        values = np.zeros(width)
        found = PCA().fit(x.numpy()[index[i]]).explained_variance_
        values[: len(found)] = found / near[i, -2:].mean() ** 2
        scores = []
        for d in range(1, width + 1):
            tail = values[d:].sum()
            ball = np.full(d, 1 / (d + 2))
            scores.append(np.linalg.norm(ball - values[:d] - (3 * d + 4) / (d * (d + 4)) * tail) + 2 * tail)
        expected.append(1 + np.argmin(scores))
    np.testing.assert_array_equal(CAPCA(k=12, pointwise=True)(sample=x)[-1].numpy(), expected)


def test_ca_pca_sees_through_curvature():
    """A flat ball's spectrum gives d, and so does that of a strongly curved surface, where counting is fooled."""
    for d in range(1, 9):
        ball = torch.nn.functional.pad(torch.full((d,), 1 / (d + 2)), (0, 10 - d))
        assert ca_pca_dimension(ball) == d
    u = torch.rand(3000, 2) * 2 - 1
    bowl = torch.cat((u, 1.5 * u.square().sum(-1, keepdim=True)), -1)
    assert ca_pca(bowl, k=60).estimate == pytest.approx(2, abs=0.05)
    assert local_pca(bowl, k=600).estimate > 2.5


@every
def test_manifold_of_known_dimension(name):
    g = torch.Generator().manual_seed(0)
    sphere = torch.nn.functional.normalize(torch.randn(2500, 4, generator=g), dim=-1) @ torch.randn(
        4, 15, generator=g
    )
    function, _, _ = ESTIMATORS[name]
    k = {"local_knn": 15, "local_pca": 40, "ca_pca": 60}.get(name, 25)
    assert function(sphere, k=k).estimate == pytest.approx(3, rel=0.15)


@every
@pytest.mark.parametrize("share", [0.02, 0.15])
def test_copies_are_counted_and_move_nothing(name, share):
    x = torch.randn(300, 5)
    copies = int(share * 300)
    dirty = torch.cat((x, x[torch.randint(0, 300, (copies,))]))[torch.randperm(300 + copies)]
    plain, repeated = run(name, x), run(name, dirty)
    assert repeated.duplicates == copies and repeated.rows == 300
    torch.testing.assert_close(repeated.estimate, plain.estimate, rtol=1e-9, atol=0)


@every
def test_batches_equal_items(name):
    x = torch.randn(2, 2, 90, 5)
    x[1, 0, 50:60] = x[1, 0, :10]
    whole = run(name, x)
    for i in range(2):
        for j in range(2):
            for leaf, item in zip(whole, run(name, x[i, j])):
                torch.testing.assert_close(leaf[i, j], item, rtol=1e-9, atol=0)


@every
@settings(max_examples=6)
@given(exponent=st.floats(-6, 6), offset=st.sampled_from([0.0, 10.0, 1000.0]), seed=st.integers(0, 2**20))
def test_invariance(name, exponent, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(80, 4, dtype=torch.float64, generator=generator)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=generator)).Q
    plain, moved = run(name, x), run(name, (x @ rotation + offset) * 10.0**exponent)
    torch.testing.assert_close(moved.estimate, plain.estimate, rtol=1e-7, atol=0)
    torch.testing.assert_close(moved.scale, plain.scale * 10.0**exponent, rtol=1e-7, atol=0)


@every
@pytest.mark.parametrize("dtype, rtol", [(torch.float16, 0.005), (torch.bfloat16, 0.03)])
def test_half_precision(name, dtype, rtol):
    x = torch.randn(400, 5)
    assert run(name, x.to(dtype)).estimate == pytest.approx(float(run(name, x).estimate), rel=rtol)


@every
@pytest.mark.parametrize("duplicated", [False, True])
def test_a_table_serves_as_well_as_the_sample(name, duplicated):
    x = torch.randn(150, 5)
    if duplicated:
        x[100:130] = x[:30]
    _, stage, given = ESTIMATORS[name]
    td = NearestNeighbors(20)(TensorDict({"sample": x}))
    stage(**given, pointwise=True, out_keys=("dimension", "own"))(td)
    stage(**given, pointwise=True, source="neighbors", out_keys=("dimension", "served"))(td)
    for leaf in ("estimate", "standard_error", "scale", "rows", "duplicates", "pointwise"):
        torch.testing.assert_close(
            td["dimension", "served", leaf], td["dimension", "own", leaf], rtol=1e-9, atol=0, equal_nan=True
        )
    assert td["dimension", "own", "pointwise"].isnan().sum() == 30 * duplicated


@every
def test_the_stage_writes_under_its_name(name):
    _, stage, given = ESTIMATORS[name]
    x = torch.randn(60, 4)
    result = stage(**given)(TensorDict({"sample": x}))["dimension", name]
    for leaf, value in run(name, x)._asdict().items():
        torch.testing.assert_close(result[leaf], value)


@every
def test_all_rows_alike_is_nan_with_one_reason(name):
    with pytest.warns(UndefinedMeasureWarning, match="no row has") as caught:
        result = run(name, torch.ones(30, 3))
    assert len(caught) == 1
    assert result.estimate.isnan() and result.rows == 0 and result.duplicates == 29


@pytest.mark.parametrize("name", ["levina_bickel", "mom", "tle", "local_knn"])
def test_all_distances_alike_is_nan_never_zero(name):
    with pytest.warns(UndefinedMeasureWarning, match="no row has"):
        result = run(name, torch.eye(24))
    assert result.estimate.isnan()


@every
def test_k_is_checked(name):
    function, stage, _ = ESTIMATORS[name]
    with pytest.raises(ValueError, match="rows, got 12"):
        function(torch.randn(12, 3), k=12)
    with pytest.raises(ValueError, match="of neighbours, at least"):
        stage(k=0)
    with pytest.raises(ValueError, match="of neighbours, at least"):
        stage(k=2.5)
    td = NearestNeighbors(3)(TensorDict({"sample": torch.randn(20, 3)}))
    with pytest.raises(ValueError, match=r"table has 3 .*NearestNeighbors\(k="):
        stage(k=5, source="neighbors")(td)


@pytest.mark.parametrize("name", ["levina_bickel", "mom", "tle", "local_knn"])
@pytest.mark.parametrize("copies", [0, 4])
def test_gradients_are_those_of_the_estimate(name, copies):
    x = torch.randn(24, 3, dtype=torch.float64)
    if copies:  # moved together with what they copy
        torch.autograd.gradcheck(lambda x: run(name, torch.cat((x, x[:copies]))).estimate, x.requires_grad_())
    else:
        torch.autograd.gradcheck(lambda x: run(name, x).estimate, x.requires_grad_())


def test_neighbourhoods_of_copies_have_no_part_in_the_gradient():
    x = torch.randn(40, 3, dtype=torch.float64)
    gradients = []
    for rows in (x, torch.cat((x, x[:5]))):
        rows = rows.clone().requires_grad_()
        local_pca(rows, k=10, rule="participation_ratio").estimate.backward()
        gradients.append(rows.grad)
    assert (gradients[1][40:] == 0).all()
    torch.testing.assert_close(gradients[1][:40], gradients[0])


def test_auto_k_follows_the_number_of_rows():
    x = torch.randn(90, 3)
    for function in (local_knn, ca_pca, lambda x, k="auto": local_pca(x, k=k)):
        torch.testing.assert_close(function(x).estimate, function(x, k=9).estimate)
        with pytest.raises(ValueError, match=r"rows of shape \(..., N, D\), got \(90,\)"):
            function(x[:, 0])
    torch.testing.assert_close(local_knn(x[:7]).estimate, local_knn(x[:7], k=2).estimate)


def test_a_small_memory_budget_changes_nothing():
    x = torch.randn(90, 6)
    for function in (tle, local_pca, ca_pca):
        torch.testing.assert_close(function(x, k=10, memory=2**12).estimate, function(x, k=10).estimate)


def test_standard_error_is_of_the_right_size_for_independent_rows():
    """Rows drawn independently from the model: then the error is that of the mean."""
    from tdgeom.measures.dimension.likelihood import levina_bickel_from_distances, mom_from_distances
    from tdgeom.measures.dimension.local import local_knn_from_distances

    r = torch.from_numpy(np.random.default_rng(0).exponential(size=(300, 400, 20)).cumsum(-1) ** (1 / 5))
    for function, k in (
        (levina_bickel_from_distances, 20),
        (mom_from_distances, 20),
        (local_knn_from_distances, 10),
    ):
        result, _ = function(r, k=k)
        torch.testing.assert_close(result.standard_error.mean(), result.estimate.std(), rtol=0.15, atol=0)
