"""What one forward pass has given at the sites that are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdgeom.model.calls.site_hooks import Step
from tdgeom.model.sites import Site


class Pass(Step):
    """What one forward pass has given so far."""

    __slots__ = ("acts", "raw", "roots", "several", "versions")

    def __init__(self, path: str = "") -> None:
        super().__init__(path)
        self.acts: dict[Site, Tensor] = {}
        self.versions: dict[Site, int] = {}
        self.raw: dict[Site, Tensor] = {}
        self.roots: dict[Site, Tensor] = {}
        self.several: dict[Site, list[Tensor]] = {}

    def check_unmodified(self) -> None:
        """Raise if a captured tensor was written to after it was read."""
        for site, version in self.versions.items():
            if self.acts[site]._version != version:
                raise RuntimeError(
                    f"the tensor read at {str(site)!r} was modified in place later in the same forward "
                    "pass, so it no longer holds what was there. Remedy: Capture(..., clone=True)."
                )

    def is_as_read(self) -> bool:
        """Whether what was read is known to be what it was then."""
        if len(self.versions) < len(self.acts):
            return False  # inference tensors do not tell
        return all(self.acts[site]._version == version for site, version in self.versions.items())

    def add(self, other: Pass) -> None:
        """Take what a part of the model gave that ran on its own, before or beside this pass."""
        self.acts.update(other.acts)
        self.roots.update(other.roots)
        self.versions.update(other.versions)


def join_parts(done: Pass) -> None:
    """Put the parts of a batch together that threads of the call's own have read, in the order of their devices."""
    parts: list[Any] = sorted(done.parts.values(), key=_device_number)
    for part in parts:
        part.check_unmodified()
    for site in dict.fromkeys(site for part in parts for site in part.acts):
        values = [part.acts[site] for part in parts if site in part.acts]
        home = values[0].device
        done.acts[site] = values[0] if len(values) == 1 else torch.cat([v.to(home) for v in values])
        if len(values) == 1:  # gradients of several parts would be several
            done.roots.update((site, part.roots[site]) for part in parts if site in part.roots)


def _device_number(part: Any) -> int:
    first = next(iter(part.acts.values()), None)
    return -1 if first is None else first.get_device()
