"""One architecture built, called by hand, and read: what the checks of the zoo start from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tensordict import TensorDict
from torch import Tensor, nn

import tdgeom as tg
from model.zoo.own_hooks import Event, Pass, by_hand, call, same
from tdgeom.model.sites import BLOCK_KINDS

KINDS = ("embed", *BLOCK_KINDS, "final_norm")
_OWN = ("attn_output", "z", "v", "attn_pattern", "head_output")
INNER_KINDS = (*_OWN, *(f"cross_{kind}" for kind in _OWN), "mlp_output", "mlp_act")


@dataclass
class Stack:
    """A stack by the model's own word: the runs of its blocks, and its hidden states where the model gives them."""

    name: str | None
    blocks: list[Event]
    hidden: tuple[Tensor, ...] | None

    def inputs(self, layer: int) -> Tensor:
        if self.hidden is not None:
            return self.hidden[layer]
        return self.blocks[layer].inputs[0]

    def outputs(self, layer: int) -> Tensor:
        if self.hidden is not None and layer + 1 < len(self.blocks):
            return self.hidden[layer + 1]
        like = self.inputs(layer)
        fitting = [t for t in self.blocks[layer].outputs if t.shape[-1] == like.shape[-1]]
        return (fitting or self.blocks[layer].outputs)[0]


@dataclass
class Report:
    """What was found: ``wrong`` must be empty; ``offered`` and ``refused`` go into the table."""

    name: str
    wrong: list[str] = field(default_factory=list)
    offered: dict[str, str] = field(default_factory=dict)  # kind -> "yes" or what was checked of it
    refused: dict[str, str] = field(default_factory=dict)  # kind or way of calling -> message
    counts: dict[str, int] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)  # kinds that are offered in some blocks of a class only
    compared: bool = False  # whether there is a stream to compare


def refusal(error: Exception) -> bool:
    """Whether an error is one of ours that says what to do."""
    said = str(error)
    return isinstance(error, ValueError | RuntimeError | IndexError) and "Remedy" in said


class Examined:
    """One architecture, built once, and the checks of it."""

    def __init__(self, member: Any) -> None:
        self.member, self.report = member, Report(member.name)
        self.model = member.build()
        self.batch = member.batch()
        self.quick = {"use_cache": False} if member.cached else {}
        asked = {"output_hidden_states": True} if member.hidden else {}
        self.truth = self.by_hand(self.batch, **asked)
        self.stacks: dict[str | None, Stack] = {}
        self.streams: list[str] = []

    # ------------------------------------------------------------------------------------- the stream

    def wrong(self, what: str) -> None:
        self.report.wrong.append(what)

    def find_stacks(self, offered: list[str | None]) -> None:
        """The stacks of tdgeom, each by hidden states (and the list of modules that takes and gives them) or a declared path."""
        output, declared = self.truth.output, dict(self.member.blocks)
        for name in offered:
            hidden = self._hidden(output, name)
            if name in declared:
                path = declared[name]
                events = [
                    e
                    for e in self.truth.events
                    if e.path.startswith(path + ".") and e.path.count(".") == path.count(".") + 1
                ]
                self.stacks[name] = Stack(
                    name, events, hidden if hidden and len(hidden) == len(events) + 1 else None
                )
                continue
            if hidden is None:
                self.wrong(f"stack {name!r}: the model gives no hidden states for it; declare blocks=")
                continue
            found = self._blocks(hidden)
            if found is None:
                self.wrong(
                    f"stack {name!r}: no list of modules takes its {len(hidden)} hidden states; declare blocks="
                )
                continue
            self.stacks[name] = Stack(name, found[0], hidden if found[1] else None)

    def _hidden(self, output: Any, name: str | None) -> tuple[Tensor, ...] | None:
        names = (
            ["hidden_states"]
            if name is None
            else [f"{name}_hidden_states", "hidden_states" if name == "language_model" else ""]
        )
        for key in names:
            value = getattr(output, key, None) if key else None
            if isinstance(value, tuple) and value:
                return value
        return None

    def _blocks(self, hidden: tuple[Tensor, ...]) -> tuple[list[Event], bool] | None:
        """The runs of the list whose members take the hidden states, or (False) give them."""
        lists: dict[str, list[Event]] = {}
        for event in self.truth.events:
            parent, _, last = event.path.rpartition(".")
            if last.isdigit():
                lists.setdefault(parent, []).append(event)
        for events in lists.values():
            if len(events) == len(hidden) - 1:
                for takes in (True, False):
                    if all(
                        any(same(t, h) for t in (e.inputs if takes else e.outputs))
                        for e, h in zip(events, hidden)
                    ):
                        return events, takes
        return None

    def by_hand(self, batch: dict[str, Any], model: nn.Module | None = None, **more: Any) -> Pass:
        """A traced plain call; of a model that works on time first, the traces are turned to (B, T, ...)."""
        done = by_hand(
            self.model if model is None else model, batch, self.member.packed, **self.quick, **more
        )
        if self.member.time_first:
            for event in done.events:
                event.inputs, event.outputs = (
                    [self.turned(t, batch) for t in ts] for ts in (event.inputs, event.outputs)
                )
        return done

    def turned(self, value: Tensor, batch: dict[str, Any] | None = None) -> Tensor:
        """(T, B, ...) as (B, T, ...)."""
        if not self.member.time_first:
            return value
        rows = len((self.batch if batch is None else batch)["input_ids"])
        return value.transpose(0, 1) if value.ndim > 2 and value.shape[0] != rows == value.shape[1] else value

    def call(self, model: nn.Module, batch: dict | None = None) -> Any:
        return call(model, self.batch if batch is None else batch, self.member.packed, **self.quick)

    def capture(self, kinds: Any, **more: Any) -> tg.Capture:
        return tg.Capture(self.model, kinds, clone=True, withhold=(), **more)

    def read(self, kinds: Any, batch: dict | None = None, **more: Any) -> dict[str, Tensor]:
        td = self.capture(kinds, **more)(TensorDict(dict(self.batch if batch is None else batch)))
        return dict(td["acts"].items())


def ratio(value: Tensor, event: Event) -> float:
    """What a module's output is multiplied by to be a value."""
    given = next(t for t in event.outputs if proportional(t, value)).reshape(-1).double()
    return float(value.reshape(-1).double() @ given / (given @ given))


def proportional(one: Tensor, other: Tensor) -> bool:
    """Whether a tensor is the other one times a number."""
    if one.numel() != other.numel() or one.shape[-1] != other.shape[-1]:
        return False
    one, other = one.reshape(-1).double(), other.reshape(-1).double()
    scale = float(one @ other) / max(float(other @ other), 1e-30)
    return scale != 0 and bool(float((one - scale * other).abs().max()) <= 2e-4 * float(one.abs().max()))
