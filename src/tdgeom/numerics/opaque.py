"""Functions that decide by values (a search, a proof, a sort by equality), made one node of any graph and any vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from tdgeom.core.surroundings import steady

__all__ = ["opaque"]


def opaque(shapes: Callable[..., Any]) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """A decorator for a function of tensors with leading dimensions that no tracer should look into.

    ``torch.compile`` and ``torch.export`` see an operator whose outputs ``shapes`` makes (empty, from the same arguments);
    ``vmap`` hands the whole batch to the function, as one leading dimension more. The function is annotated in full (that
    becomes the operator's schema) and returns new tensors, none twice. It runs in full precision and without gradients:
    detach what goes in.
    """

    def wrap(function: Callable[..., Any]) -> CustomOpDef:
        def alone(*given: Any) -> Any:
            with torch.no_grad(), steady(given[0].device):
                return function(*given)

        schema = torch.library.infer_schema(function, mutates_args=())
        operator = torch.library.custom_op(
            f"tdgeom::{function.__name__}", alone, mutates_args=(), schema=schema
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
