"""What stands before an image's patches in a stack of blocks: class, distillation and register tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from tdgeom.core.devices import doubled
from tdgeom.core.surroundings import steady
from tdgeom.model.calls.bound_model import eval_mode, may_stop
from tdgeom.model.calls.forward_signature import read_signature
from tdgeom.model.calls.quiet import without_hooks
from tdgeom.model.calls.verified import verified
from tdgeom.model.structure.readers import read_input
from tdgeom.model.structure.resolved_site import ResolvedSite


@dataclass(frozen=True)
class FrontTokens:
    """How many tokens stand before the patches, and how many of them, the last ones, are registers."""

    count: int
    registers: int


class ImageTokens:
    """The tokens before the patches that a site's blocks are given: found by a pass over two made-up images when first asked for.

    What two different images share at the first block's input is no patch. The model stays the user's: copies share it, pickling
    drops it.
    """

    def __init__(self, model: nn.Module, block: str, tower: str) -> None:
        self.model, self.block, self.tower = ref(model), block, tower

    def front(self) -> FrontTokens | None:
        """What stands before the patches; ``None`` where no image can be made up or the model is gone."""
        model = self.model()
        if model is None:
            return None
        known, key = verified(model), ("front tokens", self.block)
        if key not in known:
            known[key] = _front(model, self.block, model.get_submodule(self.tower))
        return known[key]

    def __deepcopy__(self, memo: dict) -> ImageTokens:
        return self

    def __reduce__(self) -> tuple:
        return _nothing, ()


def _nothing() -> None:
    return None


def attach_images(model: nn.Module, entries: Iterable[ResolvedSite]) -> None:
    """Let the sites of an image's blocks know what stands before its patches."""
    for entry in entries:
        path = entry.block_path if entry.block_path is not None else entry.module_path
        found = _tower(model, path)
        image = None if found is None or not path else ImageTokens(model, _first_like(model, path), found)
        entry.site.image = image or False


def _tower(model: nn.Module, path: str) -> str | None:
    """The nearest module around ``path`` that is called with pixels."""
    parts = path.split(".")
    around = [".".join(parts[:depth]) for depth in range(len(parts) - 1, -1, -1)]
    for here in around:
        names = read_signature(model.get_submodule(here)).names
        if "pixel_values" in names or "input_ids" in names:
            return None if "input_ids" in names else here
    return next((here for here in around if hasattr(model.get_submodule(here), "patch_embed")), None)


def _first_like(model: nn.Module, path: str) -> str:
    """The first block of the list that holds the one at ``path``."""
    parts = path.split(".")
    for depth in range(len(parts), 0, -1):
        owner = model.get_submodule(".".join(parts[: depth - 1]))
        if isinstance(owner, nn.ModuleList | nn.Sequential) and len(owner) > 1:
            return ".".join([*parts[: depth - 1], next(iter(owner._modules))])
    return path


def _size(tower: nn.Module) -> tuple[int, int, int] | None:
    """Channels, height and width of the images that a module takes."""
    config = getattr(tower, "config", None)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if size is None:
        embed = getattr(tower, "patch_embed", None)
        size, kernel = getattr(embed, "img_size", None), getattr(getattr(embed, "proj", None), "weight", None)
        channels = 3 if kernel is None else kernel.shape[1]
    size = (size, size) if isinstance(size, int) else size
    if (
        not isinstance(size, tuple | list)
        or len(size) != 2
        or not all(isinstance(side, int) for side in size)
    ):
        return None
    return int(channels), size[0], size[1]


def _front(model: nn.Module, block: str, tower: nn.Module) -> FrontTokens | None:
    size, modules = _size(tower), list(model.modules())
    first = next((p for p in tower.parameters() if p.is_floating_point()), None)
    if size is None or first is None or first.is_meta or not may_stop(modules):
        return None
    plane = torch.linspace(-1, 1, size[1] * size[2], device=first.device, dtype=first.dtype).reshape(size[1:])
    images = torch.stack([plane, -plane - 0.3]).unsqueeze(1).expand(2, *size).contiguous()
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        value = read_input(args, kwargs)
        if value is not None:
            seen.append(value)

    with eval_mode(modules), without_hooks(model), steady(first.device), torch.no_grad():
        handle = model.get_submodule(block).register_forward_pre_hook(look, with_kwargs=True)
        try:
            tower(images)
        except Exception:  # it wants more than an image
            return None
        finally:
            handle.remove()
    if not seen or seen[0].ndim != 3 or seen[0].shape[0] != 2:
        return None
    one, other = doubled(seen[0])
    same = (one - other).norm(dim=-1) <= 1e-5 * one.norm(dim=-1)
    count = int(same.sum())
    if not bool(same[:count].all()):
        raise ValueError(
            f"{type(model).__name__} has tokens that are no patches at {same.nonzero().flatten().tolist()[:8]}, not only before "
            "the patches. Remedy: positions= as a list of numbers or a slice."
        )
    return FrontTokens(count, min(_registers(tower, one.shape[-1]), count))


def _registers(tower: nn.Module, width: int) -> int:
    """How many register tokens a module has among its parameters."""
    for name, parameter in tower.named_parameters():
        own = name.rpartition(".")[2]
        if ("register" in own or own in ("reg_token", "reg_tokens")) and parameter.shape[-1] == width:
            return parameter.numel() // width
    return 0
