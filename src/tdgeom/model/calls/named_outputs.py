"""Tensors of what a model gives, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor


def read_named_outputs(output: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of a model's output by attribute name; a plain tensor answers to a single name."""
    if isinstance(output, Tensor) and len(names) == 1:
        return {names[0]: output}
    found = {}
    for name in names:
        keyed = isinstance(output, dict | TensorDictBase)
        value = output.get(name, None) if keyed else getattr(output, name, None)
        if not isinstance(value, Tensor):
            has = [k for k in output.keys() if isinstance(output[k], Tensor)] if keyed else []
            raise ValueError(
                f"model_outputs= expected a tensor {name!r} in the model's output, got "
                f"{type(value).__name__} from a "
                f"{type(output).__name__}" + (f" that has the tensors {has}." if has else ".")
            )
        found[name] = value
    return found


def has_named_output(output: Any, name: str) -> bool:
    """Whether a model's output has a tensor of that name."""
    value = (
        output.get(name, None) if isinstance(output, dict | TensorDictBase) else getattr(output, name, None)
    )
    return isinstance(value, Tensor)
