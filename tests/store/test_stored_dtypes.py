"""What casting rows does, and how its error is counted."""

from __future__ import annotations

import pytest
import torch

from tdgeom.files.errors import StoreError
from tdgeom.store.stored_dtypes import decode, encode, named_dtype, rounding_error

FLOAT8 = [(torch.float8_e4m3fn, 448.0, 3), (torch.float8_e5m2, 57344.0, 2)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("float8", torch.float8_e4m3fn),
        ("torch.float16", torch.float16),
        ("bfloat16", torch.bfloat16),
        (None, None),
    ],
)
def test_names(name, dtype):
    assert named_dtype(name) is dtype and named_dtype(dtype) is dtype


@pytest.mark.parametrize("name", ["int64", torch.int8, "nn", 3, ""])
def test_what_is_no_dtype_for_rows_is_refused(name):
    with pytest.raises(ValueError, match="rows are stored as they come"):
        named_dtype(name)


@pytest.mark.parametrize(("dtype", "largest", "digits"), FLOAT8, ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_float8_rows_use_their_whole_range(dtype, largest, digits, given):
    x = (torch.randn(200, 32, generator=torch.Generator().manual_seed(0)) * 10).to(given)
    stored, scale = encode(x, dtype)
    assert stored.dtype == dtype and scale.dtype == torch.float32 and scale.shape == (200,)
    assert torch.equal(stored.float().abs().amax(1), torch.full((200,), largest))
    torch.testing.assert_close(scale.double(), x.double().abs().amax(1) / largest, rtol=1e-6, atol=0)
    back = decode(stored, scale, given)
    assert back.dtype == given
    # half a step of the mantissa, beside half a step of the smallest numbers, and the rounding to the dtype itself
    step = (
        x.double().abs() * 2.0 ** -(digits + 1) + scale.double()[:, None] * torch.finfo(dtype).smallest_normal
    )
    assert (
        (back.double() - x.double()).abs() <= step * (1 + 1e-3) + x.double().abs() * torch.finfo(given).eps
    ).all()


@pytest.mark.parametrize(("dtype", "largest", "digits"), FLOAT8, ids=["e4m3", "e5m2"])
def test_float8_of_zeros_tiny_and_huge_rows(dtype, largest, digits):
    x = torch.tensor([[0.0, 0.0], [1e-44, 0.0], [1e-38, -1e-38], [3e38, -1e38]])
    back = decode(*encode(x, dtype), torch.float32)
    assert torch.isfinite(back).all() and torch.equal(back[0], x[0])
    torch.testing.assert_close(back[2:], x[2:], rtol=0.13, atol=0)


def test_the_largest_value_never_becomes_nan():
    # x / (max / 448) may round to just above 448, which e4m3 would make NaN
    x = torch.rand(100_000, 1, generator=torch.Generator().manual_seed(0)) * 1000
    assert torch.isfinite(encode(x, torch.float8_e4m3fn)[0].float()).all()


def test_rows_without_numbers_and_rows_of_any_shape():
    for shape in ((0, 4), (3, 0), (3,), (3, 2, 5)):
        x = torch.ones(shape)
        stored, scale = encode(x, torch.float8_e4m3fn)
        assert scale.shape == shape[:1] and torch.equal(decode(stored, scale, torch.float32), x)


def test_integers_stay_as_they_are():
    x = torch.arange(5)
    assert encode(x, torch.bfloat16) == (x, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_beyond_the_range(dtype):
    x = torch.full((2, 2), 1e300, dtype=torch.float64)
    with pytest.raises(StoreError, match=r"rows reach 1e\+300, beyond"):
        encode(x, dtype)


def test_the_error_is_counted_over_rows():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stored, scale = encode(x, torch.float16)
    gap = stored.double() - x
    expected = torch.stack([gap.square().sum(), x.square().sum(), (gap.norm(dim=1) / x.norm(dim=1)).max()])
    torch.testing.assert_close(rounding_error(x, stored, scale), expected, rtol=1e-12, atol=0)
    assert torch.equal(rounding_error(x, x, None), torch.zeros(3).double())
