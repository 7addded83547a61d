"""Linear layers of any make: plain, transposed, wrapped by adapters, packed in a few bits.

What makes a layer linear here is what it says of itself: ``in_features`` and ``out_features``, or a ``base_layer`` that has
them. What lies inside such a layer (an adapter's two factors, packed parameters) is no layer of the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def is_linear(module: nn.Module) -> bool:
    """A linear layer, the transposed one of GPT-2, or a layer that stands in for one.

    >>> is_linear(nn.Linear(2, 2)), is_linear(nn.LayerNorm(2))
    (True, False)
    """
    return _widths(module) is not None


def features(module: nn.Module) -> tuple[int, int]:
    """Input and output width of a linear layer.

    >>> features(nn.Linear(3, 5))
    (3, 5)
    """
    widths = _widths(module)
    if widths is None:
        raise TypeError(
            f"{type(module).__name__} is no linear layer: it names no in_features and out_features."
        )
    return widths


def linears(root: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost linear layers inside a module, with their paths."""
    for name, child in root.named_children():
        own = f"{path}.{name}" if path else name
        if is_linear(child):
            yield own, child
        else:
            yield from linears(child, own)


def plain_weight(module: nn.Module) -> Tensor | None:
    """The weight (out, in) of a layer that is nothing but a product with it; ``None`` where the layer computes in its own way.

    >>> plain_weight(nn.Linear(3, 5)).shape
    torch.Size([5, 3])
    """
    weight: Any = getattr(module, "weight", None)
    if "forward" in vars(module) or getattr(weight, "is_meta", False):
        return None  # somebody loads the weight, or does more, in a forward of their own
    if _is_transposed(module):
        return weight.T
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and _is_float(weight):
        return weight if tuple(weight.shape) == (module.out_features, module.in_features) else None
    return None


def shares(module: nn.Module, value: Tensor, parts: int) -> Tensor:
    """What each of ``parts`` equal parts of the input adds to a linear layer's output, (..., F) -> (..., parts, out), less bias.

    A plain layer's in at least the precision of its weight; a wrapped or packed one is called with all other parts zero.
    """
    weight = plain_weight(module)
    split = value.unflatten(-1, (parts, -1))
    if weight is not None:
        own = weight.to(value.device).unflatten(-1, (parts, -1))  # a replica's input may be elsewhere
        return torch.einsum("...hd,ohd->...ho", split.to(weight.dtype), own)
    alone = torch.eye(parts, dtype=value.dtype, device=value.device).unsqueeze(-1) * split.unsqueeze(-2)
    return _called(module, alone.flatten(-2)) - bias_of(module, value)  # type: ignore[operator]


def bias_of(module: nn.Module, like: Tensor) -> Tensor | None:
    """What a linear layer adds to any product: its bias, or what it gives for zeros of the type of ``like``."""
    if plain_weight(module) is not None:
        bias: Any = getattr(module, "bias", None)
        return None if bias is None else bias.to(like.device)
    with torch.no_grad():
        return _called(module, like.new_zeros(1, features(module)[0])).reshape(-1)


def _called(module: nn.Module, value: Tensor) -> Tensor:
    found = module.forward(value)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"{type(module).__name__} gives {type(found).__name__}, no tensor: its shares by head cannot be told."
        )
    return found


def _widths(module: nn.Module) -> tuple[int, int] | None:
    if _is_transposed(module):
        weight: Any = module.weight
        return int(weight.shape[0]), int(weight.shape[1])
    widths = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if all(isinstance(width, int) and width > 0 for width in widths):
        return widths  # type: ignore[return-value]
    base = getattr(module, "base_layer", None)
    return _widths(base) if isinstance(base, nn.Module) else None


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_float(weight: Any) -> bool:
    return isinstance(weight, Tensor) and weight.is_floating_point()
