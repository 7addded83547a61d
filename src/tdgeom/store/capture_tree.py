"""A capture in memory as named tensors, and back: nested TensorDicts, lists of them, leaves that are no tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import (
    NonTensorData,
    NonTensorStack,
    TensorDict,
    TensorDictBase,
    is_non_tensor,
    is_tensor_collection,
)
from torch import Tensor

from tdgeom.core.words import Words
from tdgeom.files.errors import StoreError
from tdgeom.files.json_text import plain, read_json
from tdgeom.store.shard_layout import ShardLayout, entries_of

__all__ = ["Captured", "pack", "unpack"]

Captured = TensorDictBase | Tensor | Mapping[str, Any] | Sequence[TensorDictBase]


def pack(captured: Captured) -> tuple[ShardLayout, dict[str, Tensor]]:
    """(layout, tensors by their name in the shard) of a TensorDict, a mapping, a tensor or a list of these.

    Raises:
        TypeError: a leaf that is neither a tensor nor a JSON value. ValueError: no tensor at all, or values that JSON text
            cannot hold. StoreError: a dtype that shards do not hold.
    """
    several = isinstance(captured, list | tuple)
    tree = {str(i): _tree(one) for i, one in enumerate(captured)} if several else _tree(captured)
    leaves = dict(_leaves(tree, ()))
    tensors = {key: leaf for key, leaf in leaves.items() if isinstance(leaf, Tensor)}
    if not tensors:
        raise ValueError("there is no tensor to save in what was given.")
    stacks = {key: leaf.tolist() for key, leaf in leaves.items() if isinstance(leaf, NonTensorStack)}
    values = {key: leaf for key, leaf in leaves.items() if key not in tensors} | stacks
    layout = ShardLayout(
        entries=entries_of({key: (value.dtype, value.dtype, value.shape) for key, value in tensors.items()}),
        rows=False,
        batch_size=tuple(getattr(captured, "batch_size", ())),
        several=several,
        values=tuple((key, plain(value)) for key, value in values.items()),
        stacks=tuple(stacks),
    )
    try:
        read_json(layout.to_json(), "its layout")  # what could not be read back is not written
    except (StoreError, ValueError, RecursionError) as error:
        raise ValueError(f"what was given cannot be saved: {error}") from error
    return layout, {entry.name: tensors[entry.key] for entry in layout.entries}


def unpack(layout: ShardLayout, tensors: Mapping[str, Tensor | Words]) -> TensorDict | list[TensorDict]:
    """What ``pack`` took apart, as TensorDicts; a list's members have batch size []."""
    tree: dict[str, Any] = {}
    held = [(one.key, tensors[one.name]) for one in layout.entries]
    leaves = [(key, NonTensorData(leaf.tolist()) if isinstance(leaf, Words) else leaf) for key, leaf in held]
    for key, leaf in [*leaves, *((key, _value(layout, key, value)) for key, value in layout.values)]:
        inside = tree
        for name in key[:-1]:
            inside = inside.setdefault(name, {})
        inside[key[-1]] = leaf
    members = [tree.get(str(i)) for i in range(len(tree))] if layout.several else [tree]
    if not all(isinstance(member, dict) for member in members):
        raise StoreError(f"the layout has a key that begins with no position in a list: {list(tree)[:12]}.")
    try:
        found = [TensorDict(member, batch_size=layout.batch_size) for member in members]
    except RuntimeError as error:
        raise StoreError(
            f"the layout's batch size {list(layout.batch_size)} does not fit its tensors: {error}"
        ) from error
    return found if layout.several else found[0]


def _value(layout: ShardLayout, key: tuple[str, ...], value: Any) -> Any:
    if key not in layout.stacks:
        return NonTensorData(value) if value != {} else {}
    try:
        return NonTensorStack.from_list(value)
    except RuntimeError:  # lists of several depths
        return NonTensorStack(*map(NonTensorData, value))


def _tree(captured: Any) -> Any:
    """A tensor alone gets a name."""
    return {"tensor": captured} if isinstance(captured, Tensor | np.ndarray) else captured


def _leaves(node: Any, key: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every tensor, JSON value, stack of values (one a sequence) and empty branch, by key."""
    if isinstance(node, np.ndarray) and node.dtype.kind in "biufc":
        node = torch.as_tensor(node)
    if isinstance(node, Tensor):
        yield key, _dense(node, key)
    elif not is_non_tensor(node) and (isinstance(node, Mapping) or is_tensor_collection(node)):
        parts = _items(node, key)
        if not parts:
            yield key, {}
        for name, part in parts:
            if not isinstance(name, str):
                raise TypeError(f"keys are text, got {name!r} under {key}.")
            yield from _leaves(part, (*key, name))
    else:
        value = node.data if isinstance(node, NonTensorData) else node
        if not _is_json(value.tolist() if isinstance(value, NonTensorStack) else value):
            raise TypeError(f"{key} holds {type(value).__name__}: only tensors and JSON values can be saved.")
        yield key, value


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
    odd = {"meta": tensor.device.type == "meta", "nested": tensor.is_nested, "quantized": tensor.is_quantized}
    kinds = [
        kind for kind, is_it in {**odd, str(tensor.layout): tensor.layout != torch.strided}.items() if is_it
    ]
    if kinds:
        raise TypeError(
            f"{key} holds a {kinds[0]} tensor: only dense ones with values can be saved. Unpack it first."
        )
    return tensor.detach()
