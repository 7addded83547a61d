"""What small tensors of a device hold, read by the host: several at once, and once however many ask.

Reading a number makes the host wait until the device has done all it was given. Masks, ids and flags are therefore fetched
together, one wait a batch, and kept beside the tensor they were read from; tensors of the CPU are what they are.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["known_to_host", "leading", "on_host", "read_together", "remember"]

_LEADING = 1 << 20  # bytes of a tensor that are fetched to know it again, and the most that are kept of one

# Of a tensor on a device: its version when it was read, and its first MiB, as numbers of its type in a row.
_read: WeakIdKeyDictionary = WeakIdKeyDictionary()


def on_host(x: Tensor) -> Tensor:
    """``x`` on the CPU; of a device's tensor what was read of it before, unless it has been written to since.

    >>> x = torch.ones(2)
    >>> on_host(x) is x
    True
    """
    if x.device.type == "cpu":
        return x
    return leading(x).reshape(x.shape) if _is_small(x) else x.detach().cpu()


def known_to_host(x: Tensor) -> Tensor | None:
    """``x`` on the CPU where that makes nobody wait, else None."""
    return on_host(x) if x.device.type == "cpu" or (_is_known(x) and _is_small(x)) else None


def leading(x: Tensor) -> Tensor:
    """The first MiB of ``x`` in the order of its dimensions, as a row of numbers on the CPU."""
    if x.device.type == "cpu":
        return _first(x)
    read_together([x])
    held = _read.get(x)
    return _first(x).cpu() if held is None else held[1]


def read_together(tensors: Iterable[Tensor]) -> None:
    """Fetch what the host has not read yet of all these, with one copy for each device that holds some."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for x in tensors:
        if x.device.type != "cpu" and not _is_known(x) and x.numel():
            by_device.setdefault(x.device, []).append(x)
    for mine in by_device.values():
        parts = [_first(x).resolve_conj().resolve_neg().contiguous().view(torch.uint8) for x in mine]
        told = (torch.cat(parts) if len(parts) > 1 else parts[0]).cpu()
        for x, part in zip(mine, told.split([part.numel() for part in parts])):
            # A copy of its own: a part of the whole need not start where numbers of its type may.
            _keep(x, part.clone().view(x.dtype))


def remember(moved: Tensor, values: Tensor) -> None:
    """``moved`` was copied to a device from ``values`` (of the CPU), which need not be fetched again."""
    if moved.device.type != "cpu" and values.device.type == "cpu":
        _keep(moved, _first(values).clone())  # a loader may refill its own


def _first(x: Tensor) -> Tensor:
    x = x.detach()
    return x.reshape(-1) if _is_small(x) else x.reshape(-1)[: _LEADING // x.element_size()]


def _is_small(x: Tensor) -> bool:
    return x.numel() * x.element_size() <= _LEADING


def _keep(x: Tensor, values: Tensor) -> None:
    if not x.is_inference():  # such a tensor does not count what is written to it
        _read[x] = (x._version, values)


def _is_known(x: Tensor) -> bool:
    held = _read.get(x)
    return held is not None and held[0] == x._version
