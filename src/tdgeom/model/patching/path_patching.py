"""Path patching over a grid of senders and receivers, in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from tqdm import tqdm

from tdgeom.core.guessed_names import answer_guesses
from tdgeom.model.calls.bound_model import eval_mode
from tdgeom.model.capture import Capture
from tdgeom.model.intervene import Intervene
from tdgeom.model.lens.answer_tokens import Answers
from tdgeom.model.patching.activation_patching import open_runs
from tdgeom.model.patching.frozen_parts import FrozenParts, Held
from tdgeom.model.patching.paired_runs import kinds_of
from tdgeom.model.patching.patched_grid import Grid, grid_cells, two_ends, write_axes, write_grid
from tdgeom.model.patching.patched_passes import CellEdit, PatchedPasses
from tdgeom.model.patching.patching_metrics import Metrics
from tdgeom.model.positions import Positions, positions_second
from tdgeom.model.sites import HEAD_KINDS, LayerSpec, Site

__all__ = ["path_patching"]

Receivers = str | Sequence[str] | Mapping[str, int | Sequence[int] | None]
LOGITS = "logits"


@answer_guesses
def path_patching(
    model: nn.Module,
    clean: Mapping[str, Tensor] | TensorDictBase | str | Sequence[str],
    corrupted: Mapping[str, Tensor] | TensorDictBase | str | Sequence[str],
    senders: str | Sequence[str] = "z",
    receivers: Receivers = LOGITS,
    metric: Metrics = "logit_diff",
    *,
    answers: Answers | None = None,
    through: str = "residual",
    together: bool = False,
    positions: Positions = "all",
    layers: LayerSpec = "all",
    heads: Sequence[int] | None = None,
    direction: str = "noise",
    align: str | Mapping[int, int] | None = None,
    tokenizer: Any = None,
    per_text: bool | None = None,
    output: str = LOGITS,
    logits_at: Positions = "last",
    rows: int = 64,
    progress: bool = True,
) -> TensorDictBase:
    """What each sender tells each receiver: one sender's activation is taken from the other run, for one receiver only.

    A sender (a head, an attention, an MLP) reaches a receiver (a head's query, key or value, an MLP's input, the logits) along
    the direct path through the residual stream, every other part held at what it gave in the run that is patched; then the run is
    made with what the receiver would hold (:class:`PathPatch`; Wang et al. 2023; Goldowsky-Dill et al. 2023).

    Args:
        model, clean, corrupted, metric, answers, align, tokenizer, per_text, logits_at, rows, progress: as for
            :func:`activation_patching`.
        senders: kinds or sites, as for :class:`Capture`: ``"z"`` and ``"cross_z"``, each head a column; ``"attn_output"``,
            ``"mlp_output"``, ``"mlp_act"``, ``"embed"``, each layer one.
        receivers: ``"logits"``; kinds or sites, each site a receiver (``"mlp_input.3"``, ``"q"``: of every layer); or a mapping,
            site to heads, each head a receiver: ``{"k.1": [0, 3]}`` (where queries share keys, of its group).
        through: ``"residual"``, the direct path; ``"mlp"`` lets MLPs in between compute anew.
        together: all receivers are patched in one run, as one.
        positions, layers, heads: of the senders.
        direction: ``"noise"``, the clean run gets a corrupted sender (default); ``"denoise"``, the other way round.
        output: what functions in ``metric`` are given: ``"logits"``, or another output of the model by name.

    Returns a TensorDict as :func:`activation_patching`, a grid for each kind of sender and each receiver, called
    ``"z->k.1[0]"``: ``("grid", "z->k.1[0]")`` (layers, columns), ``("recovered", ...)``, 0 where nothing is sent and 1 where the
    path gives the other run's metric, ``("per_example", ...)``, ``("layers", ...)``, ``("columns", ...)``, ``("changed", ...)``
    (whether the receiver is reached by a change); NaN where there is no path (a sender behind its receiver); ``"clean"``,
    ``"corrupted"`` (B,).

    Raises ``ValueError`` as :func:`activation_patching` and :class:`PathPatch` do. A pass for each sender and one for each
    receiver that it reaches, several cells a pass.

    >>> import transformers
    >>> config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    >>> model = transformers.GPT2LMHeadModel(config).eval()
    >>> clean, other = ({"input_ids": torch.tensor([ids])} for ids in ([3, 4, 5], [3, 6, 5]))
    >>> found = path_patching(model, clean, other, receivers={"k.1": [0]}, answers=(7, 8), progress=False)
    >>> found["grid", "z->k.1[0]"].shape
    torch.Size([2, 2])
    """
    if not isinstance(output, str):
        raise ValueError(f"path_patching: output= names an output of the model, got {output!r}.")
    passes, measures = open_runs(
        model, clean, corrupted, senders, metric, answers, layers=layers, direction=direction, align=align, tokenizer=tokenizer,
        per_text=per_text, output=output, logits_at=logits_at, rows=rows,
    )  # fmt: skip
    runs = passes.runs
    named = _receivers(model, receivers, together)
    sites = [site for receiver in named for site in receiver.places]
    frozen = FrozenParts(
        model,
        runs.batches[runs.base],
        list(map(str, runs.capture.sites)),
        sites,
        through=through,
        model_outputs=output,
    )
    grids = [
        grid_cells(runs, kind, own, "head" if own[0].kind in HEAD_KINDS else "layer", positions, heads, None)
        for kind, own in kinds_of(runs.capture.sites).items()
    ]
    result = TensorDict({}, batch_size=[])
    ends = two_ends(result, runs, measures)
    alike = all(torch.equal(*pair) for pair in zip(ends["clean"], ends["corrupted"]))
    paths = _Paths(passes, frozen, grids, named, len(measures))
    with tqdm(disable=not progress, desc="path patching", total=len(paths.cells) * runs.examples) as bar:
        paths.run(bar.update)
    for index, grid in enumerate(grids):
        for which, receiver in enumerate(named):
            values, changed = paths.found(index, which, ends[runs.base])
            own = dataclasses.replace(grid, kind=f"{grid.kind}->{receiver.name}", changed=list(changed))
            for measure, value, goal, base in zip(measures, values, ends[runs.other], ends[runs.base]):
                write_grid(result, own, measure, value, goal, base)
            write_axes(result, own, alike=alike or not bool(paths.reached[index, which].any()))
    return result


@dataclass(frozen=True)
class _Receiver:
    """What is patched in one run: sites with their heads; nothing of the run where it is the logits."""

    name: str
    places: Mapping[str, list[int] | None]


def _receivers(model: nn.Module, receivers: Receivers, together: bool) -> list[_Receiver]:
    listed: list[_Receiver] = []
    given = [receivers] if isinstance(receivers, str) else receivers
    if isinstance(given, Mapping):
        for name, heads in given.items():
            for site in _sites(model, name):
                each = [heads] if isinstance(heads, int) else heads
                listed += [_Receiver(f"{site}[{head}]", {site: [head]}) for head in each or ()]
                listed += [_Receiver(site, {site: None})] if each is None else []
    else:
        for name in given:
            one = [_Receiver(LOGITS, {})] if name == LOGITS else []
            listed += one or [_Receiver(site, {site: None}) for site in _sites(model, name)]
    if not listed:
        raise ValueError(
            f"path_patching: receivers= names none, got {receivers!r}. Remedy: 'logits', 'q.5' or {{'q.5': [3]}}."
        )
    names = [receiver.name for receiver in listed]
    if len(set(names)) < len(names):
        raise ValueError(f"path_patching: receivers= names one twice: {names}.")
    if not together or len(listed) == 1:
        return listed
    if LOGITS in names:
        raise ValueError(
            "path_patching(together=True) patches receivers inside the model; the logits are what the path itself gives. Remedy: "
            "a call of its own for them."
        )
    places: dict[str, list[int] | None] = {}
    for receiver in listed:
        for site, heads in receiver.places.items():
            held = places.get(site, [])
            places[site] = None if heads is None or held is None else [*held, *heads]
    return [_Receiver("+".join(names), places)]


def _sites(model: nn.Module, name: str) -> list[str]:
    return [str(site) for site in Capture(model, name).sites]


class _Paths:
    """Every cell, a sender and an example, with what the metrics are at each receiver that it reaches."""

    def __init__(
        self,
        passes: PatchedPasses,
        frozen: FrozenParts,
        grids: Sequence[Grid],
        receivers: Sequence[_Receiver],
        measures: int,
    ) -> None:
        self.passes, self.frozen, self.grids, self.receivers = passes, frozen, grids, receivers
        self.edits: dict[Site, CellEdit] = {}
        self.cells: list[tuple[int, int, int]] = []  # grid, entry and column of each
        self.sent: dict[tuple[int, int], Tensor] = {}  # (C, B), whether there is anything to send
        self.within: dict[
            tuple[Site, Site], bool
        ] = {}  # whether a part of a block reaches another of the same
        self.values: dict[tuple[int, int], Tensor] = {}
        self.reached: dict[tuple[int, int], Tensor] = {}
        examples = passes.runs.examples
        for index, grid in enumerate(grids):
            for place, (entry, cells) in enumerate(zip(grid.entries, grid.cells)):
                paired = grid.pair(entry)
                self.edits[entry.site] = CellEdit(paired, cells)
                self.sent[index, place] = (cells.there(paired) & cells.changes(paired)).cpu()
                self.cells += [(index, place, column) for column in range(len(cells))]
            shape = (len(grid.entries), len(grid.labels), examples)
            for which in range(len(receivers)):
                self.values[index, which] = torch.full(
                    (measures, *shape), torch.nan, dtype=torch.float64, device="cpu"
                )
                self.reached[index, which] = torch.zeros(shape, dtype=torch.bool, device="cpu")

    def run(self, tell: Any) -> None:
        examples = self.passes.runs.examples
        wanted = [
            (cell, example)
            for cell, (grid, place, column) in enumerate(self.cells)
            for example in range(examples)
            if not self.passes.by_row or bool(self.sent[grid, place][column, example])
        ]
        tell(len(self.cells) * examples - len(wanted))
        step = self.passes.rows
        if not self.passes.by_row:  # whole batches, one sender after the other
            step = max(1, step // examples) * examples
        for start in range(0, len(wanted), step):
            part = torch.tensor(wanted[start : start + step], device="cpu")
            self._pass(part[:, 0], part[:, 1])
            tell(len(part))

    def _pass(self, cell: Tensor, example: Tensor) -> None:
        where = torch.tensor([self.cells[c] for c in cell.tolist()], device="cpu")
        free: dict[Site, Tensor] = {}
        for index, grid in enumerate(self.grids):
            for place, entry in enumerate(grid.entries):
                here, edit = (where[:, 0] == index) & (where[:, 1] == place), self.edits[entry.site]
                edit.example, edit.cell = example, torch.where(here, where[:, 2], -1)
                free[entry.site] = here
        sent = {str(site): [edit] for site, edit in self.edits.items()}
        inputs = self.passes.rows_of(example)
        td = self.frozen.run(sent, inputs, example, free)
        for which, receiver in enumerate(self.receivers):
            if not receiver.places:
                moved = torch.ones(len(cell), dtype=torch.bool, device="cpu")
                self._note(which, where, example, self._measured(td, example), moved)
                continue
            ways = [self._reaches(index, place, receiver) for index, place, _ in where.tolist()]
            moved = torch.tensor(ways, dtype=torch.bool, device="cpu")
            chosen = (
                moved.nonzero().flatten() if self.passes.by_row else torch.arange(len(cell), device="cpu")
            )
            if not bool(moved.any()):
                continue
            edits = {
                site: Held(
                    positions_second(td["acts", site], site)[chosen.to(td["acts", site].device)], heads=heads
                )
                for site, heads in receiver.places.items()
            }
            runs = self.passes.runs
            with (
                Intervene(runs.model, edits, missing="raise"),
                torch.no_grad(),
                eval_mode(self.passes.modules),
            ):
                output = runs.capture.call_model(self.passes.rows_of(example[chosen]))
            values = self._measured(output, example[chosen])
            self._note(which, where[chosen], example[chosen], values, moved[chosen])

    def _measured(self, output: Any, example: Tensor) -> list[Tensor]:
        runs, places = self.passes.runs, self.passes.places
        own = None if places is None else places[example.to(places.device)]
        if isinstance(output, TensorDictBase):
            value: Any = output[runs.output]
            value = runs.at_place(value, own) if runs.output == LOGITS else value
        else:
            value = runs.final_of(output, own)
        return self.passes.measure(value, example.to(value.device))

    def _note(
        self, which: int, where: Tensor, example: Tensor, values: Sequence[Tensor], moved: Tensor
    ) -> None:
        for index in range(len(self.grids)):
            own = (where[:, 0] == index) & moved
            at = where[own, 1], where[own, 2], example[own]
            self.reached[index, which][at] = True
            for grid, value in zip(self.values[index, which], values):
                grid[at] = value.double().cpu()[own]

    def _reaches(self, index: int, place: int, receiver: _Receiver) -> bool:
        """Whether a sender comes before a receiver."""
        sender = self.grids[index].entries[place].site
        return not receiver.places or any(self._comes_before(sender, Site.parse(s)) for s in receiver.places)

    def _comes_before(self, sender: Site, receiver: Site) -> bool:
        if sender.stack != receiver.stack or sender.layer is None or receiver.layer is None:
            return True
        if sender.layer != receiver.layer:
            return sender.layer < receiver.layer
        if (
            sender,
            receiver,
        ) not in self.within:  # attention and MLP may lie side by side: seen in the same rows
            paired = self.edits[sender].paired
            there = paired.present.reshape(*paired.present.shape, *[1] * (paired.own.ndim - 2))
            td = self.frozen.run({str(sender): [Held(torch.where(there, paired.other, paired.own))]})
            self.within[sender, receiver] = bool(self.frozen.changed(td, receiver).any())
        return self.within[sender, receiver]

    def found(self, index: int, which: int, base: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The metrics (M, layers, C, B) of a kind of sender at a receiver, and where a change arrives; NaN without a path."""
        reached, grid = self.reached[index, which], self.grids[index]
        unpatched = torch.stack([one.detach().double().cpu() for one in base])[:, None, None]
        values = self.values[index, which]
        values = torch.where(reached, values, unpatched.expand(values.shape))
        for place, entry in enumerate(grid.entries):
            there = grid.cells[place].there(grid.pair(entry)).cpu()
            path = self._reaches(index, place, self.receivers[which])
            values[:, place] = values[:, place].masked_fill(~there | (not path), torch.nan)
        return values, reached
