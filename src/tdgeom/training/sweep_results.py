"""``Sweep``: an analysis of every checkpoint, in tables with a column ``step``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tdgeom.analysis.results import AnalysisResults
from tdgeom.core.visible_text import visible
from tdgeom.measures.columns import BETWEEN_STEPS
from tdgeom.plot.lines import profile
from tdgeom.plot.picture_files import one_picture, write_pictures
from tdgeom.training.step_values import as_rows, tidy_frame

__all__ = ["Sweep"]

DRAWN = ("d_pr", "effective_rank", "top1_share", "cos_sim_mean", "norm_mean")


@dataclass(repr=False)
class Sweep(AnalysisResults):
    """Checkpoints of one training: every table has the step as its first column.

    ``metrics`` holds, beside the measures of each site, what stands between a checkpoint and another:
    ``linear_cka_debiased_to_first``, ``..._to_last``, ``..._to_previous``, and so on. ``frame`` is the tidy form, a row for each
    step, site and metric. Saved, loaded and reported as ``AnalysisResults`` is; ``eigenvalues`` are those of the last step.
    """

    def __repr__(self) -> str:
        steps = self.steps
        span = f"{steps[0]:,} to {steps[-1]:,}" if steps else "none"
        return visible(
            f"Sweep({len(steps)} steps, {span}: metrics {len(self.metrics)} x {len(self.metrics.columns)})"
        )

    @property
    def steps(self) -> list[int]:
        """The steps, in order."""
        return [int(step) for step in self.metrics["step"].unique()]

    def frame(self, *, pairs: bool = False) -> pd.DataFrame:
        """``step, site, layer, metric, value`` (``standard_error`` where there is one), of sites, or of pairs of one step's."""
        table = self.novelty if pairs else self.metrics
        if pairs and len(table):
            table = table.assign(site=[f"{a}->{b}" for a, b in zip(table["a"], table["b"])])
        found = (
            {step: list(as_rows(table[table["step"] == step])) for step in self.steps} if len(table) else {}
        )
        return tidy_frame(found, pairs=pairs)

    def plot(self, what: str | None = None, ax: Any = None, **style: Any) -> Any:
        """A measure over steps, a line a site; default the participation ratio, or the first measure there is.

        Raises:
            KeyError: no such measure.
        """
        what = self._drawn()[0] if what is None else what
        table = self.metrics if what in self.metrics else self.novelty
        hue = "site" if what in self.metrics else "transition"
        return profile(table, what, x="step", hue=hue, ax=ax, **style)

    def write_plots(self, folder: str | Path | None = None) -> list[Path]:
        """The main measures over steps as PNG files, and the files' paths; default ``plots`` in the saved bundle."""
        drawn = {
            name: one_picture(profile, self.metrics, name, x="step", hue="site", size=(6.8, 4.4))
            for name in self._drawn()
        }
        return write_pictures(drawn, self._plots_folder(folder))

    def _drawn(self) -> list[str]:
        """What has a picture: the usual measures, and similarities."""
        names = [str(name) for name in self.metrics if self.metrics[name].notna().any()]
        found = [name for name in names if name in DRAWN or name.endswith(BETWEEN_STEPS)]
        return found or [row.metric for row in list(as_rows(self.metrics))[:1]]
