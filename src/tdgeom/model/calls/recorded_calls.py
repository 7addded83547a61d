"""What calls gave, written into TensorDicts, and kept from a model that writes to the same memory again."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdgeom.core.keys import Key

__all__ = ["LastRecord", "held_elsewhere", "write_entries"]


def write_entries(tensordict: TensorDictBase, values: Mapping[Key, Tensor], owner: str) -> None:
    """Set every value, or none and an error where the batch size does not fit."""
    size = tensordict.batch_size
    for key, value in values.items() if size else ():
        if value.shape[: len(size)] != size:
            raise ValueError(
                f"{key} has shape {tuple(value.shape)}, which does not start with the TensorDict's batch "
                f"size {list(size)}. Remedy: give {owner} a TensorDict with batch_size [] (td.batch_size = [])."
            )
    # a new root is set whole: that costs a third of setting leaf by leaf
    fresh: dict[str, dict[str, Tensor]] = {}
    for key, value in values.items():
        if (
            not isinstance(key, str)
            and len(key) == 2
            and (key[0] in fresh or key[0] not in tensordict.keys())
        ):
            fresh.setdefault(key[0], {})[key[1]] = value
        elif key != "_":
            tensordict.set(key, value)
    for root, leaves in fresh.items():
        tensordict.set(root, TensorDict(leaves, batch_size=size))


def held_elsewhere(values: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """Those whose memory is held by more than these tensors: by a static buffer of the model, a view, a graph.

    >>> buffer = torch.zeros(3)
    >>> list(held_elsewhere({"a": buffer[:2], "b": torch.zeros(4)}))
    ['a']
    """
    own: dict[int, set[int]] = {}
    plain = {k: v for k, v in values.items() if type(v) is Tensor and v.layout is torch.strided}
    for value in plain.values():
        own.setdefault(value.untyped_storage()._cdata, set()).add(id(value))
    # one holder beside the tensors: the storage's own object, made by asking. A torch that does not count says: all of them
    count = getattr(torch._C, "_storage_Use_Count", None)
    shared = {at for at, tensors in own.items() if count is None or count(at) > len(tensors) + 1}
    return {key: value for key, value in plain.items() if value.untyped_storage()._cdata in shared}


class LastRecord:
    """The newest record of a context, copied before the next call where that might write to its memory.

    A model may give the same memory at every call (a static output buffer, a CUDA graph). What nothing else holds is safe; the
    rest is copied just before the next call, and once a call has come back in the same memory, every record is copied at once.
    """

    def __init__(self) -> None:
        self.reuses = False
        self._record: weakref.ref[TensorDictBase] | None = None
        self._keys: list[Key] = []
        self._copied: list[Tensor] = []

    def own(self, values: dict[Key, Tensor]) -> dict[Key, Tensor]:
        """What the call that has just ended may record."""
        before = {value.untyped_storage().data_ptr() for value in self._copied}
        self._copied = []
        self.reuses = self.reuses or any(v.untyped_storage().data_ptr() in before for v in values.values())
        return {key: value.clone() for key, value in values.items()} if self.reuses else values

    def keep(self, record: TensorDictBase, keys: Iterable[Key]) -> None:
        """Note the record that the next call must not change."""
        self._record, self._keys = weakref.ref(record), list(keys)

    def secure(self) -> None:
        """The next call begins."""
        record = None if self._record is None or self.reuses else self._record()
        self._record = None
        if record is None:
            return
        values = {key: record.get(key, None) for key in self._keys}
        for key, value in held_elsewhere({k: v for k, v in values.items() if v is not None}).items():
            if not value.requires_grad:
                self._copied.append(value)
                record.set(key, value.clone())
