"""A site in one model: which tensor of which module it is, read and put back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from tdgeom.model.sites import PATTERN_KINDS, Site
from tdgeom.model.structure import readers
from tdgeom.model.structure.distributed_tensors import parted_like, whole
from tdgeom.model.structure.views import HeadOutput, View, take_heads

# Which of the two outputs in a block the residual stream receives: what else transforms them is worth an
# error.
ADDED_KINDS = ("attn_output", "cross_attn_output", "mlp_output")
# what lies inside a module's forward: of an attention, and of a router
ATTENTION_SIDES = ("queries", "keys", "scores", "pattern")
ROUTER_SIDES = ("logits", "choice")


@dataclass(frozen=True, repr=False)
class ResolvedSite:
    """A site of one model: the module, the side of it, and which of the module's calls in a pass is meant.

    ``side`` is ``"input"`` or ``"output"``, or one of ``ATTENTION_SIDES`` and ``ROUTER_SIDES`` inside a module's forward;
    ``block_path`` is the path of the block that holds the site (``None`` outside of blocks). ``view`` says how heads lie in
    the module's tensor, ``heads`` which of them are read. What is read is multiplied by ``scale`` (a residual multiplier);
    ``bypass`` says that the stream also goes around the module. ``element`` is the way to the tensor
    where the module receives or gives a container; ``None`` is its first one.
    ``write`` divides by the scale, so that ``write(read(x))`` changes nothing.
    """

    site: Site
    module_path: str
    side: str
    scale: float = 1.0
    call: int = 0
    calls: int = 1
    block_path: str | None = None
    view: View | None = None
    heads: tuple[int, ...] | None = None
    groups: int = 1
    bypass: bool = False
    element: readers.Element | None = None

    def __repr__(self) -> str:
        return f"<{self.site}: {self.side} of {self.module_path or 'the model'}>"

    @property
    def behind(self) -> nn.Module | None:
        """The norm or scale between a projection and the sum that its heads' shares add up to, where there is one."""
        return self.view.behind if isinstance(self.view, HeadOutput) else None

    @property
    def in_softmax(self) -> bool:
        """Whether the site lies inside an attention module's forward, around its softmax."""
        return self.side in ATTENTION_SIDES

    @property
    def in_router(self) -> bool:
        """Whether the site lies inside the forward of a router, or of what holds it."""
        return self.side in ROUTER_SIDES

    @cached_property
    def is_whole(self) -> bool:
        """Whether the site is a module's output itself, where that is a tensor."""
        return self.side == "output" and self.view is self.element is None and self.scale == 1.0

    @property
    def head_count(self) -> int:
        """How many query heads there are; 0 where a site has no heads."""
        return 0 if self.view is None else self.view.heads * self.groups

    @property
    def head_axis(self) -> int | None:
        """The axis of heads in what ``read`` gives; ``None`` where there is none."""
        if self.view is None or not self.view.heads:
            return None
        return 1 if self.site.kind in PATTERN_KINDS else -2

    def raw(self, args: tuple, kwargs: dict, output: object = None) -> Tensor | None:
        """The module's own tensor that holds the site, before scale and heads."""
        value = self.held(args, kwargs, output)
        return None if value is None else whole(value)

    def held(self, args: tuple, kwargs: dict, output: object = None) -> Tensor | None:
        """The same as the module has it: of a DTensor, this rank's part."""
        if self.in_softmax or self.in_router:
            return output if isinstance(output, Tensor) else None
        reader = readers.read_input if self.side == "input" else readers.read_output
        return reader(args, kwargs, output, self.element)

    def read(self, args: tuple, kwargs: dict, output: object = None) -> Tensor | None:
        """The site's tensor, from what a hook on the module sees; ``None`` if there is no tensor."""
        value = self.raw(args, kwargs, output)
        if value is None:
            return None
        if self.view is not None:
            value = take_heads(self.view.read(value, args, kwargs), self.heads, self.head_axis or 0)
        return value if self.scale == 1.0 else value * self.scale

    def gradient(self, raw: Tensor) -> Tensor:
        """The gradient of the site's tensor, from the gradient of the module's own."""
        value = raw if self.view is None else self.view.gradient(raw)
        value = take_heads(value, self.heads, self.head_axis or 0)
        return value if self.scale == 1.0 else value / self.scale

    def write(self, args: tuple, kwargs: dict, output: object, value: Tensor) -> object:
        """What the hook returns to put ``value`` at the site: ``(args, kwargs)`` or an output."""
        value = value if self.scale == 1.0 else value / self.scale
        raw = self.raw(args, kwargs, output)
        if self.view is not None and raw is not None:
            if self.heads is not None:
                whole = self.view.read(raw, args, kwargs)
                index = torch.tensor(self.heads, device=value.device)
                value = whole.index_copy(self.head_axis or 0, index, value)
            value = self.view.write(raw, value)
        if (held := self.held(args, kwargs, output)) is not None:
            value = parted_like(value, held)
        if self.in_softmax or self.in_router:
            return value
        writer = readers.write_input if self.side == "input" else readers.write_output
        return writer(args, kwargs, output, value, self.element)
