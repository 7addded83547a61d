"""A smooth objective minimised by L-BFGS, for the fits without a closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__: list[str] = []


def minimise(
    objective: Callable[[], Tensor], parameters: Sequence[Tensor], *, steps: int, **settings: Any
) -> None:
    """Move ``parameters`` (leaves that require gradients) in place to a minimum of ``objective``."""
    optimiser = torch.optim.LBFGS(
        list(parameters), max_iter=steps, history_size=20, line_search_fn="strong_wolfe", **settings
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = objective()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
