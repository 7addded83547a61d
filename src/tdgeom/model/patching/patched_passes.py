"""Passes in which each row takes one place of one site from the other run, many places in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from tdgeom.core.devices import doubled
from tdgeom.model.calls.bound_model import eval_mode, modules_within
from tdgeom.model.edits.edit import Edit
from tdgeom.model.edits.edit_call import EditCall
from tdgeom.model.intervene import Intervene
from tdgeom.model.patching.early_start import EarlyStart
from tdgeom.model.patching.paired_runs import Paired, PairedRuns
from tdgeom.model.patching.patching_metrics import Measured
from tdgeom.model.structure.resolved_site import ResolvedSite


@dataclass(frozen=True)
class Cells:
    """The cells of one site: ``masks`` (C, B, T), the positions that each takes, of all axes behind or of one unit each.

    ``units`` (C,) are heads (``axis`` 2, counted as the site holds them) or features (``axis`` -1), whose masks are the same;
    ``None`` for all. ``keep``,
    broadcast over what lies behind (B, T), is true at what of a position is patched at all.
    """

    masks: Tensor
    units: Tensor | None = None
    axis: int = 2
    keep: Tensor | None = None

    def __len__(self) -> int:
        return len(self.masks)

    def there(self, paired: Paired) -> Tensor:
        """(C, B), whether an example has any of a cell's positions in both runs."""
        return (self.masks & paired.present).any(-1)

    def changes(self, paired: Paired) -> Tensor:
        """(C, B), whether the other run holds anything else at a cell."""
        return self.sums(paired.differs().float()) > 0

    def sums(self, values: Tensor) -> Tensor:
        """The sum over each cell of values that lie as the site's (B, T, ...): (C, B)."""
        values = values if self.keep is None else values * self.keep
        if self.units is None:
            flat = values.flatten(2).sum(-1) if values.ndim > 2 else values
            return torch.stack([(flat * own).sum(-1) for own in self.masks])
        shared = values.movedim(self.axis % values.ndim, 2)
        flat = shared.flatten(3).sum(-1) if values.ndim > 3 else shared  # (B, T, U)
        return torch.einsum("btu,bt->bu", flat, self.masks[0].to(flat)).T[self.units]


class CellEdit(Edit):
    """In each row of the batch the other run's values at one cell; -1 is a row that stays as it is."""

    def __init__(self, paired: Paired, cells: Cells) -> None:
        super().__init__()
        self.paired, self.cells = paired, cells
        self.example = self.cell = torch.zeros(0, dtype=torch.long, device="cpu")

    def replace(self, value: Tensor, call: EditCall) -> Tensor:
        """The other run's value in the rows' cells."""
        whole = value if value.ndim > 2 else value[:, None]
        example, cell = self.example.to(value.device), self.cell.to(value.device)
        source = self.paired.other
        if whole.shape != (len(example), *source.shape[1:]):
            raise ValueError(
                f"activation patching at {call.site!r} expected {(len(example), *source.shape[1:])} in a patched pass, got "
                f"{tuple(whole.shape)}."
            )
        keep = self.cells.masks[cell.clamp(min=0), example] & self.paired.present[example]
        keep = (keep & (cell >= 0)[:, None]).reshape(*keep.shape, *[1] * (whole.ndim - 2))
        if self.cells.units is not None:
            axis = self.cells.axis % whole.ndim
            count = whole.shape[axis]
            own = self.cells.units[cell.clamp(min=0)][:, None] == torch.arange(count, device=value.device)
            shape = [1] * whole.ndim
            shape[0], shape[axis] = len(example), count
            keep = keep & own.reshape(shape)
        if self.cells.keep is not None:
            keep = keep & self.cells.keep
        new = torch.where(keep, source[example], whole)
        return new if value.ndim > 2 else new[:, 0]


class PatchedPasses:
    """Runs cells, several a pass, from the block on in which they lie; each of these is seen to change nothing by itself.

    ``measure`` gives the metrics, (n,) each, of what the model gave and the example of each row. One row that is not patched is
    run along where a pass has more rows than the batch, or begins late, the first time of a site: it must give what the run
    gives. Where it does not, passes begin at the beginning; where it still does not, rows act on each other, an error.
    """

    def __init__(
        self, runs: PairedRuns, measure: Callable[[Any, Tensor], list[Tensor]], rows: int = 64
    ) -> None:
        if rows < 1:
            raise ValueError(f"rows= is how many rows a pass has, at least 1, got {rows}.")
        self.runs, self.measure, self.rows = runs, measure, rows
        self.batch = runs.batches[runs.base]
        held = [value for value in self.batch.values() if isinstance(value, Tensor) and value.ndim]
        # else something in the batch has other rows than examples, as images of several sizes have
        self.by_row = all(value.shape[0] in (1, runs.examples) for value in held)
        self.places = runs.places(runs.base)
        self.modules = modules_within(runs.model)
        self.early = EarlyStart(runs.model, runs.examples)
        self.passes = self.blocks_skipped = 0
        with torch.no_grad(), eval_mode(self.modules):
            output = self.early.watch(lambda: runs.capture.call_model(self.batch.copy()))
        known = runs.final[runs.base]
        place = known if isinstance(known, Tensor) else next(self.modules[0].parameters(), self.places)
        everyone = torch.arange(runs.examples, device="cpu" if place is None else place.device)
        self.known = self._shown(known, everyone)
        self._refuse_changed(runs.final_of(output, self.places), everyone, 0, "run once more")

    def run(
        self,
        entry: ResolvedSite,
        paired: Paired,
        cells: Cells,
        wanted: Tensor,
        tell: Callable[[int], None] = lambda count: None,
    ) -> list[Tensor]:
        """The metrics of those cells (C, B) that are ``wanted``, a tensor (C, B) each, NaN elsewhere."""
        examples = self.runs.examples
        if self.by_row and self.rows > examples:
            pairs, step = wanted.nonzero(), self.rows
        else:  # whole batches, one cell after the other
            chosen = wanted.any(1).nonzero().flatten()
            everyone = torch.arange(examples, device=chosen.device)
            pairs = torch.stack([chosen.repeat_interleave(examples), everyone.repeat(len(chosen))], 1)
            step = max(1, self.rows // examples) * examples
        found: list[Tensor] = []
        edit, skipped, seen = CellEdit(paired, cells), self.early.skipped(entry), False
        with Intervene(self.runs.model, {str(entry.site): edit}, missing="raise" if len(pairs) else "ignore"):
            for start in range(0, len(pairs), step):
                cell, example = pairs[start : start + step].unbind(1)
                own, output = len(cell), None
                extra = torch.arange(1 if self.by_row else examples, device=cell.device)
                watched = torch.cat([cell, extra * 0 - 1]), torch.cat([example, extra])
                if skipped and not seen:
                    skipped, output = self._begun_late(edit, *watched, skipped, own)
                if output is None and own > examples and not seen:
                    output = self._pass(edit, *watched, skipped)
                    self._refuse_changed(output, watched[1], own, f"in a pass of {own + len(extra)} rows")
                seen = seen or output is not None
                if output is None:
                    output = self._pass(edit, cell, example, skipped)
                else:
                    example = watched[1]
                values = self.measure(output, _beside(example, output))
                found = found or [
                    torch.full(wanted.shape, torch.nan, dtype=torch.float64, device="cpu") for _ in values
                ]
                at = cell.cpu(), example[:own].cpu()
                for grid, value in zip(found, values):
                    grid[at] = value[:own].double().cpu()
                tell(own)
        return found

    def _begun_late(
        self, edit: CellEdit, cell: Tensor, example: Tensor, skipped: list, start: int
    ) -> tuple[list, Any]:
        """What may be left out, and what a pass without it gives; nothing and ``None`` where later blocks use more of it."""
        try:
            output = self._pass(edit, cell, example, skipped)
        except Exception:
            return [], None  # something that they leave is missing: the whole pass says whether that is all
        return (skipped, output) if self._is_as_before(output, example, start) else ([], None)

    def _pass(self, edit: CellEdit, cell: Tensor, example: Tensor, skipped: list) -> Any:
        edit.cell, edit.example = cell, example
        runs, self.passes = self.runs, self.passes + 1
        self.blocks_skipped += len(skipped)
        late = self.early.begin_behind(skipped, example) if skipped else nullcontext()
        with torch.no_grad(), eval_mode(self.modules), late:
            output = runs.capture.call_model(self.rows_of(example))
        places = None if self.places is None else self.places[example.to(self.places.device)]
        return runs.final_of(output, places)

    def rows_of(self, example: Tensor) -> TensorDict:
        """The batch with a row for each example that is asked for."""
        found: dict[Any, Any] = {}
        for key, value in self.batch.items():
            if not isinstance(value, Tensor):
                continue
            if not value.ndim or (value.shape[0] == 1 and self.runs.examples > 1 and self.by_row):
                found[key] = value
            elif self.by_row:
                found[key] = value[example.to(value.device)]
            else:
                found[key] = value.repeat(len(example) // self.runs.examples, *[1] * (value.ndim - 1))
        return TensorDict(found, batch_size=[])

    # ---------------------------------------------------------------------------------------- what is checked

    def _shown(self, output: Any, example: Tensor) -> list[Tensor]:
        """What a row is compared by: the model's output, where it is a tensor, and the metrics."""
        values = [value.detach() for value in self.measure(output, _beside(example, output))]
        return [output, *values] if isinstance(output, Tensor) else values

    def _is_as_before(self, output: Any, example: Tensor, start: int) -> bool:
        """Whether rows from ``start`` on are those of the run to patch, up to what passes of other shapes round otherwise."""
        for index, (got, known) in enumerate(zip(self._shown(output, example), self.known)):
            mine, theirs = doubled(got[start:]), doubled(known[example[start:].to(known.device)])
            if mine.shape != theirs.shape:
                return False
            eps = torch.finfo(known.dtype).eps if known.is_floating_point() else 0.0
            near = (256 if eps < 1e-4 else 16) * eps
            if index or not isinstance(
                output, Tensor
            ):  # metrics may be of any scale: rows that act on each other show in all digits
                near = max(near, 1e-2)
            if not bool(((mine - theirs).abs() <= near * doubled(known).abs().amax() + 1e-6).all()):
                return False
        return True

    def _refuse_changed(self, output: Any, example: Tensor, start: int, when: str) -> None:
        if not self._is_as_before(output, example, start):
            raise ValueError(
                f"activation patching: the {self.runs.base} run gives something else {when}, with nothing patched: its rows "
                "act on each other (a metric that takes a mean over rows, experts with a capacity), or two passes are never the "
                f"same. Remedy: rows={self.runs.examples}, a metric of each row for itself, or a model without noise."
            )


def _beside(example: Tensor, output: Any) -> Tensor:
    return example.to(output.device) if isinstance(output, Tensor) else example


def measured(measures: Sequence[Measured]) -> Callable[[Any, Tensor], list[Tensor]]:
    """All metrics of the rows of one pass."""
    return lambda output, example: [one.of(output, example) for one in measures]
