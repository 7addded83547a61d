"""What stages that read rows with labels share: calling with plain tensors, checking labels, shared keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import is_tensor_collection
from torch import Tensor

from tdgeom.core.keys import Key, as_key, key_tuple
from tdgeom.core.streaming_stage import StreamingStage

__all__: list[str] = []

MAX_CLASSES = 4096


class Loose:
    """Just enough of a TensorDict to hold ``"tokens"`` beside ``("tokens", "label")``, as plain tensors come."""

    def __init__(self, values: Mapping[Key, Tensor], batch_size: torch.Size = torch.Size([])) -> None:  # noqa: B008
        self.values = {as_key(key_tuple(key)): value for key, value in values.items()}
        self.batch_size = batch_size

    def get(self, key: Key, default: Any = None) -> Any:
        return self.values.get(as_key(key_tuple(key)), default)

    def set(self, key: Key, value: Tensor) -> None:
        self.values[as_key(key_tuple(key))] = value

    def keys(self, *_: bool) -> list[Key]:
        return list(self.values)


def loose_inputs(stage: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Loose:
    """Plain tensors by position or by name (``tokens=``, ``tokens_label=`` or ``label=``) as a stage's inputs."""
    if len(args) > len(stage.in_keys):
        raise TypeError(f"{type(stage).__name__} reads {len(stage.in_keys)} tensors, got {len(args)}.")
    values = dict(zip(stage.in_keys, args))
    for key in stage.in_keys[len(args) :]:
        parts = key_tuple(key)
        for name in ("_".join(parts), parts[-1]):
            if name in kwargs:
                values[key] = kwargs.pop(name)
                break
    if kwargs:
        raise TypeError(f"{type(stage).__name__} reads {stage.in_keys}, got also {sorted(kwargs)}.")
    return Loose({key: value for key, value in values.items() if value is not None})


class LabelledStage(StreamingStage):
    """A streaming stage on rows, their labels and row ids; only the rows belong to a site."""

    reads: Any = {"tokens": "N D", ("tokens", "label"): None, "row_id": "N"}
    optional = frozenset({"row_id"})
    holder = Loose

    @property
    def shared(self) -> frozenset[Key]:  # type: ignore[override]
        """One label and one row id for all sites."""
        return frozenset(as_key(key_tuple(key)) for key in self.in_keys[1:])

    # dispatch would put "tokens" and ("tokens", "label") into one TensorDict, which cannot hold both.
    def forward(self, tensordict: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Update with the rows of a TensorDict (or plain tensors) and publish the values so far."""
        if is_tensor_collection(tensordict) or isinstance(tensordict, Loose):
            self._refuse_nonfinite(tensordict)
            self.update(tensordict)
            return self.publish(tensordict)
        given = loose_inputs(self, (() if tensordict is None else (tensordict,)) + args, kwargs)
        self._refuse_nonfinite(given)  # type: ignore[arg-type]
        self.update(given)  # type: ignore[arg-type]
        out = self.publish(given)  # type: ignore[arg-type]
        values = tuple(out.get(key) for key in self.out_keys)
        return values[0] if len(values) == 1 else values


def one_hot(label: Tensor, classes: int) -> Tensor:
    """Class indicators in float64: int (N,) -> (N, classes)."""
    return torch.nn.functional.one_hot(label, classes).double()


def row_labels(
    label: Tensor, rows: Tensor, key: Key, ignore_index: int, classes: int | None, owner: str
) -> tuple[Tensor, Tensor]:
    """Labels as int64 (N,) or float64 (N,) / (N, K), and which rows have one; anything else is refused."""
    n = rows.shape[0]
    if label.ndim == 2 and label.shape[1] == 1:
        label = label[:, 0]
    fits = label.shape[:1] == (n,) and (label.ndim == 1 or (label.ndim == 2 and label.is_floating_point()))
    if not fits:
        raise ValueError(
            f"{owner} expects {key!r} to hold one class a row, integers of shape ({n},), or regression targets, floats of "
            f"shape ({n},) or ({n}, K), to go with rows of shape {tuple(rows.shape)}; got {label.dtype} of shape "
            f"{tuple(label.shape)}. Labels a token (B, T) or a sequence (B,) come to rows through "
            f"SelectTokens(also=['label'])."
        )
    if label.is_floating_point():
        return label.double(), torch.ones(n, dtype=torch.bool, device=label.device)
    label = label.long()
    used = label != ignore_index
    low, high = (int(label[used].min()), int(label[used].max())) if bool(used.any()) else (0, 0)
    limit = MAX_CLASSES if classes is None else classes
    if low < 0 or high >= limit:
        raise ValueError(
            f"{owner} expects classes 0..{limit - 1} at {key!r} (and {ignore_index} for rows without a label), got values from "
            f"{low} to {high}. Number the classes from 0; for a numeric target give floats."
        )
    return torch.where(used, label, -1), used
