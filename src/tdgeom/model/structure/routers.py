"""The router of a mixture of experts: where its logits are made, and where experts are chosen."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from tdgeom.model.structure.linears import features, is_linear, linears
from tdgeom.model.structure.module_roles import attends, has_weights
from tdgeom.model.structure.views import Experts, Part

_ROUTER = re.compile(r"router", re.I)
_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "n_experts")


def router_parts(block: nn.Module) -> dict[str, Part]:
    """``router_logits`` and ``router_choice`` of a block with one router, paths relative to the block.

    Logits of a router that is a layer of its own are what it gives. A router with a forward of its own mostly chooses in
    it: its logits are the product in there that is as wide as there are experts. The choice is made somewhere in the
    module that holds router and experts.
    """
    attention = [path for path, module in block.named_modules() if path and attends(path, module)]
    found = [path for path, module in block.named_modules() if path and _is_router(block, path, module)]
    found = [
        path for path in found if not any(path.startswith(other + ".") for other in (*found, *attention))
    ]
    if len(found) != 1:
        return {}
    path = found[0]
    module = block.get_submodule(path)
    count = _expert_count(module)
    owner = path.rpartition(".")[0]
    if is_linear(module) and not _chooses(module):
        return {
            "router_logits": Part(path, "output"),
            "router_choice": Part(owner, "choice", view=Experts(features(module)[1])),
        }
    if count is None:
        return {}
    view = Experts(count)
    return {
        "router_logits": Part(path, "logits", view=view),
        "router_choice": Part(owner, "choice", view=view),
    }


def _is_router(block: nn.Module, path: str, module: nn.Module) -> bool:
    owner, _, name = path.rpartition(".")
    if not has_weights(module) or isinstance(module, nn.ModuleList):
        return False
    if _ROUTER.search(name) or _ROUTER.search(type(module).__name__):
        return True
    beside = block.get_submodule(owner).named_children()
    return name == "gate" and any("expert" in sibling.lower() for sibling, _ in beside)


def _chooses(module: nn.Module) -> bool:
    """Whether a linear layer has a forward of its own that does more than a product."""
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is not nn.Linear.forward
        and (_ROUTER.search(type(module).__name__) is not None)
    )


def _expert_count(module: nn.Module) -> int | None:
    weight: Any = getattr(module, "weight", None)
    if weight is not None and getattr(weight, "ndim", 0) == 2:
        return int(weight.shape[0])
    inner = [features(layer)[1] for _, layer in linears(module)]
    said = [getattr(module, name) for name in _COUNTS if isinstance(getattr(module, name, None), int)]
    if len(inner) == 1:
        return inner[0]
    return said[0] if said else None
