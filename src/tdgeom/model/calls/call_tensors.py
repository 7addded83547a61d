"""The tensors of one call of a model, wherever they lie among its arguments."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tensordict import TensorDictBase, is_tensor_collection
from torch import Tensor

from tdgeom.core.keys import Key

# read at the top of a record, also where a call has them inside of something
TOKENS = (
    "input_ids",
    "attention_mask",
    "special_tokens_mask",
    "decoder_input_ids",
    "decoder_attention_mask",
    "src_key_padding_mask",
)
_ROOTS = ("acts", "grads", "tokens", "carried", "sample", "moments", "row_id")  # what stages write
CACHES = (
    "past_key_values",
    "cache_params",
    "state",
    "mems",
    "past_buckets_states",
    "past_key_value",
    "cache",
    "layer_past",
)


def call_tensors(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Key, Any]:
    """The tensors of one call: under forward names, and those inside of mappings, TensorDicts, data classes and named tuples.

    ``names`` are those of positional arguments. A tensor inside something has its own name where only one is called so, else
    the path to it. An argument that is a mapping of masks, one for each kind of layer, stays one.

    >>> ids = Tensor([[1]])
    >>> sorted(call_tensors(["batch"], [{"input_ids": ids, "extra": {"x": ids}}], {"scale": ids}))
    ['input_ids', 'scale', 'x']
    """
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    found: dict[Key, Any] = {}
    inside: list[tuple[tuple[str, ...], Tensor]] = []
    for name, value in (*named.items(), *(("", value) for value in args[len(names) :])):
        if isinstance(value, Tensor):
            found.update({name: value} if name else {})
        elif value is None or isinstance(value, bool | int | float | str) or name in CACHES:
            continue
        elif "mask" in name and isinstance(value, Mapping):
            found[name] = value
        elif isinstance(value, TensorDictBase):  # its keys are the model's own
            own = [
                (key if isinstance(key, tuple) else (key,), value.get(key)) for key in value.keys(True, True)
            ]
            own = [(path, tensor) for path, tensor in own if isinstance(tensor, Tensor)]
            found.update({path if len(path) > 1 else path[0]: tensor for path, tensor in own})
            inside += [(path, tensor) for path, tensor in own if len(path) > 1 and path[-1] in TOKENS]
        else:
            inside += [((name, *path), tensor) for path, tensor in _leaves(value, 3)]
    count = Counter(path[-1] for path, _ in inside)
    for path, tensor in inside:
        if count[path[-1]] == 1 and path[-1] not in found and path[-1] not in _ROOTS:
            found[path[-1]] = tensor
        else:
            found.setdefault(path if path[0] else path[1:], tensor)
    return found


def _leaves(value: Any, depth: int) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """The tensors inside a container, with their paths; outputs of models are no inputs."""
    for name, part in _parts(value):
        if isinstance(part, Tensor):
            yield (name,), part
        elif depth > 1:
            for path, tensor in _leaves(part, depth - 1):
                yield (name, *path), tensor


def _parts(value: Any) -> list[tuple[str, Any]]:
    if hasattr(value, "to_tuple"):  # what another model has given, the encoder's states say
        return []
    if isinstance(value, Mapping):
        return [(name, part) for name, part in value.items() if isinstance(name, str)]
    if is_tensor_collection(value):
        return [(str(name), value.get(name)) for name in value.keys()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    return []
