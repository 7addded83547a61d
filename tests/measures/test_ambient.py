"""What is set around a call (dtype, device, autocast, precision, gradients, threads) changes no number of a pure function."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._pytree import tree_leaves

from function_examples import CALLS, Call, one, rows
from tdgeom import functional as F
from tdgeom.numerics.centring import as_rows, centre
from tdgeom.numerics.copies import first_copies
from tdgeom.numerics.eigenvalues import leading_eigenpairs, symmetric_eigenvalues
from tdgeom.numerics.hashing import hash_ids
from tdgeom.numerics.moments import about_running_mean
from tdgeom.numerics.products import gram

HERE = ("tdgeom.measures", "tdgeom.numerics")
NAMES = [name for name in CALLS if inspect.unwrap(getattr(F, name)).__module__.startswith(HERE)]
NUMERICS = {
    "about_running_mean": Call(
        lambda x: about_running_mean(
            [x], torch.zeros(x.shape[1], dtype=torch.float64, device="cpu"), torch.tensor(3, device="cpu")
        ),
        one,
    ),
    "as_rows": Call(lambda x: as_rows(x, "a test"), one),
    "centre": Call(centre, one),
    "covariance": CALLS["covariance"],
    "first_copies": Call(first_copies, lambda seed: (torch.cat((rows(seed), rows(seed)[:7])),)),
    "gram": Call(gram, lambda seed: (rows(seed, 400),)),
    "hash_ids": Call(lambda ids: hash_ids(ids, 3), lambda seed: (torch.arange(seed, 50),)),
    "leading_eigenpairs": Call(lambda m: leading_eigenpairs(gram(m.double()), 2)[0], one),
    "symmetric_eigenvalues": Call(lambda m: symmetric_eigenvalues(gram(m.double())), one),
}
HELD = {name: CALLS[name] for name in NAMES} | NUMERICS


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


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("around", AROUND)
def test_what_is_set_around_a_call_changes_nothing(name: str, around: str) -> None:
    call = HELD[name]
    inputs = [x.float() if x.is_floating_point() else x for x in call.inputs(0)]
    expected = tree_leaves(call.function(*inputs))
    with AROUND[around]():
        found = tree_leaves(call.function(*inputs))
    for value, right in zip(found, expected):
        assert value.dtype == right.dtype and value.device == right.device
        torch.testing.assert_close(value, right, rtol=1e-12, atol=0, equal_nan=True)


def test_all_functions_of_these_rooms_are_held_to_it() -> None:
    assert len(NAMES) > 55
