"""What is set around a stream (dtype, device, autocast, precision of products) changes none of its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tensordict import TensorDict

import tdgeom as tg
from tdgeom.stream.sketch import gaussian_columns


def rows(seed=0, n=60, d=7):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float32, device="cpu") * 3 + 1


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


STREAMS = {
    "cross_moments": lambda: tg.StreamingCrossMoments(["x", "y"]),
    "cross_moments of projections": lambda: tg.StreamingCrossMoments(["x", "y"], sketch=32, groups=4, seed=3),
    "sketch": lambda: tg.StreamingSketch(k=3, size=6, probes=8, in_keys=("tokens", "x")),
    "router": lambda: tg.RouterLoad(in_keys=("tokens", "x")),
}
AROUND = {
    "dtype": default_dtype,
    "device": lambda: torch.device("meta"),
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
def test_what_is_set_around_a_stream_changes_nothing(name, ambient):
    gaussian_columns.cache_clear()
    expected = streamed(STREAMS[name])
    gaussian_columns.cache_clear()
    with AROUND[ambient]():
        found = streamed(STREAMS[name])
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.device == b.device
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
