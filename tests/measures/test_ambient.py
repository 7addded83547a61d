"""What is set around a call (dtype, device, autocast, precision, gradients, threads) changes no number of a pure function."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._pytree import tree_leaves

from function_examples import CALLS
from tdgeom import functional as F

HERE = ("tdgeom.measures", "tdgeom.numerics")
NAMES = [name for name in CALLS if getattr(F, name).__module__.startswith(HERE)]


@contextmanager
def changed(get, put, value) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


AROUND = {
    "default dtype": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default half": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "matmul precision": lambda: changed(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "threads": lambda: changed(torch.get_num_threads, torch.set_num_threads, 3),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("around", AROUND)
def test_what_is_set_around_a_call_changes_nothing(name: str, around: str) -> None:
    call = CALLS[name]
    inputs = [x.float() if x.is_floating_point() else x for x in call.inputs(0)]
    expected = tree_leaves(call.function(*inputs))
    with AROUND[around]():
        found = tree_leaves(call.function(*inputs))
    for value, right in zip(found, expected):
        assert value.dtype == right.dtype
        torch.testing.assert_close(value, right, rtol=1e-12, atol=0, equal_nan=True)


def test_all_functions_of_these_rooms_are_held_to_it() -> None:
    assert len(NAMES) > 55
