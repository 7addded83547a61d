"""Numbers do not depend on what is set around them: default dtype and device, autocast, precision of products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tensordict import TensorDict

import tdgeom as tg
from tdgeom import functional as F


def rows(seed=0, n=60, d=7):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float32, device="cpu") * 3 + 1


COVARIANCE = torch.cov(rows().T)
PAIRS = (
    "linear_cka", "linear_cka_debiased", "cca_mean", "cca_r2", "svcca", "pwcca_ab", "pwcca_ba", "procrustes", "angular_shape",
    "linear_r2_ab", "linear_r2_ba", "rbf_cka", "rsa", "cknna", "distance_correlation", "soft_matching", "layer_cosine_sim",
)  # fmt: skip
FUNCTIONS = {
    **{name: lambda name=name: getattr(F, name)(rows(), rows(1)) for name in PAIRS},
    "feature_subspace_novelty": lambda: F.feature_subspace_novelty(*(rows(i, 7, 3).double() for i in (0, 1))),
    "rdm": lambda: F.rdm(rows()),
    "kendall": lambda: F.rsa(rows(n=9), rows(1, n=9), comparison="kendall_a"),
    "eigen_spectrum": lambda: F.eigen_spectrum(COVARIANCE, k=2),
    "spectrum_metrics": lambda: list(F.spectrum_metrics(rows(2, 1, 150)[0].abs()).values()),
    "rankme": lambda: F.rankme(torch.tensor(60, device="cpu"), rows().mean(0), COVARIANCE),
    "sample_metrics": lambda: list(F.sample_metrics(rows()).values()),
    "cosine_similarity": lambda: F.cosine_similarity(rows()),
    "sample_eigenvalues": lambda: F.sample_eigenvalues(rows()),
    **{
        variant: lambda variant=variant: F.normalized(rows(), variant, torch.arange(60, device="cpu"))
        for variant in ("token_rms", "feature_standardized", "remove_top_pc", "drop_outlier_features")
    },
    "router_load": lambda: list(F.router_load(rows().abs().long()).values()),
}


@contextmanager
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def low_precision_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


AMBIENT = {"dtype": default_dtype, "device": lambda: torch.device("meta")}


@pytest.mark.parametrize("ambient", AMBIENT)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_pure_functions(name, ambient):
    def listed(found):
        return [found] if isinstance(found, torch.Tensor) else list(found)

    expected = listed(FUNCTIONS[name]())
    with AMBIENT[ambient]():
        found = listed(FUNCTIONS[name]())
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.device == b.device
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


STREAMS = {
    "cross_moments": lambda: tg.StreamingCrossMoments(["x", "y"]),
    "cross_moments of projections": lambda: tg.StreamingCrossMoments(["x", "y"], sketch=32, groups=4, seed=3),
    "sketch": lambda: tg.StreamingSketch(k=3, size=6, probes=8, in_keys=("tokens", "x")),
    "router": lambda: tg.RouterLoad(in_keys=("tokens", "x")),
}
AROUND = {
    **AMBIENT,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "precision": low_precision_products,
    "inference": torch.inference_mode,
}


def streamed(make):
    stages = [make(), make()]
    x, y = rows(n=300), rows(1, n=300)
    for i, (a, b) in enumerate(zip(x.split(70), y.split(70))):
        stages[i % 2].update(TensorDict({("tokens", "x"): a, ("tokens", "y"): b}))
    td = stages[0].merge_(stages[1]).publish(TensorDict({}))
    return [td[key] for key in stages[0].out_keys]


@pytest.mark.parametrize("ambient", AROUND)
@pytest.mark.parametrize("name", STREAMS)
def test_streams(name, ambient):
    from tdgeom.stream.sketch import gaussian_columns

    gaussian_columns.cache_clear()
    expected = streamed(STREAMS[name])
    gaussian_columns.cache_clear()
    with AROUND[ambient]():
        found = streamed(STREAMS[name])
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.device == b.device
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
