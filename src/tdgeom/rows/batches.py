"""Whatever a loader yields, as a TensorDict of batch size []."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import (
    LazyStackedTensorDict,
    NonTensorStack,
    TensorDict,
    TensorDictBase,
    is_non_tensor,
    is_tensor_collection,
)
from torch import Tensor

from tdgeom.core.keys import Key, key_tuple
from tdgeom.numerics.on_host import remember

__all__ = ["as_batch", "batch_length", "iterate"]


def as_batch(
    batch: object, in_keys: Sequence[Key] | None, device: torch.device | None, *, named: bool = True
) -> TensorDict:
    """A shallow TensorDict of batch size []: the batch itself is never altered.

    ``in_keys`` are the keys of values without names; where nobody ``named`` them, one value more, (B,), is the labels.
    """
    ragged: dict[str, Tensor] = {}
    if is_tensor_collection(batch):
        td = _copy(batch, ragged)
    elif isinstance(batch, Mapping):
        td = TensorDict({}, batch_size=[])
        for key, value in batch.items():
            _put(td, key, value, ragged)
    else:
        values = (
            [batch]
            if isinstance(batch, Tensor | np.ndarray)
            else list(batch)
            if isinstance(batch, list | tuple)
            else None
        )
        if values is None:
            raise TypeError(
                f"run takes batches that are a dict, a BatchEncoding, a TensorDict, a tensor, an array or a tuple of these, got "
                f"{type(batch).__name__}. "
                + (
                    "Texts become batches with run(..., tokenizer=tokenizer), or tdgeom.text.TextBatches(texts, tokenizer)."
                    if isinstance(batch, str)
                    else "Give the loader a collate_fn, such as the tokenizer's data collator."
                )
            )
        if (
            not named
            and in_keys is not None
            and len(in_keys) == len(values) - 1 == 1
            and _is_labels(values[1])
        ):
            in_keys = [*in_keys, "labels"]
        if in_keys is None or len(in_keys) < len(values):
            raise ValueError(
                f"run got a batch of {len(values)} unnamed value(s): name them with in_keys=, for instance "
                f"run(..., in_keys=['input_ids', 'attention_mask']); got in_keys={in_keys!r}."
            )
        td = TensorDict({}, batch_size=[])
        for key, value in zip(in_keys, values):
            _put(td, key, value, ragged)
    if ragged:
        _mask_ends(td, ragged)
    return td if device is None else _moved(td, device)


def _moved(td: TensorDict, device: torch.device) -> TensorDict:
    """A batch on a device; the host chooses rows by its masks and ids, and keeps what it knows of them."""
    moved = td.to(device, non_blocking=True)
    for key, value in td.items(True, True):
        if isinstance(value, Tensor):
            remember(moved.get(key), value)
    return moved


def _is_labels(value: Any) -> bool:
    """Whether the second of two values is a label a sequence; a mask, say, has more dimensions."""
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim == 1
    return isinstance(value, list | tuple) and not any(
        isinstance(one, list | tuple | Tensor | np.ndarray) for one in value
    )


def _copy(td: Any, lengths: dict[str, Tensor]) -> TensorDict:
    """A TensorDict's or TensorClass's entries, without its batch size."""
    copy = TensorDict({}, batch_size=[])
    for key in td.keys():
        ragged = isinstance(td, LazyStackedTensorDict) and td.get_item_shape(key).count(-1) > 0
        value = td.get(key, as_nested_tensor=True, layout=torch.jagged) if ragged else td.get(key)
        _put(copy, key, value, lengths)
    return copy


def _put(td: TensorDict, key: Key, value: Any, lengths: dict[str, Tensor]) -> None:
    if value is None:
        return
    if is_non_tensor(value):
        value = value.tolist() if isinstance(value, NonTensorStack) else value.data
    if isinstance(value, Tensor) and value.is_nested:
        parts = value.unbind()
        lengths[key_tuple(key)[-1]] = torch.tensor([part.shape[0] for part in parts], device="cpu")
        td.set(key, torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True))
    elif isinstance(value, Tensor):
        td.set(key, value)
    elif is_tensor_collection(value):
        td.set(key, _copy(value, lengths))
    elif isinstance(value, Mapping):
        inner = TensorDict({}, batch_size=[])
        for name, part in value.items():
            _put(inner, name, part, lengths)
        td.set(key, inner)
    else:
        array = _numbers(value)
        if array is not None:
            td.set(key, torch.as_tensor(array, device="cpu"))
        else:
            listed = value.tolist() if isinstance(value, np.ndarray) else value
            td.set_non_tensor(key, list(listed) if isinstance(listed, list | tuple) else listed)


def _numbers(value: Any) -> np.ndarray | None:
    """A list, an array or a number as an array of numbers; None where it holds something else, or lists of several lengths."""
    if isinstance(value, str | bytes):
        return None
    if isinstance(value, list | tuple) and value and all(isinstance(one, Tensor) for one in value):
        value = [one.detach().cpu().numpy() for one in value]
    try:
        array = np.asarray(value)
    except ValueError:
        return None
    return array if array.dtype.kind in "biuf" else None


def _mask_ends(td: TensorDict, lengths: dict[str, Tensor]) -> None:
    """The mask of sequences of different lengths, (B, *, ...), which now lie as (B, T, ...) with zeros behind."""
    ids = td.get("input_ids", None)
    if "attention_mask" in td.keys() or (ids is not None and "input_ids" not in lengths):
        return
    named = lengths.get("input_ids", next(iter(lengths.values())))
    if "input_ids" not in lengths and not all(torch.equal(named, other) for other in lengths.values()):
        told = {name: value.tolist()[:6] for name, value in lengths.items()}
        raise ValueError(
            f"a batch holds sequences of different lengths, {told}, and nothing says which of them are the positions. Put an "
            f"'attention_mask' (B, T) into the batch."
        )
    mask = torch.arange(int(named.max()), device="cpu") < named[:, None]
    td.set("attention_mask", mask.long())


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
