"""Where the inputs of a model go."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn


def where_inputs_go(model: nn.Module) -> torch.device | None:
    """The device of the first parameter, or, where that is loaded only for its module's forward, the one it is loaded to.

    ``None`` for a model without parameters.

    >>> where_inputs_go(nn.Linear(2, 2)), where_inputs_go(nn.ReLU())
    (device(type='cpu'), None)
    """
    first = next(model.parameters(), None)
    if first is None or not first.is_meta:
        return None if first is None else first.device
    for module in model.modules():
        waiting: list[Any] = [module.__dict__.get("_hf_hook")]  # accelerate's offloading
        while waiting:
            hook = waiting.pop()
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
            waiting += getattr(hook, "hooks", ())
    home = next((t.device for t in chain(model.parameters(), model.buffers()) if not t.is_meta), None)
    return torch.device("cpu") if home is None else home
