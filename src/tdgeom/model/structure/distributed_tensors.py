"""Tensors of which every rank holds a part (DTensor), or that are still on their way from other ranks."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

__all__ = ["dtensor_class", "parted_like", "whole"]


def whole(value: Tensor) -> Tensor:
    """The tensor itself: of a DTensor all parts gathered (or added up), of a running collective what it gives.

    Collective for a DTensor, over its mesh. Any other tensor is given back as it is.

    >>> import torch
    >>> x = torch.ones(2)
    >>> whole(x) is x
    True
    """
    if type(value) is Tensor:
        return value
    kind = dtensor_class()
    if kind is not None and isinstance(value, kind):
        value = value.full_tensor()
    wait: Any = getattr(value, "wait", None)  # AsyncCollectiveTensor
    return value if wait is None else wait()


def parted_like(value: Tensor, like: Tensor) -> Tensor:
    """``value``, which is the same on all ranks, in the parts in which ``like`` lies on them."""
    kind = dtensor_class()
    if kind is None or not isinstance(like, kind) or isinstance(value, kind):
        return value
    replicated = [sys.modules["torch.distributed.tensor"].Replicate()] * like.device_mesh.ndim
    held = kind.from_local(value.to(like.dtype), like.device_mesh, replicated, run_check=False)
    return held.redistribute(placements=like.placements)


def dtensor_class() -> Any:
    """The class of DTensors, if anybody has imported it: else no tensor is one."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return None if loaded is None else loaded.DTensor
