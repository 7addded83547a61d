"""Functions that decide by values (a search, a proof, a sort by equality), made one node of any graph and any vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

__all__ = ["opaque"]


def opaque(shapes: Callable[..., Any]) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """A decorator for a function of tensors with leading dimensions that no tracer should look into.

    ``torch.compile`` and ``torch.export`` see an operator whose outputs ``shapes`` makes (empty, from the same arguments);
    ``vmap`` hands the whole batch to the function, as one leading dimension more. The function is annotated in full (it
    becomes an operator's schema) and returns new tensors, none twice. It carries no gradient until the operator is given one
    (``register_autograd``): detach what goes in.
    """

    def wrap(function: Callable[..., Any]) -> CustomOpDef:
        operator = torch.library.custom_op(
            f"tdgeom::{function.__name__.strip('_')}", function, mutates_args=()
        )
        operator.register_fake(shapes)

        def over_batch(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Any, Any]:
            whole = [
                value if not isinstance(value, Tensor)
                else value.expand(info.batch_size, *value.shape) if dim is None
                else value.movedim(dim, 0)
                for value, dim in zip(given, in_dims)
            ]  # fmt: skip
            found = operator(*whole)
            return found, 0 if isinstance(found, Tensor) else (0,) * len(found)

        operator.register_vmap(over_batch)
        return operator

    return wrap
