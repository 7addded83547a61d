"""Whether derivatives of a value are asked for, in whatever way torch asks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["is_differentiated"]


def is_differentiated(x: Tensor) -> bool:
    """Backward (``requires_grad`` where gradients are enabled, ``torch.func.grad``) or forward (dual tensors).

    >>> is_differentiated(torch.ones(2)), is_differentiated(torch.ones(2, requires_grad=True))
    (False, True)
    """
    if x.requires_grad and torch.is_grad_enabled():
        return True
    return not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None
