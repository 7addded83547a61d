"""Tensors of a tensor-parallel model that look whole and are one rank's part: found by comparing them with the other ranks'."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tdgeom.model.calls.shared_model import in_several_ranks, shared_model
from tdgeom.model.calls.verified import verified
from tdgeom.model.structure.distributed_tensors import dtensor_class
from tdgeom.model.structure.resolved_site import ResolvedSite

__all__ = ["LocalParts"]

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
