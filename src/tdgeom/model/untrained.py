"""The untrained baseline: the same model with re-initialised weights, of the same class."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from tdgeom.core.guessed_names import answer_guesses

__all__ = ["untrained_copy"]


@answer_guesses
def untrained_copy(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """The same architecture with freshly initialised weights; the model given is left as it is.

    A Hugging Face model is built anew from its configuration, so its weights follow its own initialisation; a PEFT model gets
    fresh adapters too. Of any other module a copy is made and every submodule's ``reset_parameters`` called.

    Args:
        model: the trained model.
        seed: seed of the weights; the caller's random state is left as it was.

    Returns:
        A model of the same class, dtype, device and mode.

    Raises:
        ValueError: parameters that no ``reset_parameters`` initialises, by name.

        >>> model = nn.Linear(3, 2)
        >>> fresh = untrained_copy(model)
        >>> bool((fresh.weight == model.weight).any()), fresh.weight.shape
        (False, torch.Size([2, 3]))
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = getattr(model, "config", None)
        fresh = _reset(model) if config is None else _built(model, config)
    first = next(model.parameters(), None)
    if first is not None:
        fresh = fresh.to(device=first.device, dtype=first.dtype)
    return fresh.train(model.training)


def _built(model: nn.Module, config: Any) -> nn.Module:
    """A model of its class from its configuration; a PEFT model's base so, with fresh adapters of the same kinds."""
    adapters = getattr(model, "peft_config", None)
    base = getattr(model, "get_base_model", None)
    if adapters is None or base is None:
        return type(model)(copy.deepcopy(config))
    inner = base()
    fresh: Any = None
    for name, adapter in adapters.items():
        if fresh is None:
            fresh = type(model)(_built(inner, inner.config), copy.deepcopy(adapter), adapter_name=name)
        else:
            fresh.add_adapter(name, copy.deepcopy(adapter))
    fresh.set_adapter(model.active_adapter)
    return fresh


def _reset(model: nn.Module) -> nn.Module:
    fresh = copy.deepcopy(model)
    kept: list[str] = []
    for path, module in fresh.named_modules():
        # nn.MultiheadAttention spells it with an underscore; it also initialises its parts.
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is not None:
            reset()
        else:
            kept += [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)]
    if kept:
        raise ValueError(
            f"an untrained copy of {type(model).__name__} needs fresh values for {kept[:6]}, but the modules that hold them "
            f"have no reset_parameters(). Define it there, or give the untrained model itself: untrained=MODEL."
        )
    return fresh
