"""Control tasks: a label that says nothing but which type a row is, so that only memory can predict it."""

from __future__ import annotations

import torch
from torch import Tensor

from tdgeom.numerics.hashing import hash_ids

__all__ = ["BUCKETS", "control_labels", "control_map", "type_buckets"]

BUCKETS = 512


def type_buckets(types: Tensor, seed: int = 0) -> Tensor:
    """The bucket 0..511 of each type (a token id, say), from (type, seed) alone: int (N,) -> int64 (N,).

    >>> int(type_buckets(torch.arange(10_000)).bincount().count_nonzero())
    512
    """
    return hash_ids(types.long(), seed ^ 0x5EED) % BUCKETS


def control_map(class_counts: Tensor, seed: int = 0) -> Tensor:
    """The random class of each bucket, drawn from the labels' own distribution: (K,) counts -> int64 (512,).

    >>> control_map(torch.tensor([0, 5])).unique().tolist()
    [1]
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(class_counts.double().cpu(), BUCKETS, replacement=True, generator=generator).to(
        class_counts.device
    )


def control_labels(types: Tensor, class_counts: Tensor, seed: int = 0) -> Tensor:
    """The control task of Hewitt and Liang (2019): every type gets one random label, the same wherever it occurs.

    Labels are drawn from the real labels' distribution, so that both tasks have the same baseline. Types share their
    label with the others of their bucket (one of 512), which lets one pass over a stream gather all that is needed.

    >>> labels = control_labels(torch.tensor([7, 8, 7]), torch.tensor([10, 10]))
    >>> bool(labels[0] == labels[2])
    True
    """
    return control_map(class_counts, seed)[type_buckets(types, seed)]
