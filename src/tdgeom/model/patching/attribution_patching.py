"""Attribution patching: a grid of patches estimated from one gradient, and how far off it is on a sample of cells."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from tdgeom.core.devices import doubled
from tdgeom.core.guessed_names import answer_guesses
from tdgeom.model.capture import Capture
from tdgeom.model.intervene import Intervene
from tdgeom.model.lens.answer_tokens import Answers
from tdgeom.model.patching.activation_patching import open_runs
from tdgeom.model.patching.paired_runs import PairedRuns, kinds_of
from tdgeom.model.patching.patched_grid import Grid, grid_cells, two_ends, write_axes, write_grid
from tdgeom.model.patching.patched_passes import PatchedPasses
from tdgeom.model.patching.patching_metrics import Measured, Metrics
from tdgeom.model.positions import Positions, positions_second
from tdgeom.model.sites import LayerSpec, Site

__all__ = ["attribution_patching"]

FAR = 0.9  # a correlation below which the estimate is said to be one


@answer_guesses
@torch.inference_mode(False)
def attribution_patching(
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
    steps: int = 1,
    sample_size: int = 32,
    seed: int = 0,
) -> TensorDictBase:
    """The grid of :func:`activation_patching`, estimated from one gradient: Σ ∂metric/∂x · (other - own) (Nanda 2023).

    The estimate is of first order: exact where the metric is linear in what is patched, and blind to what saturates (a metric
    that is largest in the run to patch has no gradient there). With ``steps`` above 1 the gradient is the mean of those many,
    between the two runs' embeddings (Hanna et al. 2024, "EAP-IG"). Passes: two forward, and ``steps`` forward and backward for
    each metric, however many cells there are; then ``sample_size`` cells, drawn with ``seed`` among those at which the two runs
    differ, are patched, and the error of the estimate on them is given beside it.

    Args:
        model, clean, corrupted, sites, metric, answers, by, positions, layers, heads, features, direction, align, tokenizer,
            per_text, output, logits_at, rows: as for :func:`activation_patching`; functions in ``metric`` have a gradient.
        steps: at how many points between the runs the gradient is taken; 1 is the run to patch itself.
        sample_size: how many cells of a kind are patched to see the error, at least 2.
        seed: of the cells that are drawn.

    Returns what :func:`activation_patching` returns, ``("grid", kind)``, ``("per_example", kind)``, ``("recovered", kind)``
    estimated; and ``("exact", kind)`` (layers, columns), the metric where it was patched, NaN elsewhere; ``("error", kind,
    "correlation" | "mean" | "largest" | "cells")``: the correlation of estimated and exact effects on those cells (NaN where
    all effects are one), the mean and the largest difference of the two, how many cells there were.

    Says in a warning where the correlation is below 0.9. Raises as :func:`activation_patching` does, and ``ValueError`` for
    metrics without a gradient.

    >>> import transformers
    >>> config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    >>> model, ids = transformers.GPT2LMHeadModel(config).eval(), torch.tensor([[3, 4, 5, 6]])
    >>> clean, corrupted = {"input_ids": ids}, {"input_ids": ids.flip(1)}
    >>> found = attribution_patching(model, clean, corrupted, "mlp_output", answers=(7, 8), sample_size=4)
    >>> found["grid", "mlp_output"].shape, bool(found["error", "mlp_output", "correlation"] > 0.9)
    (torch.Size([2, 4]), True)
    """
    if sample_size < 2:
        raise ValueError(
            f"sample_size= is how many cells are patched to see the error, at least 2, got {sample_size}."
        )
    if steps < 1:
        raise ValueError(f"steps= is at how many points the gradient is taken, at least 1, got {steps}.")
    passes, measures = open_runs(
        model, clean, corrupted, sites, metric, answers, layers=layers, direction=direction, align=align, tokenizer=tokenizer,
        per_text=per_text, output=output, logits_at=logits_at, rows=rows,
    )  # fmt: skip
    runs = passes.runs
    result = TensorDict({}, batch_size=[])
    ends = two_ends(result, runs, measures)
    alike = all(torch.equal(*pair) for pair in zip(ends["clean"], ends["corrupted"]))
    slopes = [_gradients(runs, measure, steps) for measure in measures]
    for kind, own in kinds_of(runs.capture.sites).items():
        grid = grid_cells(runs, kind, own, by, positions, heads, features)
        effects = _effects(grid, slopes)
        wanted = _drawn(torch.stack(grid.changed).any(-1), sample_size, seed)
        exact = _exact(passes, grid, wanted)
        for index, measure in enumerate(measures):
            base = ends[runs.base][index].detach().double().cpu()
            write_grid(result, grid, measure, base + effects[index], ends[runs.other][index], base)
            _write_error(result, grid, measure, effects[index], exact[index], base, wanted)
        write_axes(result, grid, alike=alike)
    return result


def _gradients(runs: PairedRuns, measure: Measured, steps: int) -> Mapping[Site, Tensor]:
    """The gradient of each example's metric at every site of the run to patch, or its mean on the way to the other run."""
    places = runs.places(runs.base)

    def target(output: Any) -> Tensor:
        value = runs.final_of(output, places)
        home = value.device if isinstance(value, Tensor) else runs.device
        each = measure.of(value, torch.arange(runs.examples, device=home))
        if not each.requires_grad:
            raise ValueError(
                f"attribution_patching: the metric {measure.leaf or ''} has no gradient. Remedy: a smooth one (no argmax), "
                "without detach(), or activation_patching."
            )
        return each.sum()

    entries = runs.capture.resolved
    sites = [str(entry.site) for entry in entries if entry.site in runs.capture.sites]
    backward = Capture(runs.model, sites, direction="backward", target=target, clone=True)
    total: dict[Site, Tensor] = {}
    way = _Between(runs) if steps > 1 else None
    for step in range(steps):
        between = nullcontext() if way is None else way.at((step + 0.5) / steps)
        with between:
            found = backward(runs.batches[runs.base].copy())["grads"]
        for site in runs.capture.sites:
            slope = positions_second(found[site], site) / steps
            total[site] = total[site] + slope if site in total else slope
    return total


class _Between:
    """The embeddings of the run to patch, moved towards those of the other one."""

    def __init__(self, runs: PairedRuns) -> None:
        self.model = runs.model
        batches = runs.batches["clean"], runs.batches["corrupted"]
        ends = PairedRuns(
            runs.model, *batches, "embed", align=runs.align, direction=runs.direction, output=runs.output
        )
        pairs = {entry.site: ends.pair(entry, "all") for entry in ends.capture.resolved}
        self.steps = {
            site: (pair.other - pair.own) * pair.present.unsqueeze(-1) for site, pair in pairs.items()
        }

    def at(self, share: float) -> Intervene:
        """A context in which the embeddings are this share of the way."""
        edits = {str(site): partial(_moved, step=share * step) for site, step in self.steps.items()}
        return Intervene(self.model, edits)


def _moved(value: Tensor, step: Tensor) -> Tensor:
    return value + step.to(value)


def _effects(grid: Grid, slopes: Sequence[Mapping[Site, Tensor]]) -> list[Tensor]:
    """The estimated effect of each cell, (layers, C, B) for each metric; NaN where an example has no such cell."""
    found: list[list[Tensor]] = [[] for _ in slopes]
    for entry, cells in zip(grid.entries, grid.cells):
        paired = grid.pair(entry)
        there = cells.there(paired)
        grid.changed.append((there & cells.changes(paired)).cpu())
        step = doubled(paired.other) - doubled(paired.own)
        step = step * paired.present.reshape(*paired.present.shape, *[1] * (step.ndim - 2))
        for effects, slope in zip(found, slopes):
            gradient = slope[entry.site].reshape(step.shape)
            value = cells.sums(doubled(gradient).to(step.device) * step)
            effects.append(value.masked_fill(~there, torch.nan).cpu())
    return [torch.stack(effects).double() for effects in found]


def _drawn(changed: Tensor, sample_size: int, seed: int) -> Tensor:
    """Which cells (layers, C) are patched: some of those at which anything changes."""
    places = changed.flatten().nonzero().flatten()
    generator = torch.Generator(device="cpu").manual_seed(seed)
    order = torch.randperm(len(places), generator=generator, device="cpu")
    drawn = torch.zeros(changed.numel(), dtype=torch.bool, device="cpu")
    drawn[places[order[:sample_size]]] = True
    return drawn.reshape(changed.shape)


def _exact(passes: PatchedPasses, grid: Grid, wanted: Tensor) -> list[Tensor]:
    """The metrics of the cells that are patched, (layers, C, B) each, NaN elsewhere."""
    count, shape = len(passes.known), (*wanted.shape, passes.runs.examples)
    count -= isinstance(passes.runs.final[passes.runs.base], Tensor)
    found = [torch.full(shape, torch.nan, dtype=torch.float64, device="cpu") for _ in range(count)]
    for layer, (entry, cells) in enumerate(zip(grid.entries, grid.cells)):
        paired = grid.pair(entry)
        chosen = wanted[layer][:, None].to(paired.own.device) & cells.there(paired)
        for values, own in zip(found, passes.run(entry, paired, cells, chosen)):
            values[layer] = own
    return found


def _write_error(
    result: TensorDict,
    grid: Grid,
    measure: Measured,
    effects: Tensor,
    exact: Tensor,
    base: Tensor,
    wanted: Tensor,
) -> None:
    estimated, patched = effects.nanmean(-1)[wanted], (exact - base).nanmean(-1)[wanted]
    result.set(measure.under("exact", grid.kind), exact.nanmean(-1))
    off = (estimated - patched).abs()
    pair = torch.stack([estimated, patched])
    spread = pair.std(-1) if len(off) > 1 else torch.zeros(2, dtype=torch.float64, device="cpu")
    resolved = bool((spread > 1e-9 * pair.abs().amax().clamp(min=1e-30)).all()) if len(off) else False
    correlation = float(torch.corrcoef(pair)[0, 1]) if resolved else float("nan")
    numbers = {
        "correlation": correlation,
        "mean": float(off.mean()) if len(off) else float("nan"),
        "largest": float(off.max()) if len(off) else float("nan"),
        "cells": len(off),
    }
    root = measure.under("error", grid.kind)
    for name, value in numbers.items():
        dtype = torch.int64 if name == "cells" else torch.float64
        result.set((*root, name), torch.tensor(value, dtype=dtype, device="cpu"))
    # no correlation where all estimates are one (a metric that is largest in the run to patch has no gradient)
    flat = not resolved and len(off) > 0 and float(off.max()) > 0.1 * float(patched.abs().max())
    if correlation < FAR or flat:
        which = "" if measure.leaf is None else f", {measure.leaf}"
        warnings.warn(
            f"attribution_patching of {grid.kind}{which}: on the {len(off)} cells that were patched too, the estimate correlates "
            f"{correlation:.2f} with the exact effect, and is off by {numbers['largest']:.3g} where effects reach "
            f"{float(patched.abs().max()):.3g}. Remedy: steps= (the mean of several gradients), or activation_patching.",
            UserWarning,
            stacklevel=3,
        )
