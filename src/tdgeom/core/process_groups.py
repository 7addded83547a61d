"""Process groups: who does which batch, which repeated sequences count once, and states moved between ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Repeats", "broadcast_number", "gather_states", "rank_and_world", "sum_over_ranks"]


def rank_and_world() -> tuple[int, int]:
    """(rank, world size); (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _wire() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if dist.get_backend() == "nccl"
        else torch.device("cpu")
    )


def sum_over_ranks(values: dict[str, int]) -> dict[str, int]:
    """Counts added over all ranks."""
    if rank_and_world()[1] == 1:
        return values
    total = torch.tensor(list(values.values()), dtype=torch.int64, device=_wire())
    dist.all_reduce(total)
    return dict(zip(values, total.tolist()))


def broadcast_number(number: int) -> int:
    """Rank 0's number, on every rank. Collective."""
    shared = torch.tensor(number, dtype=torch.int64, device=_wire())
    dist.broadcast(shared, src=0)
    return int(shared)


class Repeats:
    """Which sequences of a sharded loader are new: every id counts once over all ranks, on the lowest rank first.

    Samplers that even out ranks repeat documents. Each step every rank announces the ids of its batch (or that it has
    none left), so all ranks hold the same set of seen ids and nobody counts a document twice.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def step(self, ids: Tensor | None) -> tuple[Tensor | None, bool]:
        """(the new ones among ids, whether every rank is out of batches). Collective: all ranks call it in step."""
        rank, world = rank_and_world()
        mine = [] if ids is None else ids.tolist()
        new: list[int] = []
        every = self._exchange(mine, ids is None) if world > 1 else [None if ids is None else mine]
        for source, announced in enumerate(every):
            for one in announced or []:
                if one not in self._seen:
                    self._seen.add(one)
                    if source == rank:
                        new.append(one)
        finished = all(announced is None for announced in every)
        return (None if ids is None else torch.tensor(new, dtype=torch.int64, device="cpu")), finished

    @staticmethod
    def _exchange(ids: list[int], out_of_batches: bool) -> list[list[int] | None]:
        _, world = rank_and_world()
        wire = _wire()
        sizes = [torch.zeros((), dtype=torch.int64, device=wire) for _ in range(world)]
        dist.all_gather(
            sizes, torch.tensor(-1 if out_of_batches else len(ids), dtype=torch.int64, device=wire)
        )
        longest = max(int(size) for size in sizes)
        if longest <= 0:
            return [None if int(size) < 0 else [] for size in sizes]
        padded = torch.zeros(longest, dtype=torch.int64, device=wire)
        padded[: len(ids)] = torch.tensor(ids, dtype=torch.int64, device=wire)
        gathered = [torch.zeros_like(padded) for _ in range(world)]
        dist.all_gather(gathered, padded)
        return [None if int(size) < 0 else part[: int(size)].tolist() for size, part in zip(sizes, gathered)]


_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
_MAX_DIMS = 6


def gather_states(state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """On rank 0 the states of ranks 1, 2, ..., one at a time; on the others nothing (they send theirs).

    Shapes and dtypes may differ by rank (a rank without rows holds buffers of length zero), so each tensor travels
    behind a header of its own. Without a process group there is nothing to do.
    """
    rank, world = rank_and_world()
    if world == 1:
        return
    wire = _wire()
    if rank != 0:
        for value in state.values():
            dist.send(_header(value).to(wire), dst=0)
            if value.numel():
                dist.send(value.contiguous().to(wire), dst=0)
        return
    for source in range(1, world):
        received = {}
        for name, own in state.items():
            header = torch.zeros(2 + _MAX_DIMS, dtype=torch.int64, device=wire)
            dist.recv(header, src=source)
            code, ndim, *sizes = header.tolist()
            value = torch.zeros(sizes[:ndim], dtype=_DTYPES[code], device=wire)
            if value.numel():
                dist.recv(value, src=source)
            received[name] = value.to(own.device)
        yield received


def _header(value: Tensor) -> Tensor:
    header = torch.zeros(2 + _MAX_DIMS, dtype=torch.int64, device="cpu")
    header[0], header[1] = _DTYPES.index(value.dtype), value.ndim
    header[2 : 2 + value.ndim] = torch.tensor(value.shape, dtype=torch.int64, device="cpu")
    return header
