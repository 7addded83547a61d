"""Models whose inputs cannot be made up are looked at in the first call of the user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from tdgeom.model.calls.block_facts import refusals
from tdgeom.model.calls.block_reads import BlockReads
from tdgeom.model.calls.site_hooks import only_reads
from tdgeom.model.calls.stream_order import STREAM_ENDS, StackReads
from tdgeom.model.calls.structure_check import PASSED, Facts, Key, block_keys, refusal
from tdgeom.model.calls.verified import verified
from tdgeom.model.sites import Site
from tdgeom.model.structure.readers import spelled
from tdgeom.model.structure.resolve import find_sites
from tdgeom.model.structure.resolved_site import ResolvedSite


class BlockCall:
    """A look at the first call of the user's of one block, where no pass could be made for it."""

    def __init__(
        self, model: nn.Module, entries: Mapping[str, ResolvedSite], key: Key, asked: set[str]
    ) -> None:
        self.model, self.key, self.asked, self.inside = model, key, asked, False
        self.reads = BlockReads(model, entries)

    def open(self) -> None:
        """Install the hooks; inside of forwards only where what lies there is read anyway."""
        self.inside = bool(self.asked & self._inner())
        self.reads.open(inside=self.inside)

    def close(self) -> None:
        """Remove the hooks."""
        self.reads.close()

    def check_call(self) -> None:
        """Raise if the call contradicts the structure, unless hooks of others (edits) may have changed what was read."""
        self.close()
        seen = self.reads.ran and "residual_output" in self.reads.values
        if not seen or not _is_left_alone(self.reads.block):
            return
        unseen = set() if self.inside else self._inner()
        reasons = {kind: why for kind, why in refusals(self.reads).items() if kind not in unseen}
        wrong = {self.reads.entries[kind].site: why for kind, why in reasons.items() if kind in self.asked}
        if wrong:
            raise refusal(self.model, wrong)
        facts: Facts = verified(self.model).setdefault("structure", {})
        found = {kind: reasons.get(kind, PASSED) for kind in self.reads.entries if kind not in unseen}
        facts[self.key] = {**facts.get(self.key, {}), **found}

    def _inner(self) -> set[str]:
        return {kind for kind, entry in self.reads.entries.items() if entry.in_softmax or entry.in_router}


class StackCall:
    """A look at the first call of the user's of a stack: whether its blocks hand one stream on."""

    def __init__(
        self, model: nn.Module, stack: str | None, known: Sequence[ResolvedSite], asked: Sequence[Site]
    ) -> None:
        self.model, self.asked = model, asked
        self.reads = StackReads(model, stack, known)

    def open(self) -> None:
        """Install the hooks."""
        self.reads.open()

    def close(self) -> None:
        """Remove the hooks."""
        self.reads.close()

    def check_call(self) -> None:
        """Raise if blocks do not receive what those before them gave, or another part of it than was read."""
        self.close()
        if not all(map(_is_left_alone, self.reads.blocks.values())):
            return
        reason, elements = self.reads.judge()
        if reason is None and elements:
            kind, element = next(iter(elements.items()))
            reason = (
                f"the next block receives another part of what {kind.__name__} gives. Remedy: "
                f'"module_output:<path>{spelled(element)}"'
            )
            wrong = [site for site in self.asked if site.kind == "residual_output"]
        else:
            wrong = list(self.asked)
        if reason is not None and wrong:
            raise refusal(self.model, dict.fromkeys(wrong, reason))


class FirstCall:
    """All that is looked at in one call of the user's."""

    def __init__(self, looks: Sequence[BlockCall | StackCall]) -> None:
        self.looks = looks

    def open(self) -> None:
        """Install the hooks."""
        for look in self.looks:
            look.open()

    def close(self) -> None:
        """Remove the hooks."""
        for look in self.looks:
            look.close()

    def check_call(self) -> None:
        """Raise if the call contradicts the structure."""
        self.close()
        for look in self.looks:
            look.check_call()


def _is_left_alone(block: nn.Module) -> bool:
    hooks = [
        h for m in block.modules() for kept in (m._forward_hooks, m._forward_pre_hooks) for h in kept.values()
    ]
    return all(map(only_reads, hooks))


def unverified(model: nn.Module, entries: Sequence[ResolvedSite]) -> list[FirstCall]:
    """What no pass could check, for want of inputs, and a call of the user's can: a look at that call."""
    entries = [entry for entry in entries if entry.site.layer is not None]
    if not entries:
        return []  # nothing was concluded of modules that are named by their paths
    known = find_sites(model)
    keys = block_keys(model, known)
    facts: Facts = verified(model).get("structure", {})
    layers: dict[tuple, dict[str, ResolvedSite]] = {}
    for entry in known:
        if entry.call == 0:
            layers.setdefault((entry.site.stack, entry.site.layer), {})[entry.site.kind] = entry
    looks: dict[Key, BlockCall] = {}
    for entry in entries:
        place = (entry.site.stack, entry.site.layer)
        key = keys.get(place)
        if key is None or entry.site.kind in facts.get(key, {}) or entry.call:
            continue
        if key not in looks:
            looks[key] = BlockCall(model, layers[place], key, set())
        looks[key].asked.add(entry.site.kind)
    in_doubt = {place[0] for place, key in keys.items() if key in looks}
    stacks = []
    for stack in in_doubt:
        asked = [e.site for e in entries if e.site.stack == stack and e.site.kind in STREAM_ENDS]
        if asked:
            stacks.append(StackCall(model, stack, known, asked))
    return [FirstCall([*looks.values(), *stacks])] if looks else []
