"""What a few passes of a model show of its sites: what is read, and what the model and plain hooks say beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdgeom.model.calls.bound_model import eval_mode
from tdgeom.model.calls.checked_sites import available_sites
from tdgeom.model.capture import Capture
from tdgeom.model.sites import PATTERN_KINDS, Site
from tdgeom.model.structure.resolved_site import ResolvedSite
from tdgeom.model.verification.plain_hooks import Run, distance, eager_attention, floats, recorded

# the names under which a model's output holds what it is called for
_ANSWERS = ("logits", "sentence_embedding", "last_hidden_state", "prediction_outputs", "pooler_output")


@dataclass
class Evidence:
    """A model, a batch, and what passes over it have shown."""

    model: nn.Module
    batch: TensorDictBase
    entries: dict[Site, ResolvedSite]
    call: Callable[
        ..., Any
    ]  # the model on the batch as the module form calls it; further arguments by keyword
    options: dict[str, Any]  # how a Capture of this model is made
    known: list[ResolvedSite]  # every site that the model has
    acts: dict[Site, Tensor] = field(default_factory=dict)
    refused: dict[Site, str] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    output: Any = None
    hidden: dict[str | None, tuple[Tensor, ...]] = field(default_factory=dict)
    attentions: dict[str | None, tuple[Tensor, ...]] = field(default_factory=dict)
    eager: float = 0.0  # how far the answer with the eager attention is from the model's own

    def site(self, like: Site, kind: str) -> Site:
        """The site of another kind in the same block."""
        return Site.of(kind, like.layer, stack=like.stack, prefix=like.prefix)

    def act(self, like: Site, kind: str) -> Tensor | None:
        """What was read there."""
        return self.acts.get(self.site(like, kind))

    def depth(self, stack: str | None) -> int:
        """How many blocks a stack has, whichever of them are looked at."""
        return 1 + max((e.site.layer or 0 for e in self.known if e.site.stack == stack), default=-1)

    def layers_with(self, site: Site) -> list[int | None]:
        """The layers that have a site of this kind."""
        return [e.site.layer for e in self.known if (e.site.stack, e.site.kind) == (site.stack, site.kind)]

    def block(self, site: Site) -> Run | None:
        """The run of the block that holds a site."""
        entry = self.entries[site]
        own = [run for run in self.runs if run.path == entry.block_path]
        calls = self._calls(entry)
        return own[calls] if len(own) > calls else None

    def _calls(self, entry: ResolvedSite) -> int:
        if entry.calls == 1:
            return 0
        whole = self.entries.get(Site.of("residual_input", entry.site.layer, stack=entry.site.stack), entry)
        return whole.call

    def attended(self, value: Tensor) -> Tensor:
        """The rows (B, T, ...) of attended tokens: what is computed at padding differs from kernel to kernel."""
        mask = self.batch.get("attention_mask", None)
        if isinstance(mask, Tensor) and mask.ndim == 2 and value.shape[:2] == mask.shape and value.ndim > 2:
            return value[mask.bool().to(value.device)]
        return value

    def inside(self, site: Site) -> list[Run]:
        """The runs of modules within that block's."""
        block = self.block(site)
        return [] if block is None else [run for run in self.runs if block.holds(run)]


def gather(
    model: nn.Module, batch: TensorDictBase, sites: Sequence[ResolvedSite], options: dict[str, Any]
) -> Evidence:
    """Read sites, run the model plainly beside it, and ask it for what it gives itself; ``options`` are those of a Capture."""
    path = next(entry.module_path or path for entry in sites for path, _ in model.named_modules() if path)
    args, kwargs = Capture(model, f"module_output:{path}", **options)._arguments(batch)

    def call(**more: Any) -> Any:
        with eval_mode(list(model.modules())), torch.no_grad():
            return model(*args, **{**kwargs, **more})

    entries = {entry.site: entry for entry in sites}
    found = Evidence(model, batch, entries, call, options, available_sites(model))
    _read(found)
    blocks = {entry.block_path for entry in entries.values() if entry.block_path is not None}
    paths = [
        path
        for path, _ in model.named_modules()
        if path and any(path == block or path.startswith(f"{block}.") or not block for block in blocks)
    ]
    paths += [entry.module_path for entry in entries.values() if entry.module_path not in paths]
    with recorded(model, dict.fromkeys(paths)) as runs:
        found.output = call()
    found.runs = runs
    found.hidden = _given(found, "hidden_states")
    if any(site.kind in PATTERN_KINDS for site in found.acts):
        with eager_attention(model):
            found.attentions = _given(found, "attentions")
            own, eager = answer(found.output), answer(call())
        if own is not None and eager is not None:
            found.eager = distance(found.attended(eager), found.attended(own))
    return found


def answer(output: Any) -> Tensor | None:
    """What a model is called for: its logits, its embedding, or its last hidden state; else its first tensor."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for name in _ANSWERS:
            if isinstance(output.get(name), Tensor):
                return output[name]
    return next(floats(output), None)


def _read(found: Evidence) -> None:
    """What the sites give; those inside the attention kernel in a pass of their own, which takes the kernel apart."""
    groups: dict[bool, list[Site]] = {}
    for site, entry in found.entries.items():
        groups.setdefault(entry.in_softmax, []).append(site)
    for sites in groups.values():
        _read_together(found, sites)


def _read_together(found: Evidence, sites: Sequence[Site]) -> None:
    """The sites in one pass; where one is refused, kind by kind and then one by one, so that each has its own reason."""
    try:
        names = [str(site) for site in sites]
        acts = Capture(found.model, names, clone=True, **found.options)(found.batch.copy())["acts"]
    except Exception as error:
        kinds = list(dict.fromkeys((site.stack, site.kind) for site in sites))
        if len(sites) == 1:
            found.refused[sites[0]] = f"{type(error).__name__}: {error}"
        elif len(kinds) > 1:
            for stack, kind in kinds:
                _read_together(found, [s for s in sites if (s.stack, s.kind) == (stack, kind)])
        else:
            for site in sites:
                _read_together(found, [site])
        return
    found.acts |= {site: acts[site] for site in sites}


def _given(found: Evidence, name: str) -> dict[str | None, tuple[Tensor, ...]]:
    """``hidden_states`` or ``attentions`` that the model itself gives, by stack."""
    try:
        output = found.call(**{f"output_{name}": True})
    except Exception:  # takes no such argument
        return {}
    stacks = dict.fromkeys(site.stack for site in found.entries)
    given: dict[str | None, tuple[Tensor, ...]] = {}
    for stack in stacks:
        # an inner language model's states are the whole model's
        for key in (f"{stack}_{name}",) if stack in ("encoder", "decoder") else (name,):
            value = output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
            if (
                isinstance(value, tuple | list)
                and value
                and all(isinstance(v, Tensor) or v is None for v in value)
            ):
                given[stack] = tuple(v for v in value if v is not None)
    return given


__all__ = ["Evidence", "answer", "gather"]
