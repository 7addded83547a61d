"""A capture in memory as named tensors, and back: nested TensorDicts, lists of them, leaves that are no tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase, is_non_tensor, is_tensor_collection
from torch import Tensor

from tdgeom.files.errors import StoreError
from tdgeom.files.json_text import plain, read_json
from tdgeom.store.shard_layout import ShardLayout, entries_of

__all__ = ["pack", "unpack"]

_MOST_DIGITS = 12  # of a position in a list
Captured = TensorDictBase | Tensor | Mapping[str, Any] | Sequence[TensorDictBase]


def pack(captured: Captured) -> tuple[ShardLayout, dict[str, Tensor]]:
    """(layout, tensors by their name in the shard) of a TensorDict, a mapping, a tensor or a list of these.

    Raises:
        TypeError: a leaf that is neither a tensor nor a JSON value. ValueError: no tensor at all, or values that JSON text
            cannot hold. StoreError: a dtype that shards do not hold.
    """
    several = isinstance(captured, list | tuple)
    tensors: dict[tuple[str, ...], Tensor] = {}
    values: dict[tuple[str, ...], Any] = {}
    batch_size = tuple(getattr(captured, "batch_size", ()))
    if several:
        for position, one in enumerate(captured):
            _collect(_tree(one), (str(position),), tensors, values)
    else:
        _collect(_tree(captured), (), tensors, values)
    if not tensors:
        raise ValueError("there is no tensor to save in what was given.")
    found = {key: (value.dtype, value.dtype, value.shape) for key, value in tensors.items()}
    layout = ShardLayout(entries_of(found), False, batch_size, several, tuple(values.items()))
    try:
        read_json(layout.to_json(), "its layout")  # what could not be read back is not written
    except (StoreError, ValueError, RecursionError) as error:
        raise ValueError(f"what was given cannot be saved: {error}") from error
    return layout, {entry.name: tensors[entry.key] for entry in layout.entries}


def unpack(layout: ShardLayout, tensors: Mapping[str, Tensor]) -> TensorDict | list[TensorDict]:
    """What ``pack`` took apart, as TensorDicts; a list's members have batch size []."""
    leaves: list[tuple[tuple[str, ...], Any]] = [(one.key, tensors[one.name]) for one in layout.entries]
    leaves += layout.values
    if not layout.several:
        return _filled(leaves, layout.batch_size)
    parts: dict[int, list[tuple[tuple[str, ...], Any]]] = {}
    for key, value in leaves:
        is_empty_member = len(key) == 1 and value == {}
        if (len(key) < 2 and not is_empty_member) or not key[0].isdecimal() or len(key[0]) > _MOST_DIGITS:
            raise StoreError(f"the layout's key {key} begins with no position in a list: it is damaged.")
        inside = parts.setdefault(int(key[0]), [])
        if not is_empty_member:
            inside.append((key[1:], value))
    return [_filled(parts[position]) for position in sorted(parts)]


def _filled(leaves: Sequence[tuple[tuple[str, ...], Any]], batch_size: Sequence[int] = ()) -> TensorDict:
    found = TensorDict({}, batch_size=[])
    for key, value in leaves:
        if isinstance(value, Tensor):
            found.set(key, value)
        elif value == {}:
            found.set(key, TensorDict({}, batch_size=[]))
        else:
            found.set_non_tensor(key, value)
    try:
        found.batch_size = torch.Size(batch_size)
    except RuntimeError as error:
        raise StoreError(
            f"the layout's batch size {list(batch_size)} does not fit its tensors: {error}"
        ) from error
    return found


def _tree(captured: Any) -> Any:
    """A tensor alone gets a name."""
    return {"tensor": captured} if isinstance(captured, Tensor | np.ndarray) else captured


def _collect(
    node: Any,
    key: tuple[str, ...],
    tensors: dict[tuple[str, ...], Tensor],
    values: dict[tuple[str, ...], Any],
) -> None:
    if isinstance(node, np.ndarray) and node.dtype.kind in "biufc":
        node = torch.as_tensor(node)
    if isinstance(node, Tensor):
        tensors[key] = _dense(node, key)
    elif not is_non_tensor(node) and (isinstance(node, Mapping) or is_tensor_collection(node)):
        parts = _items(node, key)
        if not parts:
            values[key] = {}
        for name, part in parts:
            if not isinstance(name, str):
                raise TypeError(f"keys are text, got {name!r} under {key}.")
            _collect(part, (*key, name), tensors, values)
    else:
        value = node
        if is_non_tensor(node):  # a stack of values, such as one text a sequence, comes back as a list
            value = node.data if isinstance(node, NonTensorData) else node.tolist()
        if not _is_json(value):
            raise TypeError(f"{key} holds {type(value).__name__}: only tensors and JSON values can be saved.")
        values[key] = plain(value)


def _is_json(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_json(part) for name, part in value.items())
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int | np.integer | np.bool_)


def _items(node: Any, key: tuple[str, ...]) -> list[tuple[Any, Any]]:
    try:
        return list(node.items())
    except RuntimeError as error:  # a lazy stack of rows that differ in shape
        raise TypeError(
            f"{key} holds tensors of different shapes under one name; save a list of its parts, list(td.unbind(0)): {error}"
        ) from error


def _dense(tensor: Tensor, key: tuple[str, ...]) -> Tensor:
    is_dense = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized
    if not is_dense or tensor.device.type == "meta":
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else str(tensor.layout)
        kind = "meta" if tensor.device.type == "meta" else kind
        raise TypeError(
            f"{key} holds a {kind} tensor: only dense ones with values can be saved. Unpack it first."
        )
    return tensor.detach()
