"""A look inside a router: its logits before it chooses, and the experts that it has chosen.

``router_logits`` of a router with a forward of its own are the product in that forward that is as wide as there are experts,
so that an edit comes before the choice. ``router_choice`` is what the experts are given: the indices (or the mask) that the
router hands on, else the last selection of the largest made where router and experts meet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tdgeom.model.structure.resolved_site import ResolvedSite
from tdgeom.model.structure.views import Experts

Watcher = Callable[[str, Tensor], Tensor]
_PRODUCTS = {functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}
_LARGEST = {torch.topk, Tensor.topk, torch.argmax, Tensor.argmax, torch.max, Tensor.max}


def router_look(model: nn.Module, entry: ResolvedSite) -> Callable[[list[Watcher]], Any]:
    """What is to be entered around the forward of the module of a router's site, given its watchers."""
    if not isinstance(entry.view, Experts):
        raise TypeError(f"{entry.site!r} is no site of a router.")
    count = entry.view.experts
    if entry.side == "logits":
        return lambda watchers: _Logits(watchers, count)
    return lambda watchers: _Choice(watchers, model.get_submodule(entry.module_path), count)


class _Logits(TorchFunctionMode):
    """Shows the product that is as wide as there are experts to the watchers."""

    def __init__(self, watchers: list[Watcher], experts: int) -> None:
        super().__init__()
        self.watchers, self.experts, self.done = watchers, experts, False

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.done and func in _PRODUCTS and out.ndim > 1 and out.shape[-1] == self.experts:
            self.done = True
            for watcher in list(self.watchers):
                out = watcher("logits", out)
        return out


class _Choice(TorchFunctionMode):
    """Shows the experts of each token, (N, k), to the watchers once the forward is over; -1 is none."""

    def __init__(self, watchers: list[Watcher], owner: nn.Module, experts: int) -> None:
        super().__init__()
        self.watchers, self.owner, self.experts = watchers, owner, experts
        self.given: list[Tensor] = []
        self.handed: list[Tensor] = []
        self.largest: list[Tensor] = []
        self.handles: list[Any] = []

    def __enter__(self) -> Any:
        for name, module in self.owner.named_children():
            if "expert" in name.lower() and "shared" not in name.lower():
                self.handles.append(module.register_forward_pre_hook(self._on_experts, with_kwargs=True))
            elif "router" in name.lower() or name == "gate":
                self.handles.append(module.register_forward_hook(self._on_router))
        return super().__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for handle in self.handles:
            handle.remove()
        super().__exit__(kind, error, trace)
        if kind is None and (chosen := self.chosen()) is not None:
            for watcher in list(self.watchers):
                watcher("choice", chosen)

    def _on_experts(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.given += _integers((*args, *kwargs.values()))

    def _on_router(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.handed += _integers(output if isinstance(output, tuple | list) else (output,))

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        value = args[0] if args else None
        if (
            func in _LARGEST
            and isinstance(value, Tensor)
            and value.ndim > 1
            and value.shape[-1] == self.experts
        ):
            found = out if isinstance(out, Tensor) else getattr(out, "indices", None)
            if isinstance(found, Tensor) and found.dtype == torch.int64:
                rows = value.numel() // self.experts
                if found.numel() and found.numel() % rows == 0:
                    self.largest.append(found.reshape(rows, -1))
        return out

    def chosen(self) -> Tensor | None:
        """The choice; ``None`` where nobody told, or where those who told do not agree."""
        if not self.largest:
            return None
        # one selection of k, or as many of one as there are choices
        last = self.largest[-1]
        if last.shape[1] == 1:
            alike = [one for one in self.largest if one.shape == last.shape]
            different = [
                one for i, one in enumerate(alike) if not any(torch.equal(one, o) for o in alike[:i])
            ]
            last = torch.cat(different, -1)
        for told in (*self.given, *self.handed):
            found = expert_indices(told, self.experts)
            if found is not None:
                return found if _agree(found, last) else None
        return last if last.shape[1] == self.largest[-1].shape[1] else None


def expert_indices(told: Tensor, experts: int) -> Tensor | None:
    """Indices (N, k) from indices or a mask (..., experts) of zeros and ones, -1 where there is none; ``None`` if it is neither.

    >>> expert_indices(torch.tensor([[[0, 1, 0, 0]], [[0, 0, 0, 0]]]), 4)
    tensor([[ 1],
            [-1]])
    """
    if told.ndim < 2 or not told.numel():
        return None
    least, most = int(told.min()), int(told.max())
    flat = told.reshape(-1, told.shape[-1])
    if (
        told.shape[-1] == experts
        and least >= 0
        and most <= 1
        and not bool((flat.sort(-1).values.diff(dim=-1) > 0).all())
    ):
        value, index = flat.topk(max(int(flat.sum(-1).max()), 1), -1)
        return index.masked_fill(value == 0, -1)
    return flat if told.shape[-1] <= experts and most < experts and least >= -1 else None


def _agree(found: Tensor, largest: Tensor) -> bool:
    """Whether every expert that was told is among those selected, row by row, and as many of them as there may be."""
    if found.shape != largest.shape:
        return False
    among = (found.unsqueeze(-1) == largest.unsqueeze(-2)).any(-1)
    return bool((among | (found < 0)).all())


def _integers(values: Any) -> list[Tensor]:
    return [
        value for value in values if isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)
    ]
