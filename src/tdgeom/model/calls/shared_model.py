"""How the ranks of a process group share one model, found out from the model itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn

from tdgeom.core.one_rank import is_alone
from tdgeom.core.torch_internals import fsdp_groups, is_context_parallel
from tdgeom.model.calls.bound_model import modules_within
from tdgeom.model.structure.distributed_tensors import dtensor_class

__all__ = ["SharedModel", "has_parts", "in_several_ranks", "shared_model", "sharing_of"]


@dataclass(frozen=True)
class SharedModel:
    """How ranks share a model.

    ``collective``: a forward on one rank waits for one on all others, whatever batch they have (FSDP). ``peers``: the ranks, this
    one among them, that hold parts of one layer (tensor parallel): they must be given the same batches. ``by``: found how.
    ``groups``: process groups that make up the peers, one for every dimension of their mesh; ``waits``: all groups in which a
    forward waits for other ranks. ``parted``: the parameters of which peers hold parts, by ``id``.
    """

    collective: bool = False
    peers: tuple[int, ...] = ()
    by: str = ""
    groups: tuple[Any, ...] = ()
    waits: tuple[Any, ...] = ()
    parted: frozenset[int] = field(default=frozenset(), repr=False)


def in_several_ranks() -> bool:
    """Whether there is a process group of more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def has_parts(module: nn.Module) -> bool:
    """Whether ranks hold parts of a module's parameters as DTensors.

    >>> has_parts(nn.Linear(2, 2))
    False
    """
    kind = dtensor_class()
    return kind is not None and any(isinstance(p, kind) for p in module.parameters())


def sharing_of(models: Sequence[nn.Module]) -> SharedModel:
    """How ranks share these models, all of which run on every batch."""
    found = [shared_model(model) for model in models]
    peers = {one.peers for one in found if len(one.peers) > 1}
    if len(peers) > 1:
        raise ValueError(
            f"the models are tensor-parallel over different ranks, {sorted(peers)}: one batch cannot go to both. Parallelize "
            f"them over one mesh, or run one pipeline for each."
        )
    return SharedModel(
        any(one.collective for one in found),
        next(iter(peers), ()),
        ", ".join(dict.fromkeys(one.by for one in found if one.by)),
        tuple(group for one in found for group in one.groups),
        tuple({id(group): group for one in found for group in one.waits}.values()),
    )


def shared_model(model: nn.Module) -> SharedModel:
    """How ranks share a model: by FSDP's modules, by the meshes of its parameters, or not at all.

    Raises:
        ValueError: a model in a pipeline of ranks, context parallelism, layers spread over different sets of ranks, a kind of
            sharding that says nothing of its ranks.

    >>> shared_model(nn.Linear(2, 2))
    SharedModel(collective=False, peers=(), by='', groups=(), waits=())
    """
    if not in_several_ranks():
        return SharedModel()
    modules = modules_within(model)
    _refuse_other_kinds(model, modules)
    own = dist.get_rank()
    by: list[str] = []
    replicas: set[int] = set()  # ranks that have other batches
    waits: list[Any] = []
    managed: dict[int, set[int]] = {}  # parameters of FSDP -> the ranks among which it shards them
    for module in modules:
        for group in fsdp_groups(module):
            ranks = set(group.mesh.mesh.flatten().tolist())
            replicas |= ranks
            waits += group.mesh.get_all_groups()
            by.append("FSDP2")
            managed |= dict.fromkeys(group.ids, ranks)
        for name in ("FullyShardedDataParallel", "DistributedDataParallel"):
            if any(base.__name__ == name for base in type(module).__mro__):
                replicas |= set(dist.get_process_group_ranks(cast(Any, module).process_group))
                waits.append(module.process_group)
                by.append(name)
    peers: dict[tuple[int, ...], tuple[Any, ...]] = {}
    parted: set[int] = set()
    for parameter in _parameters(model):
        mesh = parameter.device_mesh
        apart = managed.get(id(parameter), replicas if parameter.device_mesh.ndim > 1 else set())
        found, dims = _peers(mesh, own, apart)
        if len(found) > 1:
            parted.add(id(parameter))
            peers.setdefault(found, tuple(mesh.get_group(dim) for dim in dims))
            by.append("tensor parallel")
    widest = max(peers, key=len, default=())
    if any(not set(one) <= set(widest) for one in peers):
        raise ValueError(
            f"{type(model).__name__} has layers spread over different sets of ranks, {sorted(peers)}: they can be given no "
            f"batch in common. Parallelize all layers over one mesh."
        )
    if by and is_alone():
        raise ValueError(
            f"{type(model).__name__} is shared by several ranks ({', '.join(dict.fromkeys(by))}), and one of them alone cannot "
            f"run it: its forward waits for the others. Leave tg.alone() and make the call on all ranks, or give the model "
            f"itself (of DistributedDataParallel its .module)."
        )
    groups = peers.get(widest, ())
    every = tuple({id(one): one for one in (*waits, *groups)}.values())
    return SharedModel(bool(replicas), widest, ", ".join(dict.fromkeys(by)), groups, every, frozenset(parted))


def _peers(mesh: Any, own: int, apart: set[int]) -> tuple[tuple[int, ...], list[int]]:
    """The ranks of a mesh along its dimensions on which this rank meets none that has other batches; these dimensions."""
    ranks: Tensor = mesh.mesh
    at = (ranks == own).nonzero()
    if len(at) != 1:
        raise ValueError(
            f"rank {own} holds a parameter of a mesh that it is not in, {ranks.tolist()}: give it its own part."
        )
    index: list[Any] = []
    dims: list[int] = []
    for dim, place in enumerate(at[0].tolist()):
        line = ranks.movedim(dim, -1)[tuple(int(p) for d, p in enumerate(at[0]) if d != dim)].tolist()
        shares_batch = not (set(line) - {own}) & apart
        index.append(slice(None) if shares_batch else place)
        dims += [dim] if shares_batch and len(line) > 1 else []
    return tuple(sorted(ranks[tuple(index)].flatten().tolist())), dims


def _parameters(model: nn.Module) -> Iterator[Any]:
    kind = dtensor_class()
    if kind is not None:
        yield from (parameter for parameter in model.parameters() if isinstance(parameter, kind))


def _refuse_other_kinds(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Sharing that would give wrong numbers, or wait for ever."""
    name = type(model).__name__
    mesh = getattr(model, "_device_mesh", None)
    names = tuple(getattr(mesh, "mesh_dim_names", None) or ())
    staged = "pp" in names and mesh is not None and mesh["pp"].size() > 1
    engines = {"PipelineEngine", "PipelineModule", "PipelineParallel"}
    if staged or hasattr(model, "hf_split_points") or _bases(modules) & engines:
        raise ValueError(
            f"{name} is spread over ranks as a pipeline (pipeline parallel): a rank holds some layers only, and activations of "
            f"the others never come to it. Use FSDP (fully_shard) or tensor parallelism, or spread it over the devices of one "
            f"process (device_map='auto')."
        )
    if is_context_parallel(modules):
        raise ValueError(
            f"{name} runs context-parallel: a rank has some positions of a sequence only. Leave the context (context_parallel) "
            f"around the call, and share the sequences among the ranks instead: tdgeom.run does."
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            f"{name} is sharded by DeepSpeed (ZeRO-3), of which it is not known which ranks run together. Use FSDP2 "
            f"(fully_shard), or gather the model on every rank."
        )


def _bases(modules: Sequence[nn.Module]) -> set[str]:
    return {base.__name__ for kind in set(map(type, modules)) for base in kind.__mro__}
