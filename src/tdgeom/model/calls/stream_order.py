"""Whether the blocks of a stack hand one stream on: what one gives is what the next one receives."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tdgeom.model.sites import BLOCK_KINDS
from tdgeom.model.structure.distributed_tensors import whole
from tdgeom.model.structure.readers import Element, locate, read_input, tensors
from tdgeom.model.structure.resolved_site import ResolvedSite

STREAM_ENDS = ("residual_input", "residual_output")
STREAM_KINDS = frozenset(
    kind
    for kind in BLOCK_KINDS
    if kind.startswith(("residual", "attn_output", "mlp_output", "cross_attn_output"))
)


class StackReads:
    """Hooks on the blocks of a stack, which compare what each one receives with what the one before it gave."""

    def __init__(self, model: nn.Module, stack: str | None, entries: Sequence[ResolvedSite]) -> None:
        own = [e for e in entries if e.site.stack == stack and e.site.kind == "residual_input"]
        self.stack = stack
        self.blocks = {e.site.layer: model.get_submodule(e.block_path or "") for e in own}
        # a sequence hands on by itself, through whatever lies between two of its blocks
        homes = [model.get_submodule((e.block_path or "").rpartition(".")[0]) for e in own]
        self.listed = not any(isinstance(home, nn.Sequential) for home in homes)
        self.before: tuple[type, Any] | None = None
        self.found: dict[type, list[Element | None]] = {}
        self.usual: dict[type, Element | None] = {}
        self.undo = ExitStack()

    def open(self) -> None:
        """Install the hooks."""
        for module in dict.fromkeys(self.blocks.values()):
            for handle in (
                module.register_forward_pre_hook(self._on_input, with_kwargs=True),
                module.register_forward_hook(partial(self._on_output)),
            ):
                self.undo.callback(handle.remove)

    def close(self) -> None:
        """Remove the hooks."""
        self.undo.close()
        self.before = None

    def _on_input(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        before, self.before = self.before, None
        try:
            given = read_input(args, kwargs)
        except ValueError:
            return
        if before is None or given is None:
            return
        kind, output = before
        self.found.setdefault(kind, []).append(
            next((path for path, t in tensors(output) if _equal(t, given)), None)
        )

    def _on_output(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.before = type(module), output
        try:
            self.usual[type(module)] = locate(output)
        except ValueError:
            self.usual[type(module)] = None

    def judge(self) -> tuple[str | None, dict[type, Element]]:
        """Why this is no stream, and, by class of block, where it lies in what a block gives if not in the usual place.

        Blocks that are single layers are steps with something between them, and one block alone has nobody to hand on to.
        """
        pairs = [element for found in self.found.values() for element in found]
        deep = all(any(True for _ in block.children()) for block in self.blocks.values())
        if pairs and deep and self.listed and not any(element is not None for element in pairs):
            names = sorted({type(block).__name__ for block in self.blocks.values()})
            return (
                f"no block of the list ({', '.join(names)}) receives what the one before it gave: the stream runs outside of "
                "them. Remedy: 'module_output:<path>'"
            ), {}
        elements = {}
        for kind, found in self.found.items():
            paths = {path for path in found if path is not None}
            if len(paths) == 1 and (path := paths.pop()) != self.usual.get(kind):
                elements[kind] = path
        return None, elements


def _equal(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    one, other = whole(one), whole(other)
    return one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one, other))
