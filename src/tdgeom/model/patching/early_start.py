"""Passes that begin at a block: the blocks that ran before it in a known pass give what they gave there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from tdgeom.model.calls.bound_model import has_other_forwards, may_stop, modules_within
from tdgeom.model.structure.blocks import find_stacks
from tdgeom.model.structure.resolved_site import ResolvedSite


class EarlyStart:
    """What the blocks of a model gave in one pass, given again in place of running them.

    That nothing else of those blocks is used later (a cache that they share, say) is for the caller to see: a row of the pass
    run again must give what it gave. Nothing is left out where forwards are somebody else's, or blocks give what has no rows.
    """

    def __init__(self, model: nn.Module, examples: int) -> None:
        modules = modules_within(model)
        self.examples = examples
        usable = may_stop(modules) and not has_other_forwards(modules)
        stacks = find_stacks(model) if usable else []
        self.blocks = {block.path: block.module for stack in stacks for block in stack.blocks}
        self.before: dict[tuple[nn.Module, int], list[tuple[nn.Module, int]]] = {}
        self.gave: dict[tuple[nn.Module, int], Any] = {}

    def watch(self, call: Callable[[], Any]) -> Any:
        """Run a pass, and keep what each block gives in it."""
        counts: dict[nn.Module, int] = {}
        running: dict[nn.Module, int] = {}

        def begin(module: nn.Module, args: Any) -> None:
            running[module] = counts.get(module, 0)
            counts[module] = running[module] + 1
            self.before[module, running[module]] = list(self.gave)

        def end(module: nn.Module, args: Any, output: Any) -> None:
            self.gave[module, running[module]] = _copied(output)

        handles = []
        try:
            for module in set(self.blocks.values()):
                handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
            return call()
        finally:
            for handle in handles:
                handle.remove()

    def skipped(self, entry: ResolvedSite) -> list[tuple[nn.Module, int]]:
        """The calls of blocks that were over before the block of a site began; none where that is not known.

        None either for a site that is one of several calls of a module: calls left out would not be counted.
        """
        own = [m for path, m in self.blocks.items() if f"{entry.module_path}.".startswith(f"{path}.")]
        if entry.calls > 1 or not own or (own[0], 0) not in self.before:
            return []
        done = self.before[own[0], 0]
        return done if all(_has_rows(self.gave[one], self.examples) for one in done) else []

    @contextmanager
    def begin_behind(self, skipped: list[tuple[nn.Module, int]], example: Tensor) -> Iterator[None]:
        """Inside, these calls give what they gave in the pass watched, for the examples of each row."""
        calls: dict[nn.Module, set[int]] = {}
        for module, call in skipped:
            calls.setdefault(module, set()).add(call)
        try:
            for module, which in calls.items():
                given = partial(self._give, module, module.forward, which, [0], example)
                module.__dict__["forward"] = given
            yield
        finally:
            for module in calls:
                module.__dict__.pop("forward", None)

    def _give(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        which: set[int],
        count: list[int],
        example: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        call, count[0] = count[0], count[0] + 1
        if call not in which:
            return forward(*args, **kwargs)
        return _rows(self.gave[module, call], example, self.examples)


def _copied(given: Any) -> Any:
    if isinstance(given, Tensor):
        return given.detach().clone()
    return type(given)(map(_copied, given)) if type(given) in (tuple, list) else given


def _has_rows(given: Any, examples: int) -> bool:
    """Whether a block's output is tensors with a row an example (or one for all of them), alone or in a tuple or list."""
    if isinstance(given, Tensor):
        return bool(given.ndim) and given.shape[0] in (1, examples)
    return given is None or (type(given) in (tuple, list) and all(_has_rows(one, examples) for one in given))


def _rows(given: Any, example: Tensor, examples: int) -> Any:
    if isinstance(given, Tensor):
        whole = given.shape[0] == examples
        return given.index_select(0, example.to(given.device)) if whole else given
    if given is None:
        return None
    return type(given)(_rows(one, example, examples) for one in given)
