"""Process groups: who this process is, and values and states moved between ranks."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tdgeom.core.one_rank import is_alone
from tdgeom.core.rank_failures import together
from tdgeom.core.warnings import tell

__all__ = [
    "broadcast_number",
    "from_first_rank",
    "from_rank",
    "gather_numbers",
    "gather_states",
    "gather_texts",
    "rank_and_world",
    "refuse_no_group",
    "sum_over_ranks",
    "tell_not_shared",
]


def rank_and_world() -> tuple[int, int]:
    """(rank, world size); (0, 1) without a process group, and inside ``alone``."""
    if not is_alone() and dist.is_available() and dist.is_initialized():
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
    with together("the counts of all ranks"):
        dist.all_reduce(total)
    return dict(zip(values, total.tolist()))


def broadcast_number(number: int) -> int:
    """Rank 0's number, on every rank. Collective."""
    shared = torch.tensor(number, dtype=torch.int64, device=_wire())
    with together("a number of rank 0"):
        dist.broadcast(shared, src=0)
    return int(shared)


def gather_numbers(numbers: Sequence[int]) -> list[list[int]]:
    """Every rank's int64 numbers, as many as each has, on every rank. Collective."""
    world = rank_and_world()[1]
    if world == 1:
        return [list(numbers)]
    wire = _wire()
    sizes = [torch.zeros((), dtype=torch.int64, device=wire) for _ in range(world)]
    with together("how many numbers each rank has"):
        dist.all_gather(sizes, torch.tensor(len(numbers), dtype=torch.int64, device=wire))
    counts = [int(size) for size in sizes]
    if not max(counts):
        return [[] for _ in counts]
    padded = torch.zeros(max(counts), dtype=torch.int64, device=wire)
    padded[: len(numbers)] = torch.tensor(list(numbers), dtype=torch.int64, device=wire)
    gathered = [torch.zeros_like(padded) for _ in range(world)]
    with together("the numbers of all ranks"):
        dist.all_gather(gathered, padded)
    return [part[:count].tolist() for part, count in zip(gathered, counts)]


def gather_texts(text: str) -> list[str]:
    """Every rank's text, on every rank. Collective."""
    size = len(text.encode())
    words = torch.frombuffer(bytearray(text.encode() + bytes(-size % 8 + 8)), dtype=torch.int64)
    every = gather_numbers([size, *words.tolist()])
    return [bytes(torch.tensor(part[1:]).view(torch.uint8).numpy())[: part[0]].decode() for part in every]


def from_first_rank(value: Any) -> Any:
    """What rank 0 has, on every rank; the others' own is not read. Collective."""
    return from_rank(value, 0)


def from_rank(value: Any, rank: int) -> Any:
    """What a rank has, on every rank; the others' own is not read. Collective."""
    if rank_and_world()[1] == 1:
        return value
    held: list[Any] = [None, None]
    if rank_and_world()[0] == rank:
        try:
            held[0] = pickle.dumps(value)
        except (
            Exception
        ) as error:  # a function of the user's that cannot travel; the others wait to hear of it
            held[1] = f"{type(error).__name__}: {error}"
    with together(f"what rank {rank} has"):
        dist.broadcast_object_list(held, src=rank, device=_wire())
    if held[1] is not None:
        raise TypeError(f"rank {rank} could not send the other ranks what it has: {held[1]}")
    return value if rank_and_world()[0] == rank else pickle.loads(held[0])


def refuse_no_group(owner: str) -> None:
    """An error where a launcher started several processes, and none of them has said that they belong together."""
    world = os.environ.get("WORLD_SIZE", "1")
    if (
        is_alone()
        or rank_and_world()[1] > 1
        or "RANK" not in os.environ
        or not world.isdigit()
        or int(world) < 2
    ):
        return
    if dist.is_available() and dist.is_initialized():  # a group of this process alone
        return
    raise RuntimeError(
        f"{owner}: a launcher started {world} processes (WORLD_SIZE), this is RANK {os.environ['RANK']}, but there is no process "
        f"group: each would read all of the data. To share the work call torch.distributed.init_process_group('gloo') first, or "
        f"'nccl' on CUDA behind torch.cuda.set_device(int(os.environ['LOCAL_RANK'])). For runs that have nothing to do with one "
        f"another: with tg.alone(): {owner}(...)."
    )


def tell_not_shared(owner: str, remedy: str) -> None:
    """Warn, in a process group, that a function does all of its work on every rank, each what it is given."""
    world = rank_and_world()[1]
    if world > 1:
        tell(
            f"{owner} does all of its work on each of the {world} ranks: it is not shared out. {remedy}",
            UserWarning,
        )


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
    for source in range(1, world):
        if rank == source:
            _send(state, wire)
        elif rank == 0:
            yield _receive(state, source, wire)
        else:
            for step in _STEPS:
                with together(f"{step} of rank {source}"):
                    pass


_STEPS = ("the shapes", "the state")


def _send(state: Mapping[str, Tensor], wire: torch.device) -> None:
    headers = torch.stack([_header(value) for value in state.values()]).to(wire)
    with together(f"{_STEPS[0]} of rank {dist.get_rank()}"):
        dist.send(headers, dst=0)
    values = [value.contiguous().to(wire) for value in state.values() if value.numel()]
    with together(f"{_STEPS[1]} of rank {dist.get_rank()}"):
        for value in values:
            dist.send(value, dst=0)


def _receive(state: Mapping[str, Tensor], source: int, wire: torch.device) -> dict[str, Tensor]:
    """The state of a rank, for which memory is taken before anything is sent."""
    headers = torch.zeros((len(state), 2 + _MAX_DIMS), dtype=torch.int64, device=wire)
    with together(f"{_STEPS[0]} of rank {source}"):
        dist.recv(headers, src=source)
    received = {
        name: torch.zeros(sizes[:ndim], dtype=_DTYPES[code], device=wire)
        for name, (code, ndim, *sizes) in zip(state, headers.tolist(), strict=True)
    }
    with together(f"{_STEPS[1]} of rank {source}"):
        for value in received.values():
            if value.numel():
                dist.recv(value, src=source)
    return {name: value.to(state[name].device) for name, value in received.items()}


def _header(value: Tensor) -> Tensor:
    header = torch.zeros(2 + _MAX_DIMS, dtype=torch.int64, device="cpu")
    header[0], header[1] = _DTYPES.index(value.dtype), value.ndim
    header[2 : 2 + value.ndim] = torch.tensor(value.shape, dtype=torch.int64, device="cpu")
    return header
