"""What calls gave, written into TensorDicts, and kept from a model that writes to the same memory again."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdgeom.core.keys import Key, key_tuple

_Name = TypeVar("_Name")

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


def held_elsewhere(values: Mapping[_Name, Tensor]) -> dict[_Name, Tensor]:
    """Those whose memory is held by more than these tensors: by a static buffer of the model, a view, a graph.

    >>> buffer = torch.zeros(3)
    >>> list(held_elsewhere({"a": buffer[:2], "b": torch.zeros(4)}))
    ['a']
    """
    found, own = {}, Counter[int]()
    for key, value in values.items():
        if type(value) is Tensor and value.layout is torch.strided:
            at = value.untyped_storage()._cdata
            if _holders(at) > 2:  # the tensor, and the storage's own object, made by asking
                found[key] = value
    for value in {id(value): value for value in found.values()}.values():
        own[value.untyped_storage()._cdata] += 1
    return {k: v for k, v in found.items() if _holders(at := v.untyped_storage()._cdata) > own[at] + 1}


# a torch that does not count says: many
_holders: Callable[[int], float] = getattr(torch._C, "_storage_Use_Count", lambda at: float("inf"))


class LastRecord:
    """The newest record of a context, copied before the next call where that might write to its memory.

    A model may give the same memory at every call (a static output buffer, a CUDA graph). What nothing else holds is safe; the
    rest is copied just before the next call, and once a call has come back in the same memory, every record is copied at once.
    """

    def __init__(self, keys: Iterable[Key]) -> None:
        self.reuses = False
        self._leaves: dict[tuple[str, ...], list[str]] = {}
        for key in keys:
            *parents, leaf = key_tuple(key)
            self._leaves.setdefault(tuple(parents), []).append(leaf)
        self._parents: list[tuple[weakref.ref[TensorDictBase], list[str]]] = []
        self._copied: list[Tensor] = []

    def own(self, values: dict[Key, Tensor]) -> dict[Key, Tensor]:
        """What the call that has just ended may record."""
        before = {value.untyped_storage().data_ptr() for value in self._copied}
        if before and any(value.untyped_storage().data_ptr() in before for value in values.values()):
            self.reuses = True
        self._copied = []
        return {key: value.clone() for key, value in values.items()} if self.reuses else values

    def keep(self, record: TensorDictBase) -> None:
        """Note the record that the next call must not change; a part of it may be all that is kept."""
        parents = ((record.get(at, None) if at else record, names) for at, names in self._leaves.items())
        self._parents = [(weakref.ref(parent), names) for parent, names in parents if parent is not None]

    def secure(self) -> None:
        """The next call begins."""
        parents, self._parents = self._parents, []
        alive = [(parent, names) for ref, names in parents if (parent := ref()) is not None]
        values = {(i, n): p.get(n, None) for i, (p, names) in enumerate(alive) for n in names}
        for (i, name), value in held_elsewhere({k: v for k, v in values.items() if v is not None}).items():
            if not (self.reuses or value.requires_grad):
                self._copied.append(value)
                alive[i][0].set(name, value.clone())
