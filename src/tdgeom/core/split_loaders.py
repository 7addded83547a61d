"""Loaders that hold one rank's part of the data: how they are told, and where in the whole their sequences stand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from tdgeom.core.process_groups import rank_and_world

__all__ = ["SplitLoader", "find_split"]

_INSIDE = ("base_dataloader", "dataset", "data", "texts", "images", "source")  # what a loader reads from
_SAMPLERS = ("batch_sampler", "sampler")
_DEEPEST = 12


@dataclass(frozen=True)
class SplitLoader:
    """One part of data that are split by rank.

    ``by``: what splits them. ``part`` of ``parts``. ``alike``: what must be the same on all ranks for the parts to fit together.
    ``length``: sequences of the whole, where a sampler deals them out one after the other (``by_batch``: a batch after the
    other) in batches of ``batch_size``; what it deals out behind them repeats others. ``repeats``: whether it may repeat.
    """

    by: str
    part: int
    parts: int
    alike: dict[str, Any] = field(default_factory=dict)
    length: int | None = None
    by_batch: bool = False
    batch_size: int | None = None
    repeats: bool = True

    def places(self, before: int, batch: int, count: int) -> Tensor:
        """The places in the whole of a batch's ``count`` sequences: ``before`` came from this part already, in ``batch`` batches.

        >>> SplitLoader("a sampler", 1, 2).places(3, 1, 3).tolist()
        [7, 9, 11]
        """
        numbers = torch.arange(count, device="cpu")
        if self.by_batch and self.batch_size is not None:
            return (batch * self.parts + self.part) * self.batch_size + numbers
        return (before + numbers) * self.parts + self.part

    def fits(self, before: int, batch: int, count: int) -> bool:
        """Whether a batch has as many sequences as the sampler has dealt out for it: each element of the data gave one."""
        if self.length is None or self.batch_size is None:
            return False
        if count == self.batch_size:
            return True
        places = self.places(before, batch, count + 1)  # a smaller batch is the last one
        return count < self.batch_size and int(places[-1]) >= self.length


def find_split(loader: Any) -> SplitLoader | None:
    """How a loader is split by rank, where it or what it reads from says so; None of one that does not, or of one part alone.

    Known are samplers and batch samplers that have ``num_replicas`` and ``rank`` (``DistributedSampler``), what Accelerate
    prepares, iterable data sets behind ``datasets.distributed.split_dataset_by_node`` (of a map-style one it takes a slice, which
    nothing tells from any other: ``sharded=True``), and iterables with an attribute
    ``split_by_rank = True``.

        >>> from torch.utils.data import DataLoader
        >>> sampler = DistributedSampler(range(7), num_replicas=2, rank=1, shuffle=False)
        >>> found = find_split(DataLoader(range(7), sampler=sampler, batch_size=2))
        >>> found.by, found.part, found.parts, found.length
        ('DistributedSampler', 1, 2, 7)
    """
    for one in _inside(loader):
        found = _split_of(one)
        if found is not None and found.parts > 1:
            return found
    return None


def _inside(loader: Any) -> Iterator[Any]:
    """A loader, the data that it reads, what these read, and so on."""
    seen: set[int] = set()
    found = [loader]
    while found and len(seen) < _DEEPEST:
        one = found.pop(0)
        if id(one) in seen or isinstance(one, list | tuple | dict | str | Tensor):
            continue
        seen.add(id(one))
        yield one
        found += [inner for name in _INSIDE if (inner := _attribute(one, name)) is not None]


def _attribute(one: Any, name: str) -> Any:
    try:
        return getattr(one, name, None)
    except Exception:  # a property of somebody's that fails
        return None


def _split_of(one: Any) -> SplitLoader | None:
    name = type(one).__name__
    if getattr(one, "split_by_rank", False) is True:
        return SplitLoader(name, *rank_and_world(), repeats=False)
    if name == "DataLoaderDispatcher":  # the first rank reads, the others get their slices of it
        return SplitLoader(name, *rank_and_world())
    by_node = _attribute(one, "_distributed")
    if _whole_number(_attribute(by_node, "world_size")):
        return SplitLoader("split_dataset_by_node", by_node.rank, by_node.world_size, repeats=False)
    batch_size = _attribute(one, "batch_size")
    for sampler in _samplers(one):
        parts, part = _attribute(sampler, "num_replicas"), _attribute(sampler, "rank")
        if _whole_number(parts) and _whole_number(part):
            return _of_sampler(sampler, batch_size)
        if _whole_number(_attribute(sampler, "num_processes")):
            return _of_batches(sampler)
    if _whole_number(_attribute(one, "num_processes")) and _whole_number(_attribute(one, "process_index")):
        return SplitLoader(name, one.process_index, one.num_processes)
    return None


def _samplers(one: Any) -> Iterator[Any]:
    found = [inner for name in _SAMPLERS if (inner := _attribute(one, name)) is not None]
    while found:
        sampler = found.pop(0)
        yield sampler
        found += [inner for name in _SAMPLERS if (inner := _attribute(sampler, name)) is not None]


def _of_sampler(sampler: Any, batch_size: Any) -> SplitLoader:
    """A sampler that deals out single elements; only torch's own is known to do so in turn."""
    length, dealt = _length(_attribute(sampler, "dataset")), _attribute(sampler, "total_size")
    if length is not None and _whole_number(dealt):
        length = min(length, dealt)  # drop_last leaves the end out
    alike = {
        "length": length,
        **{name: _attribute(sampler, name) for name in ("seed", "epoch", "shuffle", "drop_last")},
    }
    alike = {name: value for name, value in alike.items() if isinstance(value, int)}
    in_turn = type(sampler) is DistributedSampler and _whole_number(batch_size)
    return SplitLoader(
        type(sampler).__name__,
        sampler.rank,
        sampler.num_replicas,
        alike,
        length=length if in_turn else None,
        batch_size=batch_size if in_turn else None,
        repeats=not _attribute(sampler, "drop_last"),
    )


def _of_batches(sampler: Any) -> SplitLoader:
    """Accelerate's batch sampler, which deals out the batches of another, or slices of each."""
    inner = _attribute(sampler, "batch_sampler")
    length, size, parts = (
        _length(_attribute(inner, "sampler")),
        _attribute(sampler, "batch_size"),
        sampler.num_processes,
    )
    if _attribute(sampler, "split_batches") and _whole_number(size):
        size = size // parts
    known = type(sampler).__name__ == "BatchSamplerShard" and length is not None and _whole_number(size)
    return SplitLoader(
        type(sampler).__name__,
        sampler.process_index,
        parts,
        {} if length is None else {"length": length},
        length=length if known else None,
        by_batch=True,
        batch_size=size if known else None,
        repeats=bool(_attribute(sampler, "even_batches")) and not _attribute(sampler, "drop_last"),
    )


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def _whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
