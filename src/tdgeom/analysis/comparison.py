"""``Comparison``: two models side by side, a matrix of layers for every measure."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from tdgeom.analysis.results import AnalysisResults
from tdgeom.core.visible_text import visible
from tdgeom.measures.columns import is_error, of_chance
from tdgeom.plot.matrices import matrix
from tdgeom.plot.picture_files import one_picture, write_pictures

__all__ = ["Comparison"]


@dataclass(repr=False)
class Comparison(AnalysisResults):
    """Two models side by side.

    ``novelty`` holds one row a pair of sites (columns ``a``, ``b`` and a column a measure), ``metrics`` one row a site;
    ``matrix`` gives a measure as a layer x layer table. Saved and loaded as ``AnalysisResults`` is.
    """

    def __repr__(self) -> str:
        models = ", ".join(f"{side} {one['id']}" for side, one in self.metadata.get("models", {}).items())
        return visible(
            f"Comparison({models}: {len(self.novelty)} pairs of sites, {', '.join(self.measures)})"
        )

    def _repr_html_(self) -> str:
        return visible(self.matrix().to_html() if self.measures else escape(repr(self)))

    def matrix(self, measure: str | None = None) -> pd.DataFrame:
        """A measure as a table: the first model's sites down, the second's across.

        Raises:
            KeyError: no such measure; the message lists those there are.
        """
        measure = self.measures[0] if measure is None else measure
        if measure not in self._columns:
            raise KeyError(f"Comparison has no measure {measure!r}; it has {self._columns}.")
        order = {side: list(dict.fromkeys(self.novelty[side])) for side in ("a", "b")}
        table = self.novelty.pivot(index="a", columns="b", values=measure)
        return table.loc[order["a"], order["b"]]

    def plot(self, what: str | None = None, ax: Any = None, **style: Any) -> Any:
        """The matrix of a measure, default the first: layers of one model down, of the other across."""
        return matrix(self.novelty, self.measures[0] if what is None else what, ax, **style)

    def write_plots(self, folder: str | Path | None = None) -> list[Path]:
        """The matrix of every measure as a PNG file, and the files' paths.

        Args:
            folder: default ``plots`` in the saved bundle.

        Raises:
            ValueError: no folder, and nothing saved. ModuleNotFoundError: no matplotlib.
        """
        size = (6.4, 5.4)
        drawn = {name: one_picture(matrix, self.novelty, name, size=size) for name in self.measures}
        return write_pictures(drawn, self._plots_folder(folder))

    @property
    def measures(self) -> list[str]:
        """The measures' names, without their standard errors and what they are by chance."""
        return [name for name in self._columns if not is_error(name) and not of_chance(name)]

    @property
    def _columns(self) -> list[str]:
        places = ("a", "b", "pair", "layer_a", "layer_b")
        return [str(name) for name in self.novelty if name not in places]
