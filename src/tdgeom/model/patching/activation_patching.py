"""Activation patching over a grid of sites and positions, heads or neurons, in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from tqdm import tqdm

from tdgeom.core.guessed_names import answer_guesses
from tdgeom.core.process_groups import tell_not_shared
from tdgeom.model.calls.inputs_of_text import inputs_of_text
from tdgeom.model.lens.answer_tokens import Answers
from tdgeom.model.patching.paired_runs import PairedRuns, kinds_of
from tdgeom.model.patching.patched_grid import fill, grid_cells, two_ends, write_axes, write_grid
from tdgeom.model.patching.patched_passes import PatchedPasses, measured
from tdgeom.model.patching.patching_metrics import Measured, Metrics, read_metrics
from tdgeom.model.positions import Positions
from tdgeom.model.sites import LayerSpec

__all__ = ["activation_patching"]


@answer_guesses
def activation_patching(
    model: nn.Module,
    clean: Mapping[str, Tensor] | TensorDictBase | str | Sequence[str],
    corrupted: Mapping[str, Tensor] | TensorDictBase | str | Sequence[str],
    sites: str | Sequence[str] = "residual_input",
    metric: Metrics = "logit_diff",
    *,
    answers: Answers | None = None,
    by: str | None = None,
    positions: Positions | Sequence[Positions] | Mapping[str, Positions] = "all",
    layers: LayerSpec = "all",
    heads: Sequence[int] | None = None,
    features: Sequence[int] | None = None,
    direction: str = "denoise",
    align: str | Mapping[int, int] | None = None,
    tokenizer: Any = None,
    per_text: bool | None = None,
    output: str | None = "logits",
    logits_at: Positions = "last",
    rows: int = 64,
    progress: bool = True,
) -> TensorDictBase:
    """What each site and position (or head, or neuron) carries: one activation at a time is taken from the other run.

    With ``direction="denoise"`` the corrupted run gets one clean activation (how much of the clean answer it restores); with
    ``"noise"`` the clean run gets one corrupted activation (Wang et al. 2023; Zhang & Nanda 2024). Runs are paired example
    by example; positions are matched by their rank among attended tokens.

    Args:
        model: a model with logits, or with another ``output`` to measure.
        clean, corrupted: model inputs of B examples each (a mapping or TensorDict), padded on either side; with a ``tokenizer``
            texts.
        sites, layers: as for :class:`Capture`; several kinds give a grid each.
        metric: ``"logit_diff"`` (``answers=(correct, wrong)``), ``"logit"``, ``"probability"``, ``"kl"``
            (KL(unpatched other run || patched run)), or a function of logits (n, V), or of these and example indices (n,),
            that gives (n,): each row for itself. A mapping or list of several is measured in the same passes.
        answers: as for :func:`logit_attribution`: a token's id, a word (with ``tokenizer``), or a tuple of two, the first less
            the second, each one token or one for each example; a list of several answers; a tensor (B,), one for each example.
        by: ``"position"``; ``"head"``, one query head; ``"neuron"``, one feature; ``"layer"``, all of a site: the last three at
            all ``positions`` together. Default head for ``z``, ``head_output``, ``q``, ``k``, ``v`` and patterns, else position.
        positions: which positions, in the vocabulary of :mod:`tdgeom.model.positions` or a key of the batch, counted over, and
            token ids looked for in, the run that is patched: a column for each. A list or mapping of several (``{"name":
            Between(...), "end": "last"}``) has a column for each group, patched together. A vision tower counts its own.
        heads, features: which of them are patched; default all.
        direction: which run is patched.
        align: where the two texts of a pair differ in length: ``"start"``, ``"end"`` or a mapping of positions, as for
            :class:`Patch`.
        tokenizer: for answers and inputs of text.
        per_text: True, a list in ``answers`` holds one for each example; False, all of them are asked of every one.
        output: what functions in ``metric`` are given: ``"logits"`` at ``logits_at``, another output of the model by name
            (``"last_hidden_state"``), or ``None``, what the model gives.
        logits_at: at which position of each example logits are read.
        rows: examples x cells in one pass of the model; as many as there are examples, or fewer, is one cell a pass.
        progress: show a bar.

    Returns a TensorDict with, for every kind: ``("grid", kind)`` (layers, columns), the metric's mean over examples;
    ``("per_example", kind)`` (layers, columns, B), NaN where an example has no such position; ``("recovered", kind)``,
    (grid - base) / (target - base), 0 where patching does nothing and 1 where it gives the other run's metric;
    ``("layers", kind)``, ``("columns", kind)``, what the axes are; ``("positions", kind)`` (columns, B), each example's
    positions, -1 where it has none or several; ``("changed", kind)`` (layers, columns, B), whether the other run holds anything
    else there; ``"clean"``, ``"corrupted"`` (B,), the metric of the two runs. Several metrics, or answers, are a further part of
    the key: ``("grid", kind, "kl")``, ``("clean", "kl")``.

    **Cost.** Cells share passes; a pass begins at the block that is patched, with what the blocks before it gave in the run to
    patch; cells at which both runs hold the same are not run. An unpatched row in each first pass of a site must give what it
    gave: where it does not, passes begin at the beginning, and where it still does not, it is an error.

    In an encoder-decoder, decoder sites are counted over ``decoder_input_ids``, and the logits read at its last position.
    ``recovered`` is NaN, with a warning, where the two runs have the same metric; a kind at whose sites both runs hold the same
    is said. Raises ``ValueError`` for unequal numbers of examples, unequal lengths without ``align``, positions that no example
    has, unknown words and answers that are missing or not used. In a process group every rank computes (and says that it does)
    all of what it is given.
    """
    tell_not_shared(
        "activation_patching",
        "Give each rank pairs or layers= of its own, or call it in one process. A model whose parts lie on several ranks needs "
        "the same call on all of them.",
    )
    passes, measures = open_runs(
        model, clean, corrupted, sites, metric, answers, layers=layers, direction=direction, align=align, tokenizer=tokenizer,
        per_text=per_text, output=output, logits_at=logits_at, rows=rows,
    )  # fmt: skip
    runs = passes.runs
    result = TensorDict({}, batch_size=[])
    ends = two_ends(result, runs, measures)
    alike = all(torch.equal(*pair) for pair in zip(ends["clean"], ends["corrupted"]))
    grids = [
        grid_cells(runs, kind, own, by, positions, heads, features)
        for kind, own in kinds_of(runs.capture.sites).items()
    ]
    with tqdm(disable=not progress, desc="patching", total=sum(grid.examples for grid in grids)) as bar:
        for grid in grids:
            found: list[list[Tensor]] = []
            for entry, cells in zip(grid.entries, grid.cells):
                paired = grid.pair(entry)
                there, changes = cells.there(paired), cells.changes(paired)
                ran = passes.run(entry, paired, cells, there & changes, bar.update)
                found.append(fill(ran, there, changes, ends[runs.base]))
                bar.update(int((~(there & changes)).sum()))
                grid.changed.append((there & changes).cpu())
            for index, measure in enumerate(measures):
                values = torch.stack([row[index] for row in found])
                write_grid(result, grid, measure, values, ends[runs.other][index], ends[runs.base][index])
            write_axes(result, grid, alike=alike)
    return result


def open_runs(
    model: nn.Module,
    clean: Any,
    corrupted: Any,
    sites: Any,
    metric: Metrics,
    answers: Answers | None,
    *,
    layers: LayerSpec,
    direction: str,
    align: Any,
    tokenizer: Any,
    per_text: bool | None,
    output: str | None,
    logits_at: Positions,
    rows: int,
) -> tuple[PatchedPasses, list[Measured]]:
    """Both runs read, and what is to be measured of them."""
    given = [inputs_of_text(model, one, tokenizer, "activation_patching") for one in (clean, corrupted)]
    runs = PairedRuns(
        model, given[0], given[1], sites,
        layers=layers, direction=direction, align=align, output=output, logits_at=logits_at,
    )  # fmt: skip
    measures = read_metrics(
        metric, answers, runs.examples, tokenizer=tokenizer, per_text=per_text, reference=runs.final[runs.other], output=output
    )  # fmt: skip
    return PatchedPasses(runs, measured(measures), rows), measures
