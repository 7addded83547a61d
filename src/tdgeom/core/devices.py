"""What a device can do, and where numbers go that it cannot hold."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["doubled", "has_float64", "with_float64"]


_WITHOUT_FLOAT64 = {"mps"}


def has_float64(device: torch.device) -> bool:
    """Whether numbers of 64 bits can lie there at all."""
    return device.type not in _WITHOUT_FLOAT64


def with_float64(value: Any) -> Any:
    """A tensor, or tensors in lists and mappings, on the CPU where they lie on a device that has no float64."""
    if isinstance(value, Tensor):
        return value if has_float64(value.device) else value.cpu()
    if isinstance(value, list | tuple) and any(isinstance(one, Tensor) for one in value):
        return type(value)(map(with_float64, value)) if type(value) in (list, tuple) else value
    if isinstance(value, dict):
        return {key: with_float64(one) for key, one in value.items()}
    return value


def doubled(x: Tensor) -> Tensor:
    """``x`` in float64, on the CPU where its own device has none."""
    return cast(Tensor, with_float64(x)).double()
