"""Activation patching over a grid of sites and positions (or heads), in one call."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from tqdm import tqdm

from tdgeom.core.guessed_names import answer_guesses
from tdgeom.core.warnings import UndefinedMeasureWarning
from tdgeom.model.calls.bound_model import eval_mode
from tdgeom.model.capture import Capture
from tdgeom.model.edits.edit import Edit
from tdgeom.model.edits.edit_call import EditCall
from tdgeom.model.edits.other_runs import Patch
from tdgeom.model.intervene import Intervene
from tdgeom.model.positions import Positions, position_mask, positions_second
from tdgeom.model.sites import HEAD_KINDS, LayerSpec, Site, is_pattern
from tdgeom.numerics.logit_metrics import (
    Ids,
    Metric,
    answer_probability,
    kl_from,
    logit_difference,
    named_metric,
)

__all__ = ["activation_patching", "answer_probability", "kl_from", "logit_difference"]


class _Cells(Edit):
    """In every row of the batch, one position or head of one site of another run; the row says which."""

    def __init__(self, source: TensorDictBase, present: Tensor, by: str) -> None:
        super().__init__()
        self.source, self.present, self.by = source, present, by
        self.example = self.index = torch.zeros(0, dtype=torch.long)

    def set_rows(self, example: Tensor, cells: Sequence[tuple[str, int]], repeat: int) -> None:
        """Say which example and which cell each row of the next call is."""
        self.example = example
        self.names = [name for name, _ in cells for _ in range(repeat)]
        self.index = torch.tensor([i for _, i in cells for _ in range(repeat)], device="cpu")

    def replace(self, value: Tensor, call: EditCall) -> Tensor:
        """The other run's value in the rows whose cell is at this site."""
        here = torch.tensor([name == call.site for name in self.names], device=value.device)
        if not here.any():
            return value
        other = positions_second(self.source["acts", call.site], call.site).to(value)
        example, index = self.example.to(value.device), self.index.to(value.device)
        if self.by == "head":
            count = value.shape[2]
            heads = torch.arange(count, device=value.device)
            chosen = here[:, None] & (heads == index[:, None] // call.groups)
            chosen = chosen.reshape(len(here), 1, count, *[1] * (value.ndim - 3))
            present = self.present.to(value.device)[example]
            if present.shape == value.shape[:2]:  # positions that the other run lacks stay as they are
                chosen = chosen & present.reshape(*present.shape, *[1] * (value.ndim - 2))
        else:
            chosen = here[:, None] & call.attended(value) & (call.rank(value) == index[:, None])
            chosen = chosen.reshape(*chosen.shape, *[1] * (value.ndim - 2))
        return torch.where(chosen, other[example], value)


@answer_guesses
def activation_patching(
    model: nn.Module,
    clean: Mapping[str, Tensor] | TensorDictBase,
    corrupted: Mapping[str, Tensor] | TensorDictBase,
    sites: str | Sequence[str] = "residual_input",
    metric: str | Metric = "logit_diff",
    *,
    answers: Ids | tuple[Ids, Ids] | None = None,
    by: str | None = None,
    positions: Positions = "all",
    layers: LayerSpec = "all",
    direction: str = "denoise",
    rows: int = 64,
    progress: bool = True,
) -> TensorDictBase:
    """What each site and position (or head) carries: one activation at a time is taken from the other run.

    With ``direction="denoise"`` the corrupted run gets one clean activation (how much of the clean answer it restores); with
    ``"noise"`` the clean run gets one corrupted activation (Wang et al. 2023; Zhang & Nanda 2024). Runs are paired example
    by example; positions are matched by their rank among attended tokens.

    Args:
        model: a model with logits.
        clean, corrupted: model inputs of B examples each (a mapping or TensorDict), padded on either side.
        sites, layers: as for :class:`Capture`; several kinds give a grid each.
        metric: ``"logit_diff"`` (``answers=(correct, wrong)``), ``"probability"`` (``answers=correct``), ``"kl"``
            (KL(unpatched other run || patched run)), or a function of logits (n, V) at the last attended position and
            example indices (n,) that gives (n,).
        answers: token ids, one number or one per example (B,), a tensor or list.
        by: ``"position"`` or ``"head"`` (all positions of one query head); default head for ``z``, ``head_output``, ``q``,
            ``k``, ``v`` and patterns, else position.
        positions: which positions to patch one by one (``by="position"``); counted over the longer of the two runs.
        rows: examples x cells in one call of the model.
        progress: show a bar.

    Returns a TensorDict with, for every kind: ``("grid", kind)`` (layers, positions or heads), the metric's mean over
    examples; ``("per_example", kind)`` (layers, positions or heads, B), NaN where an example has no such position;
    ``("recovered", kind)``, (grid - base) / (target - base), 0 where patching does nothing and 1 where it gives the other
    run's metric; ``("layers", kind)``, ``("columns", kind)``, what the axes are; ``"clean"``, ``"corrupted"`` (B,), the
    metric of the two runs.

    In an encoder-decoder, decoder sites are counted over ``decoder_input_ids``, and the logits read at its last position.
    ``recovered`` is NaN, with a warning, where the two runs have the same metric. Raises ``ValueError`` for unequal numbers
    of examples, unknown words and missing answers. In a process group every rank computes all of what it is given.
    """
    if by not in (None, "position", "head"):
        raise ValueError(f"by= expects 'position', 'head' or None, got {by!r}.")
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction= expects 'denoise' or 'noise', got {direction!r}.")
    runs = {"clean": _batch(clean), "corrupted": _batch(corrupted)}
    base, other = ("corrupted", "clean") if direction == "denoise" else ("clean", "corrupted")
    capture = Capture(model, sites, layers=layers, model_outputs="logits", clone=True)
    read = {name: capture(batch.copy()) for name, batch in runs.items()}
    counts = [len(td["logits"]) for td in read.values()]
    if counts[0] != counts[1]:
        raise ValueError(
            f"clean and corrupted are paired example by example, got {counts[0]} and {counts[1]} examples."
        )
    examples = counts[0]
    decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    ends = {name: _mask(td, decodes) for name, td in read.items()}
    final = {name: _last(td["logits"], ends[name]) for name, td in read.items()}
    measure = named_metric(metric, answers, final[other])
    everyone = torch.arange(examples, device=final[base].device)
    result = TensorDict({name: measure(value, everyone) for name, value in final.items()}, batch_size=[])
    bar = tqdm(total=0, disable=not progress, desc="patching")
    for kind in dict.fromkeys(_kind(site) for site in capture.sites):
        own = [site for site in capture.sites if _kind(site) == kind]
        along = by or ("head" if own[0].kind in HEAD_KINDS else "position")
        masks = {name: _mask(td, decodes and "dec" in (own[0].stack or "")) for name, td in read.items()}
        both = torch.minimum(masks["clean"].sum(1), masks["corrupted"].sum(1))
        cells = _heads(capture, own[0]) if along == "head" else _columns(masks[base], positions, own[0])
        aligned = _align(read[other], own, masks[base], masks[other], both)
        todo = [(str(site), cell) for site in own for cell in cells]
        bar.total += len(todo)
        bar.refresh()
        edit = _Cells(aligned, masks[base] & (masks[base].cumsum(1) <= both[:, None]), along)
        per, parts = max(1, rows // examples), [torch.zeros(0, examples, dtype=torch.float64, device="cpu")]
        with Intervene(model, {str(site): edit for site in own}):
            for start in range(0, len(todo), per):
                part = todo[start : start + per]
                parts.append(_patched(capture, runs[base], ends[base], edit, part, measure))
                bar.update(len(part))
        grid = torch.cat(parts).reshape(len(own), len(cells), examples)
        if along == "position":
            absent = torch.tensor(cells, device="cpu")[:, None] >= both.cpu()[None, :]
            grid = grid.masked_fill(absent[None], torch.nan)
        _store(result, kind, grid, own, cells, result[base], result[other])
    bar.close()
    return result


def _patched(
    capture: Capture,
    batch: TensorDictBase,
    mask: Tensor,
    edit: _Cells,
    cells: Sequence[tuple[str, int]],
    measure: Metric,
) -> Tensor:
    """The metric of every cell, (cells, B), from one call on the batch repeated once a cell."""
    examples, times = mask.shape[0], len(cells)
    example = torch.arange(examples, device=mask.device).repeat(times)
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    repeated = TensorDict(
        {k: v.repeat(times, *[1] * (v.ndim - 1)) for k, v in tensors.items()}, batch_size=[]
    )
    edit.set_rows(example, cells, examples)
    with torch.no_grad(), eval_mode(list(capture.model.modules())):
        logits = capture.call_model(repeated)
    return measure(_last(logits, mask.repeat(times, 1)), example).double().reshape(times, examples).cpu()


def _store(
    result: TensorDict,
    kind: str,
    grid: Tensor,
    sites: Sequence[Site],
    cells: Sequence[int],
    base: Tensor,
    goal: Tensor,
) -> None:
    mean = grid.nanmean(-1)
    # examples without the position count neither here nor in what the effect is measured against
    known = ~grid.isnan()
    weight = known / known.sum(-1, keepdim=True).clamp(min=1)
    start, end = ((weight * v.double().cpu()).sum(-1) for v in (base, goal))
    result.set(("per_example", kind), grid)
    result.set(("grid", kind), mean)
    reach = torch.where(end == start, torch.nan, end - start)
    if bool((reach.isnan() & known.any(-1)).any()):
        warnings.warn(
            f"activation_patching: the two runs have the same metric, so 'recovered' of {kind} is undefined (NaN).",
            UndefinedMeasureWarning,
            stacklevel=3,
        )
    result.set(("recovered", kind), (mean - start) / reach)
    result.set(
        ("layers", kind),
        torch.tensor([-1 if site.layer is None else site.layer for site in sites], device="cpu"),
    )
    result.set(("columns", kind), torch.tensor(list(cells), device="cpu"))


def _align(
    source: TensorDictBase, sites: Sequence[Site], mask: Tensor, other_mask: Tensor, both: Tensor
) -> TensorDict:
    """The other run's activations in the columns of the run to patch, by rank; positions it lacks hold zeros."""
    out = TensorDict({}, batch_size=[])
    rank = mask.cumsum(1) - 1
    keep = mask & (rank < both[:, None])
    for site in sites:
        acts = source["acts", site]
        turned = positions_second(acts, site)
        if turned.ndim < 3 or torch.equal(mask, other_mask):
            out.set(("acts", str(site)), acts)
            continue
        run = TensorDict({("acts", str(site)): acts, "attention_mask": other_mask}, batch_size=[])
        patch = Patch(run, align="start")
        features = [*turned.shape[2:]]
        if is_pattern(site):  # as many keys as this run has, and sinks where there are any
            features[1] += mask.shape[1] - other_mask.shape[1]
        blank = turned.new_zeros(mask.shape[0], mask.shape[1], *features)
        moved = patch.replace(blank, EditCall(str(site), mask=mask, keep=keep))
        out.set(("acts", str(site)), positions_second(moved, site))
    return out


def _batch(inputs: Mapping[str, Tensor] | TensorDictBase) -> TensorDictBase:
    if isinstance(inputs, TensorDictBase):
        return inputs.copy().auto_batch_size_(0)
    return TensorDict(dict(inputs), batch_size=[])


def _columns(mask: Tensor, positions: Positions, site: Site) -> list[int]:
    """The positions to patch, counted over the longest sequence."""
    length = int(mask.sum(1).max())
    wanted, _ = position_mask(
        torch.ones(1, length, dtype=torch.bool, device="cpu"), positions, image=site.image
    )
    return wanted[0].nonzero().flatten().tolist()


def _mask(td: TensorDictBase, decoder: bool = False) -> Tensor:
    names = ("attention_mask", "input_ids")
    mask, ids = (td.get(f"decoder_{key}" if decoder else key, None) for key in names)
    logits = td["logits"]
    if mask is not None:
        return mask.bool()
    shape = ids.shape if ids is not None else logits.shape[:2]
    return torch.ones(shape, dtype=torch.bool, device=logits.device)


def _last(logits: Tensor, mask: Tensor) -> Tensor:
    """The logits at the last attended position, (B, T, V) -> (B, V); (B, V) stays."""
    if logits.ndim == 2:
        return logits
    place = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), -1).amax(1)
    return logits[torch.arange(len(logits), device=logits.device), place.to(logits.device)]


def _kind(site: Site) -> str:
    return f"{site.stack}.{site.kind}" if site.stack else str(site) if site.path else site.kind


def _heads(capture: Capture, site: Site) -> list[int]:
    entry = next(e for e in capture.resolved if e.site == site)
    if entry.view is None:
        raise ValueError(f"by='head' needs sites with heads ({', '.join(HEAD_KINDS)}), got {str(site)!r}.")
    return list(range(entry.head_count))
