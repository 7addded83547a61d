"""Positions in padded batches, checked against the model: a padded sequence must give what it gives alone.

A batch without padding is given to the model as it is. For a padded one nobody outside the model knows how it numbers positions,
so one sequence is run alone, cut to its attended tokens, and compared with its padded row: as the model numbers by itself, with
``position_ids`` counted over attended tokens from 0, and from the number at which the model's own table of positions begins. The
first that agrees is kept for the model (:func:`verified`); where none does, the batch is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tdgeom.model.calls.bound_model import eval_mode
from tdgeom.model.calls.model_inputs import position_ids
from tdgeom.model.calls.padded_and_alone import (
    Given,
    PaddedAndAlone,
    Seen,
    difference,
    padded_and_alone,
    padding_kinds,
)
from tdgeom.model.calls.quiet import without_hooks
from tdgeom.model.calls.verified import verified
from tdgeom.model.structure.blocks import find_stacks
from tdgeom.model.structure.readers import read_input, read_output

SIDES = {"attention_mask": "position_ids", "decoder_attention_mask": "decoder_position_ids"}
# relative difference of a token's vector: certain below the first, another sequence above the second
_AGREES = {
    torch.float64: (1e-10, 1e-6),
    torch.float32: (1e-5, 1e-4),
    torch.float16: (1e-3, 1e-2),
    torch.bfloat16: (8e-3, 8e-2),
}


def number_padded(
    model: nn.Module,
    given: Given,
    told: Mapping[str, Tensor],
    call: Callable[[Given], Any],
    names: Sequence[str],
    owner: str,
) -> Given:
    """What a model is called with for a batch that may be padded: ``given``, with position ids where the model needs them.

    Args:
        model: the model; hooks on it stay silent and its training flags are restored.
        given: forward name -> value.
        told: the batch's masks, ``"attention_mask"`` and ``"decoder_attention_mask"``, whether the model takes them or not.
        call: runs the model on such a mapping.
        names: the position arguments that the model may be called with.
        owner: who asks, for the error.

    Raises ``ValueError`` where no numbering makes a padded sequence what it is alone.
    """
    masks, kinds = _padding(given, told)
    if not kinds:
        return given
    known, key = verified(model), _key(kinds)
    own = {name: SIDES[name] for name in kinds if SIDES[name] in names}
    numbering: Numbering | None = known.get(key)
    if numbering is None:
        probes = padded_and_alone(given, masks, kinds)
        numbering = _first_that_agrees(model, call, probes, own, owner)
        if any(probe.decisive for probe in probes):
            known[key] = numbering
    return {**given, **numbering.positions(masks, own)}


def is_unnumbered(model: nn.Module, given: Given, told: Mapping[str, Tensor]) -> bool:
    """Whether ``number_padded`` would have to run the model on a batch first."""
    kinds = _padding(given, told)[1]
    return bool(kinds) and _key(kinds) not in verified(model)


def _padding(
    given: Given, told: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """A batch's masks, and where those are padded whose positions are not given."""
    masks = {name: mask for name, mask in told.items() if isinstance(mask, Tensor) and mask.ndim == 2}
    kinds = {name: padding_kinds(mask) for name, mask in masks.items() if given.get(SIDES[name]) is None}
    masks = {name: mask.bool() for name, mask in masks.items()}
    return masks, {name: found for name, found in kinds.items() if found}


def _key(kinds: Mapping[str, tuple[str, ...]]) -> tuple:
    return ("positions", *((name, *found) for name, found in kinds.items()))


_ALL_RANKS: ContextVar[bool] = ContextVar("all ranks number the same batch", default=False)


@contextmanager
def on_all_ranks() -> Iterator[None]:
    """Inside, all ranks look at one and the same batch, so that a model which they share can be run for it."""
    token = _ALL_RANKS.set(True)
    try:
        yield
    finally:
        _ALL_RANKS.reset(token)


@dataclass(frozen=True)
class Numbering:
    """A way to number positions: in words, and the number of the first token (None: the model is given none)."""

    words: str
    first: int | None = None

    def positions(self, masks: Mapping[str, Tensor], own: Mapping[str, str]) -> dict[str, Tensor]:
        """The position arguments, by name; ``own`` says which belongs to which mask."""
        if self.first is None:
            return {}
        return {positions: position_ids(masks[name]) + self.first for name, positions in own.items()}


def _first_that_agrees(
    model: nn.Module,
    call: Callable[[Given], Any],
    probes: Sequence[PaddedAndAlone],
    own: Mapping[str, str],
    owner: str,
) -> Numbering:
    modules = list(model.modules())
    _refuse_sharded(model, modules, owner)
    tables: list[Tensor] = []
    tried: list[tuple[float, Numbering]] = []
    problem = "" if probes else "its inputs cannot be cut into sequences"
    with eval_mode(modules), without_hooks(model), torch.no_grad():
        watch = _Watched(model)
        for probe in probes:
            try:
                with watch.tables(tables, probe):
                    probe.seen = watch.run(call, probe.alone)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                problem = f"{type(error).__name__}: {str(error)[:200]}"
        sure, most = watch.precision(probes)
        for numbering in () if problem else _candidates(tables, own):
            worst = max(watch.differ(call, probe, own, numbering) for probe in probes)
            tried.append((worst, numbering))
            if worst <= sure:
                return numbering
    if tried and (best := min(tried, key=lambda pair: pair[0]))[0] <= most:
        return best[1]
    said = ", ".join(f"{worst:.2g} with {numbering.words}" for worst, numbering in tried)
    said = f"does not give for a padded sequence what it gives for that sequence alone (relative difference {said})"
    if problem:
        said = (
            f"could not be run on one of its sequences alone, to check how it numbers positions ({problem})"
        )
    give = "'position_ids' in the batch as the model counts them; or " if own else ""
    raise ValueError(
        f"{owner}: this batch is padded, and {type(model).__name__} {said}. Remedy: {give}batches without padding (sequences of "
        "one length); or withhold=['position_ids'], which takes what the model computes, unchecked."
    )


def _candidates(tables: Sequence[Tensor], own: Mapping[str, str]) -> list[Numbering]:
    """The model by itself; counted from 0; counted from the number at which its own table begins, where that is another."""
    found = [Numbering("its own numbering")]
    if not own:
        return found
    found.append(Numbering("positions counted over attended tokens", 0))
    for table in tables if list(own.values()) == ["position_ids"] else ():
        steps = table - table[0]
        if int(table[0]) and torch.equal(steps, torch.arange(len(table), device=table.device)):
            return [*found, Numbering(f"positions counted from {int(table[0])}", int(table[0]))]
    return found


def _refuse_sharded(model: nn.Module, modules: Sequence[nn.Module], owner: str) -> None:
    """One rank's pass of a model that ranks share would wait for the others for ever."""
    bases = {base.__name__ for kind in {type(module) for module in modules} for base in kind.__mro__}
    if bases & {"FSDPModule", "FullyShardedDataParallel"} and not _ALL_RANKS.get():
        raise ValueError(
            f"{owner}: this batch is padded, and how {type(model).__name__} numbers positions cannot be checked once ranks share "
            "its weights. Remedy: 'position_ids' in the batch, tdgeom.run, in which all ranks check it together, batches without "
            "padding, a padded batch before the model is sharded, or withhold=['position_ids'], which takes what the model "
            "computes, unchecked."
        )


class _Watched:
    """Runs that note what goes into the first block of every stack, and what its first and last block give."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.stacks = model, find_stacks(model)

    def run(self, call: Callable[[Given], Any], given: Given) -> Seen:
        """One run; what was seen, as copies."""
        handles: list[Any] = []
        seen: Seen = []

        def keep(side: str, value: Any) -> None:
            if isinstance(value, Tensor) and value.is_floating_point():
                seen.append((side, value.detach().clone()))

        def before(side: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
            keep(side, read_input(args, kwargs))

        def after(side: str, module: nn.Module, args: tuple, output: Any) -> None:
            keep(side, read_output(args, {}, output))

        try:
            for stack in self.stacks:
                first, last = stack.blocks[0].module, stack.blocks[-1].module
                handles.append(first.register_forward_pre_hook(partial(before, stack.path), with_kwargs=True))
                for block in dict.fromkeys((first, last)):
                    handles.append(block.register_forward_hook(partial(after, stack.path)))
            with torch.random.fork_rng(devices=[]):
                output = call(given)
            if not self.stacks:
                keep("", read_output((), {}, output))
        finally:
            for handle in handles:
                handle.remove()
        return seen

    @contextmanager
    def tables(self, found: list[Tensor], probe: PaddedAndAlone) -> Iterator[None]:
        """Inside, notes the numbers with which tables of positions are read, where there is one for each token."""
        mask, _ = probe.masks.get("attention_mask", (torch.zeros(0, 0), None))

        def note(module: nn.Module, args: tuple) -> None:
            ids = args[0] if args else None
            if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.numel() == mask.numel():
                found.append(ids.flatten().clone())

        handles: list[Any] = []
        for name, module in self.model.named_modules() if len(mask) == 1 else ():
            own = name.rpartition(".")[2]
            if ("position" in own or own == "wpe") and not any(True for _ in module.children()):
                handles.append(module.register_forward_pre_hook(note))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def precision(self, probes: Sequence[PaddedAndAlone]) -> tuple[float, float]:
        """What counts as the same, by the coarsest dtype that was used."""
        used = {value.dtype for probe in probes for _, value in probe.seen}
        used |= {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        device = next((value.device.type for probe in probes for _, value in probe.seen), "cpu")
        if torch.is_autocast_enabled(device):
            used.add(torch.get_autocast_dtype(device))
        coarse = _AGREES[torch.bfloat16]
        sure, most = max((_AGREES.get(dtype, coarse) for dtype in used), default=_AGREES[torch.float32])
        if device == "cuda" and torch.get_float32_matmul_precision() != "highest":
            sure, most = max(sure, 2e-3), max(most, 2e-2)
        return sure, most

    def differ(
        self,
        call: Callable[[Given], Any],
        probe: PaddedAndAlone,
        own: Mapping[str, str],
        numbering: Numbering,
    ) -> float:
        """The largest relative difference between the padded sequences and the same ones alone."""
        whole = {name: padded for name, (_, padded) in probe.masks.items()}
        try:
            seen = self.run(call, {**probe.padded, **numbering.positions(whole, own)})
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return float("inf")  # more positions than the model has, say
        if len(seen) != len(probe.seen):
            return float("inf")
        pairs = zip(probe.seen, seen, strict=True)
        return max((difference(probe, side, a, b) for (side, a), (_, b) in pairs), default=0.0)
