"""What one pass of a model shows in one of its blocks: values at sites, what parts take and give, products of attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tdgeom.model.calls.attention_kernel import watch_softmax
from tdgeom.model.calls.quiet import replaced_forwards
from tdgeom.model.calls.router_kernel import router_look
from tdgeom.model.structure.distributed_tensors import whole
from tdgeom.model.structure.parts import join
from tdgeom.model.structure.readers import read_input, read_output
from tdgeom.model.structure.resolved_site import ResolvedSite

_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
Product = tuple[Tensor, Tensor, Tensor]  # both factors, and what they give


class BlockReads:
    """Hooks on one block, and what they saw the first time that it ran.

    Attributes:
        values: kind -> its tensor; unread: kind -> why it could not be read.
        takes, gives: path -> the tensor that a module received, and gave.
        products: core's path -> the matrix products in that attention's forward.
    """

    def __init__(self, model: nn.Module, entries: Mapping[str, ResolvedSite]) -> None:
        self.model, self.entries = model, dict(entries)
        self.path = next(e.block_path for e in entries.values() if e.block_path is not None)
        self.block = model.get_submodule(self.path)
        self.values: dict[str, Tensor] = {}
        self.unread: dict[str, str] = {}
        self.takes: dict[str, Tensor] = {}
        self.gives: dict[str, Tensor] = {}
        self.products: dict[str, list[Product]] = {}
        self.undo = ExitStack()

    @property
    def ran(self) -> bool:
        """Whether the block ran at all."""
        return "residual_input" in self.values

    def open(self, *, inside: bool = True) -> None:
        """Install the hooks; ``inside`` also looks into forwards."""
        try:
            if inside:
                self._look_inside()
            for name, module in self.block.named_modules():
                path = join(self.path, name)
                self._hook(module, path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the hooks; what was seen stays."""
        self.undo.close()

    def _hook(self, module: nn.Module, path: str) -> None:
        here = [entry for entry in self.entries.values() if entry.module_path == path]
        inputs = [entry for entry in here if entry.side == "input"]
        outputs = [entry for entry in here if entry.side == "output"]

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if path not in self.takes and (value := _quietly(read_input, args, kwargs)) is not None:
                self.takes[path] = whole(value).detach().clone()
                self._keep(inputs, args, kwargs, None)

        def after(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if path not in self.gives and (value := _quietly(read_output, args, kwargs, output)) is not None:
                self.gives[path] = whole(value).detach().clone()
                self._keep(outputs, args, kwargs, output)

        for handle in (
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        ):
            self.undo.callback(handle.remove)

    def _keep(self, entries: list[ResolvedSite], args: tuple, kwargs: dict, output: Any) -> None:
        for entry in entries:
            try:
                value = entry.read(args, kwargs, output)
            except Exception as error:
                self.unread[entry.site.kind] = str(error)
                continue
            if value is not None:
                self.values[entry.site.kind] = value.detach().clone()

    def _look_inside(self) -> None:
        sides: dict[str, list[ResolvedSite]] = {}
        for entry in self.entries.values():
            if entry.in_softmax:
                sides.setdefault(entry.module_path, []).append(entry)
            elif entry.in_router:
                module = self.model.get_submodule(entry.module_path)
                watcher = partial(self._on_inside, [entry])
                look = router_look(self.model, entry)
                self.undo.enter_context(watch_softmax(module, watcher, look=look))
        for path, entries in sides.items():
            core = self.model.get_submodule(path)
            watcher = partial(self._on_inside, entries)
            self.undo.enter_context(watch_softmax(core, watcher, entries[0].head_count))
            seen = self.products.setdefault(path, [])
            self.undo.enter_context(replaced_forwards({core: _noting(core.forward, seen)}))

    def _on_inside(self, entries: list[ResolvedSite], side: str, value: Tensor) -> Tensor:
        for entry in entries:
            if entry.side == side and entry.site.kind not in self.values:
                self.values[entry.site.kind] = (
                    (entry.view.read(value) if entry.view else value).detach().clone()
                )
        return value


def _noting(forward: Callable, seen: list[Product]) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        if seen:  # the first call is the one that is looked at
            return forward(*args, **kwargs)
        with _Products(seen):
            return forward(*args, **kwargs)

    return run


class _Products(TorchFunctionMode):
    """Notes the factors of matrix products, and what they give."""

    def __init__(self, seen: list[Product]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        factors = args[1:3] if func is torch.einsum else args[:2] if func in _PRODUCTS else ()
        if len(factors) == 2 and all(isinstance(factor, Tensor) for factor in factors):
            self.seen.append((factors[0].detach().clone(), factors[1].detach().clone(), out.detach().clone()))
        return out


def _quietly(read: Callable, *given: Any) -> Tensor | None:
    """What cannot be read is not there: who asks for it is told when it is asked for."""
    try:
        return read(*given)
    except (ValueError, RuntimeError, TypeError, NotImplementedError):
        return None
