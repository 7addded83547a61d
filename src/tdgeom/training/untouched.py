"""A model in training is looked at, and its training goes on as if nobody had looked."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tdgeom.model.calls.bound_model import modules_within

__all__ = ["bare_model", "devices_in_use", "is_compiled", "seed_generators", "untouched"]

_WRAPPERS = {"DistributedDataParallel", "DataParallel"}


def bare_model(model: nn.Module) -> nn.Module:
    """The model inside of ``torch.compile`` and of replicas: the same weights, run eagerly and by this process alone.

    A sharded model (FSDP) stays as it is: its ranks can only run it together.

        >>> model = nn.Linear(2, 2)
        >>> bare_model(torch.compile(model, backend="eager")) is model
        True
    """
    while True:
        compiled, wrapped = model._modules.get("_orig_mod"), model._modules.get("module")
        inner = wrapped if type(model).__name__ in _WRAPPERS else compiled
        if inner is None:
            return model
        model = inner


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, or a part of it, runs a traced graph in which no hook is called."""
    return any(
        "_orig_mod" in module._modules or module._compiled_call_impl is not None
        for module in modules_within(model)
    )


@contextmanager
def untouched(model: nn.Module, dataloader: Any = None) -> Iterator[None]:
    """After the block everything that training depends on is what it was before.

    Put back are the states of Python's, NumPy's and torch's generators on the host and on every device in use, those of the
    loader's own generators, the place that a loader with persistent workers has come to, and the model's buffers. Compiled calls
    run eagerly inside, and autocast keeps no copies of weights (one made without gradients would serve the next training step).
    Training flags are the business of what runs the model:
    ``Capture`` restores each.

    Raises:
        RuntimeError: a parameter or its gradient was written to, which nothing can put back.

        >>> layer = nn.BatchNorm1d(2)
        >>> before = torch.get_rng_state()
        >>> with untouched(layer):
        ...     _ = layer(torch.rand(3, 2))
        >>> torch.equal(torch.get_rng_state(), before), int(layer.num_batches_tracked)
        (True, 0)
    """
    modules = modules_within(model)
    put_back = _generators(model, dataloader)
    kept = [
        (module, name, buffer, _version(buffer), buffer.detach().clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    compiled = [
        (module, module._compiled_call_impl) for module in modules if module._compiled_call_impl is not None
    ]
    weights = _written(model)
    caching = torch.is_autocast_cache_enabled()
    # A loader with persistent workers has one iterator, which another pass over it would begin anew.
    under_way = getattr(dataloader, "_iterator", None)
    try:
        if under_way is not None:
            dataloader._iterator = None
        torch.set_autocast_cache_enabled(False)
        for module, _ in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        if under_way is not None:
            dataloader._iterator = under_way
        for module, call in compiled:
            module._compiled_call_impl = call
        torch.set_autocast_cache_enabled(caching)
        with torch.no_grad():
            for module, name, buffer, version, value in kept:
                module._buffers[name] = buffer
                if _version(buffer) != version or buffer.is_inference():
                    buffer.copy_(value)
        for restore in put_back:
            restore()
    changed = [name for name, state in _written(model).items() if weights.get(name) != state]
    if changed:
        raise RuntimeError(
            f"measuring wrote to {changed[:3]} of {type(model).__name__}, parameters or their gradients, so training is no "
            f"longer what it would have been. Remedy: a forward that leaves parameters alone in eval mode; no stage that trains."
        )


def _written(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """How often each parameter and its gradient were written to; of sharded models, which move theirs, nothing."""
    if any(
        "FullyShardedDataParallel" in (base.__name__ for base in type(module).__mro__)
        for module in model.modules()
    ):
        return {}
    return {
        name: (*_version(value), *(() if value.grad is None else _version(value.grad)))
        for name, value in model.named_parameters()
    }


def _version(value: Tensor) -> tuple[int, int]:
    return id(value), -1 if value.is_inference() else value._version


def seed_generators(seed: int, dataloader: Any = None) -> None:
    """Start every generator that exists, the loader's own too.

    A device that is not in use yet has none: seeding it would decide over the first numbers that training draws there.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    for kind in devices_in_use():
        seeding = getattr(torch.get_device_module(kind), "manual_seed_all", None)
        if seeding is not None:
            seeding(seed)
    for generator in _own_generators(dataloader):
        generator.manual_seed(seed)


def devices_in_use() -> list[str]:
    """Kinds of devices beside the host that this process computes on."""
    if not torch.accelerator.is_available():
        return []
    device = torch.accelerator.current_accelerator()
    if device is None:
        return []
    begun = getattr(torch.get_device_module(device.type), "is_initialized", lambda: True)
    return [device.type] if begun() else []


def _generators(model: nn.Module, dataloader: Any) -> list[Callable[[], Any]]:
    """What puts every generator back to where it is now."""
    back: list[Callable[[], Any]] = []

    def keep(read: Callable[[], Any], write: Callable[[Any], Any]) -> None:
        state = read()
        back.append(lambda: write(state))

    keep(random.getstate, random.setstate)
    keep(np.random.get_state, np.random.set_state)
    keep(torch.get_rng_state, torch.set_rng_state)
    for kind in devices_in_use():
        module = torch.get_device_module(kind)
        if hasattr(module, "get_rng_state_all"):
            keep(module.get_rng_state_all, module.set_rng_state_all)
        else:
            keep(module.get_rng_state, module.set_rng_state)
    for generator in _own_generators(dataloader):
        keep(generator.get_state, generator.set_state)
    return back


def _own_generators(dataloader: Any) -> list[torch.Generator]:
    """The generators that a DataLoader and its samplers draw from."""
    found: dict[int, torch.Generator] = {}
    places, met = [dataloader], 0
    while places and met < 16:
        place, met = places.pop(), met + 1
        if isinstance(own := getattr(place, "generator", None), torch.Generator):
            found[id(own)] = own
        for name in ("sampler", "batch_sampler", "base_dataloader", "data"):
            if (inner := getattr(place, name, None)) is not None and not isinstance(inner, Tensor):
                places.append(inner)
    return list(found.values())
