"""Gradients at sites, in place of activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdgeom.core.keys import Key
from tdgeom.model.calls.read_pass import Pass
from tdgeom.model.sites import Site
from tdgeom.model.structure.resolved_site import ResolvedSite

__all__ = ["await_gradients", "differentiable", "replace_by_gradients"]


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Gradients on; where every parameter is frozen they are let go for this one pass."""
    frozen = [p for p in model.parameters() if p.is_floating_point()]
    frozen = [] if any(p.requires_grad for p in frozen) else frozen
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def replace_by_gradients(done: Pass, sites: Iterable[ResolvedSite], scalar: Any) -> None:
    """Put the gradients of a scalar in place of the activations that were read."""
    if not isinstance(scalar, Tensor) or scalar.ndim:
        got = tuple(scalar.shape) if isinstance(scalar, Tensor) else type(scalar).__name__
        raise ValueError(f"target= expected a function that gives a scalar tensor, got {got}.")
    entries = {entry.site: entry for entry in sites}
    roots = [done.roots[site] for site in done.acts]
    grads = torch.autograd.grad(scalar, roots, allow_unused=True, materialize_grads=True)
    for site, grad in zip(list(done.acts), grads, strict=True):
        value = entries[site].gradient(grad)
        done.acts[site] = value.reshape(done.acts[site].shape)


def await_gradients(
    done: Pass,
    sites: Iterable[ResolvedSite],
    leaves: Mapping[Site, Key],
    td: TensorDictBase,
    *,
    clone: bool,
) -> None:
    """Write each gradient to the call's TensorDict when the user's backward reaches the site."""
    for entry in sites:
        if entry.site in done.roots:
            shape = done.acts[entry.site].shape

            def arrive(grad: Tensor, entry: ResolvedSite = entry, shape: torch.Size = shape) -> None:
                value = entry.gradient(grad.detach()).reshape(shape)
                td.set(leaves[entry.site], value.clone() if clone else value)

            done.roots[entry.site].register_hook(arrive)
