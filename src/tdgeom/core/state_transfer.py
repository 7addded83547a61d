"""Move streaming state between ranks as plain tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

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
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    wire = (
        torch.device("cuda", torch.cuda.current_device())
        if dist.get_backend() == "nccl"
        else torch.device("cpu")
    )
    if dist.get_rank() != 0:
        for value in state.values():
            dist.send(_header(value).to(wire), dst=0)
            if value.numel():
                dist.send(value.contiguous().to(wire), dst=0)
        return
    for source in range(1, dist.get_world_size()):
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
    header = torch.zeros(2 + _MAX_DIMS, dtype=torch.int64)
    header[0], header[1] = _DTYPES.index(value.dtype), value.ndim
    header[2 : 2 + value.ndim] = torch.tensor(value.shape, dtype=torch.int64)
    return header
