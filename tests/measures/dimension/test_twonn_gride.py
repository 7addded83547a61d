"""TwoNN and Gride: other tools' numbers, the estimators' own model, manifolds, copies, precision, units."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from tensordict import TensorDict

from tdgeom import UndefinedMeasureWarning
from tdgeom.measures.dimension.gride import Gride, gride, gride_from_distances, gride_ranks
from tdgeom.measures.dimension.twonn import TwoNN, twonn, twonn_curve, twonn_from_distances
from tdgeom.measures.neighbors.nearest_neighbors import NearestNeighbors

GOLDEN = Path(__file__).parents[2] / "data" / "golden"


@pytest.fixture(scope="module")
def layers() -> torch.Tensor:
    with np.load(GOLDEN / "inputs.npz") as data:
        return torch.from_numpy(data["layers"])


@pytest.fixture(scope="module")
def tools() -> dict:
    return json.loads((GOLDEN / "reference.json").read_text())["tools"]


def close(actual: torch.Tensor, expected: object, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=0)


def test_dadapy_twonn(layers, tools):
    fit, ml = twonn(layers), twonn(layers, method="ml")
    close(fit.estimate, [row[0] for row in tools["dadapy"]["two_nn_fit_0.9"]])
    close(fit.scale, [row[2] for row in tools["dadapy"]["two_nn_fit_0.9"]])
    close(ml.estimate, [row[0] for row in tools["dadapy"]["two_nn_ml"]])


def test_scikit_dimension_and_tdhook_twonn(layers, tools):
    close(twonn(layers).estimate, tools["scikit-dimension"]["two_nn_linear"])
    close(twonn(layers, discard=0).estimate, tools["tdhook"]["two_nn_discards_only_last_point"])


@pytest.mark.parametrize("compat", [None, "dadapy"])
def test_dadapy_gride(layers, tools, compat):
    result = gride(layers, compat=compat)
    expected = tools["dadapy"]["gride_range64"]
    close(result.estimate, [row["ids"] for row in expected])
    close(result.standard_error, [row["errors"] for row in expected])
    close(result.scale, [row["rs"] for row in expected])


def model_distances(n: int, d: float, ranks: int, generator: np.random.Generator) -> np.ndarray:
    """Distances whose volumes r^d are a Poisson process: the model behind both estimators."""
    return generator.exponential(size=(n, ranks)).cumsum(1) ** (1 / d)


@pytest.mark.parametrize("d", [1.0, 5.0, 30.0])
def test_exact_model_gives_the_dimension_and_its_error(d):
    generator = np.random.default_rng(0)
    distances = torch.from_numpy(np.stack([model_distances(2000, d, 64, generator) for _ in range(60)]))
    result = gride_from_distances(distances)
    torch.testing.assert_close(
        result.estimate.mean(0), torch.full((6,), d, dtype=torch.float64), rtol=0.02, atol=0
    )
    torch.testing.assert_close(result.standard_error.mean(0), result.estimate.std(0), rtol=0.2, atol=0)
    for method in ("fit", "ml"):
        two = twonn_from_distances(distances, method=method)
        assert abs(two.estimate.mean() / d - 1) < 0.02
        # the fit is less efficient than maximum likelihood, whose error this is
        assert 0.7 < two.standard_error.mean() / two.estimate.std() < 1.25


def test_the_root_is_that_of_the_score():
    generator = np.random.default_rng(1)
    r = model_distances(50, 3.0, 16, generator)
    found = gride_from_distances(torch.from_numpy(r), range_max=16).estimate.numpy()
    for n, d in zip(gride_ranks(16), found):
        log_mu = np.log(r[:, 2 * n - 1] / r[:, n - 1])

        def score(d: float, n: int = n, log_mu: np.ndarray = log_mu) -> float:
            last = (log_mu / (1 - np.exp(-d * log_mu))).sum()
            return (len(r) - 1) / d - (2 * n - 1) * log_mu.sum() + (n - 1) * last

        assert d == pytest.approx(brentq(score, 0.1, 100, xtol=1e-14, rtol=1e-14), rel=1e-10)


def test_dadapys_cut_leaves_out_extreme_ratios():
    r = torch.from_numpy(model_distances(500, 4.0, 4, np.random.default_rng(0)))
    r[:5, 0] *= 1e-9
    plain, cut = gride_from_distances(r, range_max=4), gride_from_distances(r, range_max=4, compat="dadapy")
    kept = gride_from_distances(r[5:], range_max=2)
    torch.testing.assert_close(cut.estimate[0], kept.estimate[0])
    assert plain.estimate[0] < 0.8 * cut.estimate[0]


def manifold(name: str, n: int, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    if name == "sphere":
        x = torch.randn(n, 6, generator=generator)
        return torch.nn.functional.normalize(x, dim=-1) @ torch.randn(6, 20, generator=generator), 5
    if name == "swiss roll":
        u = torch.rand(n, 2, generator=generator)
        angle = 1.5 * torch.pi * (1 + 2 * u[:, 0])
        return torch.stack((angle * angle.cos(), 20 * u[:, 1], angle * angle.sin()), -1), 2
    if name == "torus":
        u = 2 * torch.pi * torch.rand(n, 2, generator=generator)
        return torch.cat((u.cos(), u.sin()), -1), 2
    return torch.rand(n, 3, generator=generator) @ torch.randn(3, 50, generator=generator), 3


@pytest.mark.parametrize("name", ["sphere", "swiss roll", "torus", "subspace"])
def test_manifolds_of_known_dimension(name):
    x, d = manifold(name, 4000, torch.Generator().manual_seed(0))
    assert twonn(x).estimate == pytest.approx(d, rel=0.08)
    torch.testing.assert_close(
        gride(x, range_max=8).estimate, torch.full((3,), float(d), dtype=torch.float64), rtol=0.1, atol=0
    )


@pytest.mark.parametrize("share", [0.02, 0.05, 0.15])
def test_copies_are_counted_and_move_nothing(share):
    x, _ = manifold("sphere", 1500, torch.Generator().manual_seed(0))
    copies = int(share * len(x))
    repeated = torch.cat((x, x[torch.randint(0, len(x), (copies,))]))[torch.randperm(len(x) + copies)]
    for plain, dirty in ((twonn(x), twonn(repeated)), (gride(x, range_max=8), gride(repeated, range_max=8))):
        assert dirty.duplicates == copies
        assert (dirty.rows == len(x)).all()
        torch.testing.assert_close(dirty.estimate, plain.estimate, rtol=1e-9, atol=0)
        torch.testing.assert_close(dirty.standard_error, plain.standard_error, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "dtype, rtol", [(torch.float64, 1e-8), (torch.float16, 0.01), (torch.bfloat16, 0.06)]
)
@pytest.mark.parametrize("offset", [0, 10, 1000])
def test_precision_of_the_input_is_all_that_limits(dtype, rtol, offset):
    """In half precision: of rows that it can tell apart."""
    double = dtype == torch.float64
    x, _ = manifold("subspace" if double else "sphere", 1500, torch.Generator().manual_seed(0))
    if offset and not double:
        offset /= 1000  # an offset of 1000 leaves half precision no digits: nothing to estimate
    given = (x.double() + offset).to(dtype)
    assert twonn(given).estimate == pytest.approx(float(twonn(x).estimate), rel=rtol)


def test_rows_closer_than_their_precision_can_tell_are_said():
    """A 3-dimensional sheet whose rows lie within bfloat16's rounding of one another: no copies, but who could know."""
    x, _ = manifold("subspace", 1500, torch.Generator().manual_seed(0))
    with pytest.warns(
        UserWarning, match="left out as copies up to rounding .*Capture them in float32"
    ) as told:
        found = twonn(x.bfloat16())
    assert len(told) == 1 and found.near_duplicates > 100
    assert twonn(x).near_duplicates == 0


@settings(max_examples=15)
@given(
    exponent=st.floats(-6, 6),
    offset=st.sampled_from([0.0, 10.0, 1000.0]),
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_invariance(exponent, offset, seed, dtype):
    """Unit, offset and rotation change nothing but the scale, to what the input's precision leaves."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(150, 4, dtype=torch.float64, generator=generator)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=generator)).Q
    unit = 10.0**exponent
    moved = ((x @ rotation + offset) * unit).to(dtype)
    rtol = 1e-9 if dtype == torch.float64 else 1e-5 * (1 + offset)
    for estimator in (twonn, lambda x: gride(x, range_max=8)):
        plain, other = estimator(x), estimator(moved)
        torch.testing.assert_close(other.estimate, plain.estimate, rtol=rtol, atol=0)
        torch.testing.assert_close(other.scale, plain.scale * unit, rtol=rtol, atol=0)


def test_batches_equal_items():
    x = torch.randn(2, 2, 120, 5)
    x[1, 0, 50:60] = x[1, 0, :10]
    for estimator in (twonn, lambda x: twonn(x, method="ml"), lambda x: gride(x, range_max=16)):
        whole = estimator(x)
        for i in range(2):
            for j in range(2):
                for leaf, item in zip(whole, estimator(x[i, j])):
                    torch.testing.assert_close(leaf[i, j], item, rtol=1e-12, atol=0)


@pytest.mark.parametrize("x", [torch.ones(10, 3), torch.eye(3)[[0, 0, 1, 1, 1]], torch.eye(6)])
def test_undefined_is_nan_with_one_reason(x):
    """All rows alike; two distinct rows; every distance alike."""
    for estimator in (twonn, lambda x: twonn(x, method="ml"), lambda x: gride(x, range_max=4)):
        with pytest.warns(UndefinedMeasureWarning, match="at least 3 distinct rows") as caught:
            result = estimator(x)
        assert len(caught) == 1
        assert result.estimate.isnan().all() and result.standard_error.isnan().all()
        assert result.duplicates == len(x) - len(x.unique(dim=0))


def test_too_few_rows_are_an_error():
    with pytest.raises(ValueError, match="at least 3 rows, got 2"):
        twonn(torch.randn(2, 3))
    with pytest.raises(ValueError, match="at least 65 rows, got 64"):
        gride(torch.randn(64, 3))
    with pytest.raises(ValueError, match="table has 5"):
        gride_from_distances(torch.rand(10, 5), range_max=8)


def test_curve():
    x = torch.randn(100, 3)
    td = TwoNN(curve=True, discard=0.2)(TensorDict({"sample": x}))
    curve = td["dimension", "twonn", "curve"]
    kept = ~torch.isnan(curve[:, 0])
    assert kept.sum() == 80 and kept[:80].all()
    slope = (curve[kept, 0] * curve[kept, 1]).sum() / curve[kept, 0].square().sum()
    torch.testing.assert_close(slope, td["dimension", "twonn", "estimate"])
    assert (curve[:80].diff(dim=0) >= 0).all()
    assert twonn_curve(torch.rand(7, 2).sort(-1).values).shape == (7, 2)


@pytest.mark.parametrize("duplicated", [False, True])
@pytest.mark.parametrize("stage", [TwoNN, lambda **k: Gride(range_max=16, **k)])
def test_a_table_serves_as_well_as_the_sample(stage, duplicated):
    x = torch.randn(200, 6)
    if duplicated:
        x[100:130] = x[:30]
    td = NearestNeighbors(20)(TensorDict({"sample": x}))
    own, served = (
        stage(out_keys=("dimension", "own")),
        stage(source="neighbors", out_keys=("dimension", "served")),
    )
    leaves = ("distinct_distance", "duplicates", "near_duplicates")
    assert served.in_keys == [("neighbors", leaf) for leaf in leaves]
    served(own(td))
    for name in ("estimate", "standard_error", "scale", "rows", "duplicates"):
        torch.testing.assert_close(td["dimension", "served", name], td["dimension", "own", name])


def test_gradients_are_those_of_the_estimate():
    x = torch.randn(14, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: twonn(x).estimate, x)
    torch.autograd.gradcheck(lambda x: twonn(x, method="ml").estimate, x)
    torch.autograd.gradcheck(lambda x: gride(x, range_max=8).estimate, x)


def test_full_graph_compile():
    distances = torch.rand(2, 50, 16, dtype=torch.float64).cumsum(-1)
    distances[0, 3] = torch.nan
    for function in (twonn_from_distances, lambda d: gride_from_distances(d, range_max=16)):
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        for got, expected in zip(compiled(distances), function(distances)):
            torch.testing.assert_close(got, expected)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="'fit' or 'ml', got 'mle'"):
        TwoNN(method="mle")
    with pytest.raises(ValueError, match="in \\[0, 1\\), got 1"):
        TwoNN(discard=1)
    with pytest.raises(ValueError, match="'dadapy', got 'skdim'"):
        Gride(compat="skdim")
    with pytest.raises(ValueError, match="range_max is at least 2"):
        Gride(range_max=1)
    with pytest.raises(ValueError, match="source is one of"):
        TwoNN(source="distances")
