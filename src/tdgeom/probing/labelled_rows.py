"""Rows and their labels: which keys they come under, and checks of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdgeom.core.keys import Key
from tdgeom.core.words import Words
from tdgeom.probing.class_labels import named_label

__all__: list[str] = []

MAX_CLASSES = 4096


def labelled_keys(
    owner: str,
    labels: str,
    control: str | None = None,
    *,
    rows: Mapping[Key, str | None] | None = None,
    root: str = "",
) -> dict[Key, str | None]:
    """What a stage reads: rows, the carried ``labels``, row ids, types of a control task, documents; ``root`` of a sample."""
    if not isinstance(labels, str) or not isinstance(control, str | None):
        raise TypeError(
            f"{owner}: labels and control name values that SelectTokens(also=[...]) carries, such as 'label', got {labels!r} "
            f"and {control!r}."
        )
    if labels == control:
        raise ValueError(f"{owner}: labels and control both name {labels!r}; a control task needs types.")
    reads: dict[Key, str | None] = {**(rows or {"tokens": "N D"})}
    reads |= {(f"{root}carried", labels): None, f"{root}row_id": "N"}
    reads |= {} if control is None else {(f"{root}carried", control): "N"}
    return {**reads, (f"{root}carried", "document_id"): "N"}


def plain_rows(owner: str, **given: Any) -> list[Any]:
    """What a user hands over, as tensors: tensors, NumPy arrays or lists of numbers; (N, D) rows and finite values.

    ``label`` may have any shape of its own, or hold names: ``Words``.

    >>> [value.dtype for value in plain_rows("LinearProbe", x=[[1.0], [2.0]], label=[0, 1])]
    [torch.float32, torch.int64]
    """
    found: list[Tensor | Words] = []
    for name, value in given.items():
        if name == "label" and (words := named_label(value)) is not None:
            found.append(words)
            continue
        if not isinstance(value, Tensor):
            try:
                value = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError):
                kind = getattr(value, "dtype", None) or type(value).__name__
                raise TypeError(
                    f"{owner} expects numbers at {name}, got {kind}. Labels may be numbers or names of classes, one a row."
                ) from None
        if name != "label" and value.ndim != 2:
            raise ValueError(
                f"{owner} expects rows {name} of shape (N, D), got {tuple(value.shape)}. Remedy: x.flatten(0, -2) with a "
                f"label for each row."
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"{owner}: {name} (shape {tuple(value.shape)}) holds NaN or Inf. Drop such rows first."
            )
        found.append(value)
    return found


def as_numpy(value: Tensor) -> np.ndarray:
    """A tensor as an array; half precision, which NumPy lacks in part, in float32."""
    value = value.detach().cpu()
    return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()


def one_hot(label: Tensor, classes: int) -> Tensor:
    """Class indicators in float64: int (N,) -> (N, classes)."""
    return torch.nn.functional.one_hot(label, classes).double()


def row_labels(
    label: Tensor,
    rows: Tensor,
    *,
    key: Key,
    owner: str,
    ignore_index: int = -100,
    n_classes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Labels as int64 (N,), -1 for none, or float64 (N, K), and which rows have one; anything else is refused."""
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
        label = label if label.ndim == 2 else label[:, None]
        return label.double(), torch.ones(n, dtype=torch.bool, device=label.device)
    label = label.long()
    used = label != ignore_index
    told = label[used]
    low, high = torch.stack(torch.aminmax(told)).tolist() if len(told) else (0, 0)
    limit = MAX_CLASSES if n_classes is None else n_classes
    if low < 0 or high >= limit:
        raise ValueError(
            f"{owner} expects classes 0..{limit - 1} at {key!r} (and {ignore_index} for rows without a label), got values from "
            f"{low} to {high}. Number the classes from 0; for a numeric target give floats."
        )
    return torch.where(used, label, -1), used
