"""Whether an edit of a router's logits changes which experts it chooses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from tdgeom.model.calls.attention_kernel import watch_softmax
from tdgeom.model.calls.block_reads import BlockReads
from tdgeom.model.calls.router_kernel import router_look
from tdgeom.model.structure.resolved_site import ResolvedSite

MOVED = "edits of router_logits"
_MUCH = 1e4


@contextmanager
def moved_logits(model: nn.Module, reads: Sequence[BlockReads]) -> Iterator[list[bool]]:
    """Inside, the expert that each router chose least has ``1e4`` more; the list says afterwards whose choice followed."""
    counts = [_counts(read.values["router_choice"], _experts(read)) for read in reads]
    targets = [int(count.argmin()) for count in counts]
    seen: list[list[Tensor]] = [[] for _ in reads]
    moved: list[bool] = []
    with ExitStack() as stack:
        for read, target, chosen in zip(reads, targets, seen, strict=True):
            logits, choice = read.entries.get("router_logits"), read.entries["router_choice"]
            if logits is None:
                continue
            module = model.get_submodule(logits.module_path)
            if logits.in_router:
                look = router_look(model, logits)
                stack.enter_context(watch_softmax(module, partial(_raise, target), look=look))
            else:
                handle = module.register_forward_hook(
                    partial(_raise_output, logits, target), with_kwargs=True
                )
                stack.callback(handle.remove)
            owner = model.get_submodule(choice.module_path)
            watcher = partial(_note, chosen)
            stack.enter_context(watch_softmax(owner, watcher, look=router_look(model, choice)))
        yield moved
    for read, before, target, chosen in zip(reads, counts, targets, seen, strict=True):
        after = _counts(chosen[0], _experts(read)) if chosen else before
        moved.append(bool(after[target] > before[target]))


def _experts(read: BlockReads) -> int:
    return read.entries["router_choice"].view.experts  # type: ignore[union-attr]


def _counts(choice: Tensor, experts: int) -> Tensor:
    return torch.bincount(choice[choice >= 0].flatten(), minlength=experts)


def _raise(target: int, side: str, value: Tensor) -> Tensor:
    if side != "logits":
        return value
    more = torch.zeros(value.shape[-1], dtype=value.dtype, device=value.device)
    more[target] = _MUCH
    return value + more


def _raise_output(
    entry: ResolvedSite, target: int, module: nn.Module, args: tuple, kwargs: dict, output: object
) -> object:
    value = entry.read(args, kwargs, output)
    return output if value is None else entry.write(args, kwargs, output, _raise(target, "logits", value))


def _note(seen: list[Tensor], side: str, value: Tensor) -> Tensor:
    seen.append(value)
    return value
