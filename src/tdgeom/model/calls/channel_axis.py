"""Which axis of a feature map counts channels: (B, C, H, W) or (B, H, W, C), from the module that gives it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tdgeom.model.structure.resolved_site import ResolvedSite

_FIRST = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d)
_LAST = (nn.Linear, nn.LayerNorm)


@dataclass(frozen=True)
class Channels:
    """How many channels a site has as its module says, and on which side, where torch's own module defines it."""

    count: int | None = None
    side: str | None = None

    def axis(self, shape: tuple[int, ...]) -> int | None:
        """The axis of channels, 1 or 3, in a map of this shape; None where two readings fit, or none."""
        if self.side is not None:
            axis = 1 if self.side == "first" else 3
            return axis if shape[axis] == self.count else None
        fits = [axis for axis in (1, 3) if shape[axis] == self.count]
        return fits[0] if len(fits) == 1 else None


def attach_channels(model: nn.Module, entries: Iterable[ResolvedSite]) -> None:
    """Let sites know what their modules say of channels."""
    for entry in entries:
        entry.site.channels = channels_of(model.get_submodule(entry.module_path), entry.side)


def channels_of(module: nn.Module, side: str = "output") -> Channels:
    """What a module says of the channels that it gives, or gets (``side="input"``).

    torch's own convolutions and batch norms have them first, linear maps and layer norms last. Of a block the last part that
    has channels (for its input the first) says how many there are; the shape then says where.

    >>> channels_of(nn.Conv2d(3, 8, 3)), channels_of(nn.Sequential(nn.Linear(4, 8), nn.GELU()))
    (Channels(count=8, side='first'), Channels(count=8, side=None))
    """
    parts = [part for part in module.modules() if _count(part, side) is not None]
    if not parts:
        return Channels()
    part = parts[0] if side == "input" else parts[-1]
    own = part if part is module else None
    exact = "first" if type(own) in _FIRST else "last" if type(own) in _LAST else None
    return Channels(_count(part, side), exact)


def _count(module: Any, side: str) -> int | None:
    names = ("in_channels", "in_features") if side == "input" else ("out_channels", "out_features")
    for name in (*names, "num_features", "num_channels"):
        found = getattr(module, name, None)
        if isinstance(found, int) and isinstance(getattr(module, "weight", None), Tensor | None):
            return found
    shape = getattr(module, "normalized_shape", None)
    return shape[-1] if isinstance(shape, tuple) and shape else None
