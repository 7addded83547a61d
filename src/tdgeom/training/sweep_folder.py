"""A sweep's folder: what of it is done, each part whole or absent, under the settings that it was begun with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tdgeom.analysis.results import AnalysisResults
from tdgeom.core.stage_settings import differences
from tdgeom.files.atomic import is_taken, write_whole
from tdgeom.files.json_text import plain, read_json_file
from tdgeom.training.compared_steps import Held, read_held, write_held

__all__ = ["SweepFolder"]

Between = dict[str, dict[str, float]]


class SweepFolder:
    """``settings.json``, a bundle a step, a file for every comparison, and the rows that comparisons still need.

    Args:
        folder: where. settings: what must be the same when it goes on, as plain data. steps: in order. references: of each
            comparison, "first", "last", "previous".

    Raises:
        ValueError: the folder was begun with other settings. FileExistsError: it holds something else.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], steps: Sequence[int], references: Sequence[str]
    ) -> None:
        self.folder, self.steps, self.references = folder, list(steps), list(references)
        record, path = plain(settings), folder / "settings.json"
        if path.is_file():
            apart = differences(read_json_file(path), record)
            if apart:
                raise ValueError(
                    f"sweep: {folder} was begun with other settings: {'; '.join(apart[:4])}. Go on with those, or name another "
                    f"folder."
                )
        elif is_taken(folder):
            raise FileExistsError(f"sweep: {folder} holds something else than a sweep. Name another folder.")
        for part in ("steps", "held", "between"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            write_whole(path, [json.dumps(record, indent=1).encode()])
        self._near: dict[int, Held] = {}

    # ---------------------------------------------------------------------------------------------- checkpoints

    def bundle(self, step: int) -> Path:
        """Where a step's results are; there once it is measured."""
        return self.folder / "steps" / f"step-{step:010d}"

    def is_measured(self, step: int) -> bool:
        """Whether a step's results are there, and with them the rows that comparisons need."""
        return self.bundle(step).is_dir()

    def keep(self, step: int, results: AnalysisResults, held: Held) -> None:
        """Rows first: where the results are, the step is done."""
        write_held(self._rows(step), held)
        results.save(self.bundle(step))
        self._near[step] = held

    def data(self) -> str | None:
        """The hash of the data that was measured before."""
        done = next((step for step in self.steps if self.is_measured(step)), None)
        return (
            None if done is None else str(AnalysisResults.load(self.bundle(done)).metadata.get("data_sha256"))
        )

    # ---------------------------------------------------------------------------------------------- comparisons

    def pairs(self) -> list[tuple[int, str, int]]:
        """(a step, which reference, the reference's step) of all that are compared."""
        first, last = self.steps[0], self.steps[-1]
        before = dict(zip(self.steps[1:], self.steps))
        of: dict[str, Callable[[int], int | None]] = {
            "first": lambda step: first,
            "last": lambda step: last,
            "previous": before.get,
        }
        return [
            (step, name, reference)
            for step in self.steps
            for name in self.references
            if (reference := of[name](step)) is not None
        ]

    def open_pairs(self) -> list[tuple[int, str, int]]:
        """Those whose both sides are measured and which are not compared yet."""
        return [
            pair
            for pair in self.pairs()
            if not self._path(*pair[:2]).is_file() and self.is_measured(pair[0]) and self.is_measured(pair[2])
        ]

    def rows(self, step: int) -> Held:
        """What is held of a step."""
        if step not in self._near:
            self._near[step] = read_held(self._rows(step))
        return self._near[step]

    def keep_between(self, step: int, reference: str, values: Between) -> None:
        """A comparison's numbers; NaN is null."""
        write_whole(self._path(step, reference), [json.dumps(plain(values)).encode()])

    def between(self, step: int, reference: str) -> Between:
        """A comparison's numbers, as they were kept."""
        found = read_json_file(self._path(step, reference))
        return {
            site: {name: math.nan if value is None else float(value) for name, value in own.items()}
            for site, own in found.items()
        }

    def let_go(self) -> None:
        """Remove rows that no comparison needs any more."""
        needed = {
            step
            for own, name, reference in self.pairs()
            if not self._path(own, name).is_file()
            for step in (own, reference)
        }
        for step in self.steps:
            if step not in needed:
                self._near.pop(step, None)
                if self.is_measured(step):
                    self._rows(step).unlink(missing_ok=True)

    def _rows(self, step: int) -> Path:
        return self.folder / "held" / f"step-{step:010d}.safetensors"

    def _path(self, step: int, reference: str) -> Path:
        return self.folder / "between" / f"step-{step:010d}-{reference}.json"
