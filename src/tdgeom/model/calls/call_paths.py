"""Which modules' calls are calls of a model: the model, and the parts of it that may be called in its place."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile

from torch import nn

_MOST_PARTS = 8


def paths_of_calls(model: nn.Module, paths: Iterable[str]) -> list[tuple[str, nn.Module]]:
    """The model, and what lies between it and the places at ``paths`` down to the lists of blocks, with its paths.

    A wrapper's ``generate`` calls the model inside and never the wrapper; an encoder may be called without its decoder. The
    outermost of these that runs is one call.

    >>> model = nn.Transformer(8, 2, num_encoder_layers=2, batch_first=True)
    >>> [path for path, _ in paths_of_calls(model, ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0"])]
    ['', 'decoder', 'encoder']
    """
    owners = sorted({tuple(path.split(".")[:-1]) for path in paths if path})
    found: dict[str, nn.Module] = {"": model}
    start = _descend(model, (), owners, found)
    owner = model.get_submodule(".".join(start))
    branches = {parts[len(start)] for parts in owners if len(parts) > len(start)}
    if not _is_list(owner) and len(branches) <= _MOST_PARTS:
        for branch in sorted(branches):
            first = (*start, branch)
            _descend(model, first, [parts for parts in owners if parts[: len(first)] == first], found)
    return list(found.items())


def is_inside(path: str, other: str) -> bool:
    """Whether a module lies inside another one, by their paths.

    >>> is_inside("model.layers.1", "model"), is_inside("model", ""), is_inside("model", "model"), is_inside("ab", "a")
    (True, True, False, False)
    """
    return path.startswith(other + ".") if other else bool(path)


def _descend(
    model: nn.Module, start: tuple[str, ...], owners: list[tuple[str, ...]], found: dict[str, nn.Module]
) -> tuple[str, ...]:
    """Follow what all ``owners`` share from ``start`` on, noting modules that can be called; where it ends."""
    shared = [parts[0] for parts in takewhile(lambda same: len(set(same)) == 1, zip(*owners, strict=False))]
    at = start
    for depth in range(len(start), len(shared) + 1):
        at = tuple(shared[:depth])
        module = model.get_submodule(".".join(at))
        if _can_be_called(module):
            found[".".join(at)] = module
        if _is_list(module):
            break
    return at


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict)


def _can_be_called(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward
