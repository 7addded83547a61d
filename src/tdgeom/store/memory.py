"""A capture in memory as named tensors, and back: nested TensorDicts, lists of them, leaves that are no tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensordict import NonTensorData, TensorDict, TensorDictBase, is_tensor_collection
from torch import Tensor

from tdgeom.bundle import plain
from tdgeom.store.errors import StoreError
from tdgeom.store.layout import Layout, entries_of

__all__ = ["pack", "unpack"]

_MOST_DIGITS = 12  # of a position in a list
Captured = TensorDictBase | Tensor | Mapping[str, Any] | Sequence[TensorDictBase]


def pack(captured: Captured) -> tuple[Layout, dict[str, Tensor]]:
    """(layout, tensors by their name in the shard) of a TensorDict, a mapping, a tensor or a list of TensorDicts.

    Raises:
        TypeError: a leaf that is neither a tensor nor a JSON value.
    """
    several = isinstance(captured, Sequence)
    tensors: dict[tuple[str, ...], Tensor] = {}
    values: dict[tuple[str, ...], Any] = {}
    batch_size: Sequence[int] = ()
    if isinstance(captured, Tensor):
        captured = {"tensor": captured}
    if several:
        for position, one in enumerate(captured):
            _collect(one, (str(position),), tensors, values)
    else:
        batch_size = getattr(captured, "batch_size", ())
        _collect(captured, (), tensors, values)
    if not tensors:
        raise ValueError("there is no tensor to save in what was given.")
    found = {key: (value.dtype, value.dtype, value.shape) for key, value in tensors.items()}
    layout = Layout(entries_of(found), False, tuple(batch_size), several, tuple(values.items()))
    return layout, {entry.name: tensors[entry.key] for entry in layout.entries}


def unpack(layout: Layout, tensors: Mapping[str, Tensor]) -> TensorDict | list[TensorDict]:
    """What ``pack`` took apart, as TensorDicts; a list's members have batch size []."""
    leaves: list[tuple[tuple[str, ...], Any]] = [(one.key, tensors[one.name]) for one in layout.entries]
    leaves += [(key, NonTensorData(value)) for key, value in layout.values]
    if not layout.several:
        return _filled(leaves, layout.batch_size)
    parts: dict[int, list[tuple[tuple[str, ...], Any]]] = {}
    for key, value in leaves:
        if len(key) < 2 or not key[0].isdecimal() or len(key[0]) > _MOST_DIGITS:
            raise StoreError(f"the layout's key {key} begins with no position in a list: it is damaged.")
        parts.setdefault(int(key[0]), []).append((key[1:], value))
    return [_filled(parts[position]) for position in sorted(parts)]


def _filled(leaves: Sequence[tuple[tuple[str, ...], Any]], batch_size: Sequence[int] = ()) -> TensorDict:
    found = TensorDict({}, batch_size=[])
    for key, value in leaves:
        found.set(key, value)
    try:
        found.batch_size = batch_size
    except RuntimeError as error:
        raise StoreError(
            f"the layout's batch size {list(batch_size)} does not fit its tensors: {error}"
        ) from error
    return found


def _collect(
    node: Any,
    key: tuple[str, ...],
    tensors: dict[tuple[str, ...], Tensor],
    values: dict[tuple[str, ...], Any],
) -> None:
    if isinstance(node, Tensor):
        tensors[key] = node.detach()
    elif isinstance(node, Mapping) or (is_tensor_collection(node) and not isinstance(node, NonTensorData)):
        for name, part in node.items():
            if not isinstance(name, str):
                raise TypeError(f"keys are text, got {name!r} under {key}.")
            _collect(part, (*key, name), tensors, values)
    else:
        value = getattr(node, "data", node)
        if plain(value) != value:
            raise TypeError(f"{key} holds {type(value).__name__}: only tensors and JSON values can be saved.")
        values[key] = value
