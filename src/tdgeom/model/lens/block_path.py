"""How the parts of a block add up to what it gives: sums and norms in the stream, as they were in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdgeom.core.devices import doubled
from tdgeom.model.lens.frozen_norm import FrozenNorm
from tdgeom.model.lens.linear_tail import agree


@dataclass(frozen=True)
class NormSeen:
    """A norm of a block, and what it took and gave in the pass, (N, D) each."""

    module: nn.Module
    taken: Tensor
    gave: Tensor


# a kind of part that is added, or the name of a norm that the stream goes through
Step = str | tuple[str, FrozenNorm]


def block_path(
    before: Tensor, after: Tensor, parts: Mapping[str, Tensor], norms: Mapping[str, NormSeen]
) -> list[Step] | None:
    """The way from what a block takes to what it gives: every part added once, through norms that took the sum so far.

    ``before``, ``after`` and the parts are (N, D) of one pass. A block that normalises first is its parts alone; one that
    normalises last goes through a norm behind each. ``None`` where no such way gives ``after``.

    >>> x, part = torch.ones(2, 4), torch.arange(8.0).reshape(2, 4)
    >>> block_path(x, x + part, {"mlp_output": part}, {})
    ['mlp_output']
    >>> norm = nn.LayerNorm(4)
    >>> [step if isinstance(step, str) else step[0] for step in block_path(
    ...     x, norm(x + part).detach(), {"mlp_output": part}, {"ln": NormSeen(norm, x + part, norm(x + part).detach())}
    ... )]
    ['mlp_output', 'ln']
    """
    size = torch.stack([v.abs().amax(-1, keepdim=True) for v in (before, after, *parts.values())]).amax(0)
    return _search(doubled(before), after, parts, norms, size, list(parts), list(norms))


def _search(
    state: Tensor,
    after: Tensor,
    parts: Mapping[str, Tensor],
    norms: Mapping[str, NormSeen],
    size: Tensor,
    waiting: Sequence[str],
    unused: Sequence[str],
) -> list[Step] | None:
    if not waiting and agree(state, after, size, after.dtype):
        return []
    if waiting:  # first as if nothing stood in between
        kind, *others = waiting
        rest = _search(state + doubled(parts[kind]), after, parts, norms, size, others, unused)
        if rest is not None:
            return [kind, *rest]
    for name in unused:
        seen = norms[name]
        if not agree(state, seen.taken, size, after.dtype):
            continue
        others = [other for other in unused if other != name]
        rest = _search(doubled(seen.gave), after, parts, norms, size, waiting, others)
        if rest is not None:
            return [(name, FrozenNorm(seen.module, seen.taken, seen.gave)), *rest]
    return None
