"""Tensors of a tensor-parallel model that look whole and are one rank's part: found by comparing them with the other ranks'."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tdgeom.model.calls.shared_model import in_several_ranks, shared_model
from tdgeom.model.calls.verified import verified
from tdgeom.model.sites import HEAD_KINDS
from tdgeom.model.structure.distributed_tensors import dtensor_class
from tdgeom.model.structure.resolved_site import ResolvedSite

__all__ = ["LocalParts", "refuse_heads_apart"]

_SAMPLED = 64  # values of a tensor that are compared
_AGREES = 1e-2  # of the largest: kernels in half precision may differ by that much, parts of a layer by more


class LocalParts:
    """The check of a model's sites, each once: ranks that hold parts of its layers must see the same tensor.

    A parallel layer that gives its part as a plain tensor (``use_local_output=True``, the default of torch) does not say so.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        shared = shared_model(model) if in_several_ranks() else None
        self.groups = () if shared is None else shared.groups

    def refuse(self, entry: ResolvedSite, held: Tensor | None) -> None:
        """Raise, on all ranks, where a site's tensor is a part. Collective, the first time that a site is seen."""
        if held is None or isinstance(held, dtensor_class()):
            return
        known = verified(self.model).setdefault("whole on every rank", set())
        place = entry.module_path, entry.side
        if place in known:
            return
        if any(_differs(held, group) for group in self.groups):
            raise ValueError(
                f"{str(entry.site)!r} is a part of the activation, another on every rank: {entry.module_path!r} is "
                f"tensor-parallel and gives its part as a plain tensor, here {tuple(held.shape)}. Remedy: "
                f"use_local_output=False in the layer's parallel style, whose DTensor is gathered; or a "
                f"site behind the layers that belong together ('attn_output', "
                f"'mlp_output', 'residual_output')."
            )
        known.add(place)


def refuse_heads_apart(model: nn.Module, entries: Sequence[ResolvedSite]) -> None:
    """Raise for sites of heads of which every rank computes its own: tensor-parallel projections that give plain tensors."""
    parted = shared_model(model).parted if in_several_ranks() else ()
    for entry in entries if parted else ():
        module = model.get_submodule(entry.module_path)
        if entry.site.kind in HEAD_KINDS and any(id(one) in parted for one in module.parameters()):
            raise ValueError(
                f"{str(entry.site)!r} lies in parts on several ranks: {entry.module_path!r} is tensor-parallel, so every rank "
                f"computes its own heads only, and no rank has all of them. Remedy: 'attn_output', which adds them up; or heads "
                f"of a model that each rank holds whole (a copy, or FSDP2's fully_shard), or on several devices of one process "
                f"(device_map='auto')."
            )


def _differs(value: Tensor, group: dist.ProcessGroup) -> bool:
    flat = value.detach().reshape(-1)
    places = torch.linspace(0, max(flat.numel() - 1, 0), _SAMPLED, device=flat.device).long()
    seen = flat[places].double() if flat.numel() else torch.zeros(_SAMPLED, device=flat.device).double()
    own = torch.cat(
        [torch.tensor([value.ndim, value.numel()], device=flat.device).double(), seen.nan_to_num()]
    )
    every = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(every, own, group=group)
    return any(
        not torch.allclose(one, every[0], rtol=0.0, atol=_AGREES * float(every[0][2:].abs().max()))
        for one in every
    )
