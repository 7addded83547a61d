"""Whether residual streams of a pass are the sums of their parts, so that nothing else carries a change along them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdgeom.core.devices import doubled
from tdgeom.model.capture import Capture
from tdgeom.model.lens.block_path import NormSeen, block_path
from tdgeom.model.lens.linear_tail import agree
from tdgeom.model.positions import attended_tokens
from tdgeom.model.sites import Site, token_side
from tdgeom.model.structure.blocks import find_stacks
from tdgeom.model.structure.module_roles import is_norm, join
from tdgeom.model.structure.resolved_site import ADDED_KINDS

_STREAM = ("residual_input", "residual_output")


def check_sums(
    model: nn.Module,
    streams: Sequence[Site],
    td: TensorDictBase,
    clean: TensorDictBase,
    inputs: TensorDictBase,
    example: Tensor | None = None,
) -> None:
    """Raise where a block gives anything but its input and its parts, added through the norms that stand in the stream.

    ``td`` is the pass, ``clean`` an earlier one of the examples ``example`` (n,): what enters between two blocks must be what it
    was there. Norms are read in one more pass of ``inputs``, if there are any in the stream.
    """
    name, known = type(model).__name__, set(streams)
    norms: Mapping[str, NormSeen] | None = None
    for stack in find_stacks(model):
        for layer, block in enumerate(stack.blocks):
            at = {kind: Site.of(kind, layer, stack=stack.name) for kind in (*_STREAM, *ADDED_KINDS)}
            if not known.intersection(at.values()):
                if any(site.stack == stack.name and (site.layer or 0) < layer for site in known):
                    raise ValueError(
                        f"path patching: {name} has no parts at layer {layer} that could be held."
                    )
                continue
            if not known.issuperset(at[kind] for kind in _STREAM):
                raise ValueError(
                    f"path patching: {name} has no 'residual_input' and 'residual_output' at layer {layer} of which parts could "
                    "be told."
                )
            before, after = (_rows(td, at[kind]) for kind in _STREAM)
            added = {kind: _rows(td, at[kind]) for kind in ADDED_KINDS if at[kind] in known}
            path = block_path(before, after, added, {})
            if path is None:
                norms = _norms(model, inputs) if norms is None else norms
                start = f"{block.path}."
                own = {
                    p.removeprefix(start): seen
                    for p, seen in norms.items()
                    if p.startswith(start) and seen.taken.shape == seen.gave.shape == before.shape
                }
                path = block_path(before, after, added, own)
            if path is None:
                raise ValueError(
                    f"path patching: {', '.join(added) or 'no known part'} of layer {layer} of {name} do not add up to what "
                    "the block adds to the stream: something else in it could carry a change, and cannot be held."
                )
            gave = Site.of("residual_output", layer - 1, stack=stack.name)
            if gave in known:
                _check_between(td, clean, gave, at["residual_input"], example, name)


def _check_between(
    td: TensorDictBase, clean: TensorDictBase, gave: Site, taken: Site, example: Tensor | None, name: str
) -> None:
    """What enters the stream between two blocks (images in several layers) must not depend on the change."""
    out, came = _rows(td, gave), _rows(td, taken)
    size = came.abs().amax(-1, keepdim=True)
    if agree(out, came, size, came.dtype):
        return
    mask = _mask(td, taken)
    left, entered = (
        clean["acts", s] if example is None else clean["acts", s][example] for s in (gave, taken)
    )
    if not agree(
        doubled(came) - doubled(out), doubled(entered[mask]) - doubled(left[mask]), size, came.dtype
    ):
        raise ValueError(
            f"path patching: what enters the stream of {name} before {str(taken)!r} depends on the change that is sent, and is "
            "no part of a block that could be held."
        )


def _norms(model: nn.Module, inputs: TensorDictBase) -> dict[str, NormSeen]:
    """The norms inside blocks, and what they took and gave."""
    sides: dict[str, Site] = {}
    modules: dict[str, nn.Module] = {}
    for stack in find_stacks(model):
        for block in stack.blocks:
            for path, module in block.module.named_modules():
                if path and is_norm(path.rpartition(".")[2], module):
                    modules[join(block.path, path)] = module
                    sides[join(block.path, path)] = Site.of("residual_input", 0, stack=stack.name)
    if not modules:
        return {}
    td = Capture(
        model, [f"module_{side}:{path}" for path in modules for side in ("input", "output")], clone=True
    )(inputs.copy())
    seen = {}
    for path, module in modules.items():
        both = [td["acts", f"module_{side}:{path}"] for side in ("input", "output")]
        if all(value.ndim == 3 for value in both):
            mask = attended_tokens(td.get(token_side(sides[path]) + "attention_mask", None), both[0])
            if mask.shape == both[0].shape[:2]:
                seen[path] = NormSeen(module, *(value[mask] for value in both))
    return seen


def _mask(td: TensorDictBase, site: Site) -> Tensor:
    value = td["acts", site]
    mask = attended_tokens(td.get(token_side(site) + "attention_mask", None), value)
    return mask if mask.shape == value.shape[:2] else torch.ones_like(value[..., 0], dtype=torch.bool)


def _rows(td: TensorDictBase, site: Site) -> Tensor:
    return td["acts", site][_mask(td, site)]
