"""Whatever a loader yields, as a TensorDict of batch size []."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase, is_tensor_collection
from torch import Tensor

from tdgeom.core.keys import Key

__all__ = ["as_batch", "batch_length", "iterate"]


def as_batch(batch: object, in_keys: Sequence[Key] | None, device: torch.device | None) -> TensorDict:
    """A shallow TensorDict of batch size []: the batch itself is never altered."""
    if isinstance(batch, TensorDictBase):
        td = _copy(batch)
    elif isinstance(batch, Mapping):
        td = TensorDict({}, batch_size=[])
        for key, value in batch.items():
            _put(td, key, value)
    else:
        values = (
            [batch] if isinstance(batch, Tensor) else list(batch) if isinstance(batch, list | tuple) else None
        )
        if values is None:
            raise TypeError(
                f"run takes batches that are a dict, a BatchEncoding, a TensorDict, a tensor or a tuple of tensors, got "
                f"{type(batch).__name__}. "
                + (
                    "Texts become batches with tdgeom.text.TextBatches(texts, tokenizer)."
                    if isinstance(batch, str)
                    else "Give the loader a collate_fn, such as the tokenizer's data collator."
                )
            )
        if in_keys is None or len(in_keys) < len(values):
            raise ValueError(
                f"run got a batch of {len(values)} unnamed value(s): name them with in_keys=, for instance "
                f"run(..., in_keys=['input_ids', 'attention_mask']); got in_keys={in_keys!r}."
            )
        td = TensorDict({}, batch_size=[])
        for key, value in zip(in_keys, values):
            _put(td, key, value)
    return td.to(device, non_blocking=True) if device is not None else td


def _copy(td: TensorDictBase) -> TensorDict:
    copy = TensorDict({}, batch_size=[])
    for key in td.keys():
        value = td.get(key)
        if is_tensor_collection(value) and not isinstance(value, NonTensorData):
            copy.set(key, _copy(value) if isinstance(value, TensorDictBase) else value)
        elif isinstance(value, Tensor):
            copy.set(key, value)
        else:
            copy.set_non_tensor(key, getattr(value, "data", value))
    return copy


def _put(td: TensorDict, key: Key, value: object) -> None:
    if value is None:
        return
    if isinstance(value, Mapping):
        inner = TensorDict({}, batch_size=[])
        for name, part in value.items():
            _put(inner, name, part)
        td.set(key, inner)
    elif isinstance(value, Tensor | TensorDictBase):
        td.set(key, value)
    else:
        array = np.asarray(value) if not isinstance(value, str) else None
        if array is not None and array.dtype.kind in "biuf":
            td.set(key, torch.as_tensor(array))
        else:
            td.set_non_tensor(key, value)


def batch_length(td: TensorDictBase) -> int:
    """How many sequences a batch holds."""
    for key in ("attention_mask", "input_ids"):
        value = td.get(key, None)
        if isinstance(value, Tensor) and value.ndim:
            return value.shape[0]
    for key in td.keys(True, True):
        value = td.get(key)
        if isinstance(value, Tensor) and value.ndim:
            return value.shape[0]
    return 1


def iterate(dataloader: Iterable[object]) -> Iterator[object]:
    """The loader's batches; a single batch given by mistake is refused."""
    if isinstance(dataloader, Mapping | TensorDictBase | Tensor | str):
        raise TypeError(
            f"run takes an iterable of batches, got one {type(dataloader).__name__}: put it in a list, run(pipeline, [batch])."
        )
    return iter(dataloader)
