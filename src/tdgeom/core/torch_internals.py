"""What torch knows of its process groups and keeps to itself, asked for in this file alone.

These names are torch's own and may move with a release (known: 2.4 to 2.13). Each is asked for through ``_of_torch``, whose error
says which one it was; ``tests/core/test_torch_internals.py`` asks for all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

__all__ = [
    "FsdpGroup",
    "default_group",
    "default_store",
    "fsdp_groups",
    "group_timeout",
    "is_context_parallel",
]

Found = TypeVar("Found")


def _of_torch(what: str, ask: Callable[[], Found]) -> Found:
    try:
        return ask()
    except AttributeError as error:
        raise RuntimeError(
            f"torch {torch.__version__} keeps {what} elsewhere than tdgeom knows ({error}). Use a torch that is known (2.4 to "
            f"2.13), or a newer tdgeom."
        ) from error


def default_store() -> Any:
    """The store of the default process group; None of a group without one (MPI)."""
    return _of_torch("the process group's store", lambda: dist.distributed_c10d._get_default_store())


def default_group() -> Any:
    """The default process group itself."""
    return _of_torch("the default process group", lambda: dist.distributed_c10d._get_default_group())


def group_timeout() -> float:
    """Seconds that the default process group waits in a collective."""
    backend = dist.get_backend_config().split(",")[0]  # "cpu:gloo,cuda:nccl", or "gloo"
    kind = backend.split(":")[0] if ":" in backend else "cuda" if backend == "nccl" else "cpu"
    found = _of_torch(
        "the process group's timeout",
        lambda: dist.distributed_c10d._get_default_group()._get_backend(torch.device(kind)).options._timeout,
    )
    return float(found.total_seconds())


class FsdpGroup:
    """What FSDP2 gathers for one forward: ``mesh``, over which its parameters lie, and the ``ids`` of these."""

    def __init__(self, group: Any) -> None:
        self.mesh: Any = group.mesh_info.mesh
        self.ids = [id(one.sharded_param) for one in group.fsdp_params]


def fsdp_groups(module: nn.Module) -> Sequence[FsdpGroup]:
    """What FSDP2 gathers for a module's forward, if it does."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    if loaded is None or not isinstance(module, loaded.FSDPModule):
        return ()
    return _of_torch("what FSDP2 gathers", lambda: _groups(module))


def _groups(module: Any) -> list[FsdpGroup]:
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):  # since 2.12
        return [FsdpGroup(group) for group in state._fsdp_param_groups]
    return [] if state._fsdp_param_group is None else [FsdpGroup(state._fsdp_param_group)]


def is_context_parallel(modules: Iterable[nn.Module]) -> bool:
    """Whether a context of torch's context parallelism is open, or a module is parallelised by it."""
    hooks = [
        hook.func
        for module in modules
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if isinstance(hook, partial)
    ]
    functions = (nn.functional.scaled_dot_product_attention, *hooks)
    return any("_context_parallel" in str(getattr(one, "__module__", "")) for one in functions)
