"""The invariances each docstring claims, and the input that breaks careless formulas."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tdgeom.functional as sim
from tdgeom.core.warnings import UndefinedMeasureWarning

# name: (value for identical rows, what it ignores on each side)
ORTHOGONAL = {"rotation", "scale", "offset"}
MEASURES = {
    "linear_cka": (1, ORTHOGONAL),
    "linear_cka_debiased": (1, ORTHOGONAL),
    "cca_mean": (1, {"linear", "offset"}),
    "cca_r2": (1, {"linear", "offset"}),
    "svcca": (1, ORTHOGONAL),
    "pwcca_ab": (1, {"scale", "offset"}),
    "pwcca_ba": (1, {"scale", "offset"}),
    "procrustes": (0, ORTHOGONAL),
    "angular_shape": (0, ORTHOGONAL),
    "linear_r2_ab": (1, ORTHOGONAL),
    "linear_r2_ba": (1, ORTHOGONAL),
    "rbf_cka": (1, ORTHOGONAL),
    "distance_correlation": (1, ORTHOGONAL),
    "rsa": (1, {"scale"}),
    "rsa_euclidean": (1, ORTHOGONAL),
    "rsa_cosine": (1, {"rotation", "scale"}),
    "cknna": (1, {"rotation", "scale"}),
    "soft_matching": (1, {"permutation", "scale", "offset", "feature_scale"}),
}
SYMMETRIC = [name for name in MEASURES if not name.endswith(("_ab", "_ba")) and name != "cknna"]


def measure(name, x, y):
    name, _, kind = name.partition("rsa_")
    if kind:
        return sim.rsa(x, y, kind)
    return getattr(sim, name)(x, y)


def rows(seed, n=40, d=5):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(seed, d):
    return torch.linalg.qr(rows(seed, d, d))[0]


CHANGES = {
    "rotation": lambda x, seed: x @ rotation(seed, x.shape[-1]),
    "scale": lambda x, seed: x * 10.0 ** (seed % 13 - 6),
    "offset": lambda x, seed: x + 100 * rows(seed, 1, x.shape[-1]),
    "linear": lambda x, seed: x @ (rotation(seed, x.shape[-1]) * torch.linspace(1, 30, x.shape[-1]).double()),
    "permutation": lambda x, seed: x[..., torch.randperm(x.shape[-1])],
    "feature_scale": lambda x, seed: x * torch.linspace(0.1, 9, x.shape[-1]).double(),
}


@pytest.mark.parametrize("name", MEASURES)
@settings(max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_claimed_invariances(name, seed):
    x = rows(seed)
    y = 0.7 * x[:, [0, 2, 1]] + rows(seed + 1, d=3) + 0.3
    value = measure(name, x, y)
    for change in sorted(MEASURES[name][1]):
        for a, b in ((CHANGES[change](x, seed), y), (x, CHANGES[change](y, seed + 7))):
            torch.testing.assert_close(measure(name, a, b), value, rtol=0, atol=1e-8, msg=f"{name}: {change}")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("linear_cka", "linear"), ("linear_cka_debiased", "linear"), ("svcca", "linear"), ("procrustes", "linear"),
        ("rbf_cka", "linear"), ("distance_correlation", "linear"), ("rsa_euclidean", "linear"), ("cknna", "offset"),
        ("pwcca_ab", "linear"), ("soft_matching", "rotation"), ("rsa", "rotation"),
    ],
)  # fmt: skip
def test_what_is_not_ignored_shows(name, change):
    x, y = rows(0, d=20), rows(1, d=3)
    y = y + x[:, :3] * torch.tensor([0.2, 1, 3]).double()
    assert (measure(name, CHANGES[change](x, 5), y) - measure(name, x, y)).abs() > 1e-3


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_regression_ignores_invertible_maps_of_the_predictor_only(seed):
    x, y = rows(seed), rows(seed + 1, d=3) + rows(seed)[:, :3] * torch.tensor([0.2, 1, 3]).double()
    value = sim.linear_r2_ab(x, y)
    torch.testing.assert_close(sim.linear_r2_ab(CHANGES["linear"](x, seed), y), value, rtol=0, atol=1e-9)
    torch.testing.assert_close(sim.linear_r2_ba(y, CHANGES["linear"](x, seed)), value, rtol=0, atol=1e-9)
    ridged = sim.linear_r2_ab(x, y, ridge=0.5)
    for change in ("rotation", "scale", "offset"):
        torch.testing.assert_close(
            sim.linear_r2_ab(CHANGES[change](x, seed), y, ridge=0.5), ridged, rtol=0, atol=1e-9
        )


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_projection_weighting_ignores_linear_maps_of_the_other_side(seed):
    x, y = rows(seed), rows(seed + 1, d=3) + rows(seed)[:, :3]
    linear = CHANGES["linear"]
    torch.testing.assert_close(sim.pwcca_ab(x, linear(y, seed)), sim.pwcca_ab(x, y), rtol=0, atol=1e-9)
    torch.testing.assert_close(sim.pwcca_ba(linear(x, seed), y), sim.pwcca_ba(x, y), rtol=0, atol=1e-9)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_correlation_rdm_ignores_offset_and_scale_of_each_row(seed):
    x, y = rows(seed), rows(seed + 1)
    changed = x * rows(seed, x.shape[0], 1).abs().add(0.1) + rows(seed + 3, x.shape[0], 1)
    torch.testing.assert_close(sim.rsa(changed, y), sim.rsa(x, y), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", MEASURES)
def test_identical_rows_at_any_scale_with_a_massive_feature_in_float32(name):
    expected = MEASURES[name][0]
    x = rows(3, n=60, d=8).float()
    x[:, 2] *= 1500
    for scale in (1e-25, 1e-5, 1.0):
        value = measure(name, x * scale, (x * scale).clone())
        assert value.item() == pytest.approx(expected, abs=1e-6 if name == "rsa" else 1e-12), (name, scale)


@pytest.mark.parametrize("name", MEASURES)
def test_small_data_keep_their_value(name):
    # an absolute epsilon in a denominator would show here
    x, y = rows(0), rows(1, d=3) + rows(0)[:, :3]
    torch.testing.assert_close(measure(name, 1e-5 * x, 1e-5 * y), measure(name, x, y), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_symmetric_measures(name):
    x, y = rows(0), rows(1, d=3) + rows(0)[:, :3]
    torch.testing.assert_close(measure(name, x, y), measure(name, y, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MEASURES)
def test_fewer_rows_than_features(name):
    x, y = rows(0, n=12, d=30), rows(1, n=12, d=20)
    assert measure(name, x, y).isfinite()
    assert measure(name, x, x.clone()).item() == pytest.approx(MEASURES[name][0], abs=1e-12)
    if "rotation" in MEASURES[name][1]:
        turned = CHANGES["rotation"](x, 3)
        torch.testing.assert_close(measure(name, turned, y), measure(name, x, y), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [m for m in MEASURES if "rsa" not in m and m != "cknna"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_features_change_nothing_but_the_count_of_features(name, dtype):
    x, y = (rows(0), rows(1, d=3) + rows(0)[:, :3])
    x, y = x.to(dtype), y.to(dtype)
    padded = torch.cat([x, torch.full((x.shape[0], 2), 1e4 / 3, dtype=dtype)], 1)
    if name == "soft_matching":  # a constant feature still takes its share of the coupling
        assert measure(name, padded, y).isfinite()
        return
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(measure(name, padded, y), measure(name, x, y), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", [*MEASURES, "layer_cosine_sim"])
def test_no_variance_is_nan_with_one_warning(name):
    x = torch.full((20, 3), 0.1, dtype=torch.float64)
    if name in ("layer_cosine_sim", "cknna", "rsa_cosine"):
        x = torch.zeros_like(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = measure(name, x, rows(0, n=20, d=3))
    assert value.isnan(), name
    assert [w.category for w in caught] == [UndefinedMeasureWarning]
    assert "NaN" in str(caught[0].message)


@pytest.mark.parametrize("name", MEASURES)
def test_mistakes_raise_with_both_shapes(name):
    with pytest.raises(ValueError, match=r"\(40, 5\).*\(39, 5\)"):
        measure(name, rows(0), rows(1)[1:])
    with pytest.raises(ValueError, match="N, D >= 1"):
        measure(name, rows(0)[:0], rows(0)[:0])


@pytest.mark.parametrize("name", MEASURES)
def test_leading_dimensions_are_batched(name):
    x = torch.stack([rows(i) for i in range(4)]).unflatten(0, (2, 2))
    y = 0.5 * x[..., :3] + torch.stack([rows(i + 9, d=3) for i in range(4)]).unflatten(0, (2, 2))
    value = measure(name, x, y)
    assert value.shape == (2, 2)
    for i in range(2):
        for j in range(2):
            torch.testing.assert_close(value[i, j], measure(name, x[i, j], y[i, j]), rtol=0, atol=1e-12)
    for dtype in (torch.float64, torch.float32):
        a, b = x[0].to(dtype), y[0].to(dtype)
        every = measure(name, a[:, None], b)
        assert every.shape == (2, 2)
        for i in range(2):
            for j in range(2):
                torch.testing.assert_close(every[i, j], measure(name, a[i], b[j]), rtol=0, atol=1e-7)


def test_kendalls_count_is_batched_over_broadcast_data_sets():
    x, y = rows(0, n=12), torch.stack([rows(1, n=12), rows(2, n=12)])
    value = sim.rsa(x[None], y, comparison="kendall_a")
    expected = [sim.rsa(x, side, comparison="kendall_a") for side in y]
    torch.testing.assert_close(value, torch.stack(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MEASURES)
def test_half_precision_and_integers_are_upcast(name):
    x, y = rows(0), rows(1) + rows(0)
    for dtype in (torch.float16, torch.bfloat16):
        value = measure(name, x.to(dtype), y.to(dtype))
        assert value.dtype == torch.float64
        torch.testing.assert_close(
            value, measure(name, x.to(dtype).double(), y.to(dtype).double()), rtol=0, atol=1e-5
        )
    integers = (x * 10).long()
    torch.testing.assert_close(measure(name, integers, y), measure(name, integers.double(), y))


@pytest.mark.parametrize(
    "name",
    [
        "linear_cka",
        "linear_cka_debiased",
        "rbf_cka",
        "distance_correlation",
        "procrustes",
        "cca_r2",
        "linear_r2_ab",
    ],
)
def test_gradients(name):
    x, y = rows(0, n=9, d=3).requires_grad_(), rows(1, n=9, d=2) + rows(0, n=9, d=3)[:, :2]
    assert torch.autograd.gradcheck(lambda x: measure(name, x, y), (x,), eps=1e-6, atol=1e-5)
