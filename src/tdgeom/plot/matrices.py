"""Measures between sites as a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from tdgeom.measures.columns import column_of, fixed_ends
from tdgeom.plot.pair_grids import pair_grid, short_names, side_name
from tdgeom.plot.palette import GRADIENT
from tdgeom.plot.style import as_array, axes_or_new, axis_name, require_matplotlib, thinned
from tdgeom.run.to_frame import to_frame

__all__ = ["matrix"]


def matrix(
    values: Any,
    measure: str | None = None,
    ax: Any = None,
    *,
    names: Sequence[str] | None = None,
    symmetric: bool = True,
    diagonal: float | str | None = "auto",
    annotate: bool | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    cmap: str = GRADIENT,
    colorbar: bool = True,
) -> Any:
    """A measure between sites as a matrix: row a, column b.

    Args:
        values: a result of ``run`` (its root "between" is read), ``Comparison`` or ``AnalysisResults`` (their table
            ``novelty``), a table with columns ``a``, ``b`` and the measure, or a 2-D array.
        measure: the column drawn; needed unless ``values`` is an array. Of a directed measure give either name
            (``linear_r2_ab`` or ``linear_r2_ba``): both fill the matrix.
        ax: matplotlib axes; made if None.
        names: what rows and columns are called; default the layers.
        symmetric: fill (b, a) from (a, b) where a measure has no direction.
        diagonal: the value of a site with itself; "auto" knows the common measures and leaves others blank, None blank.
        annotate: numbers in the cells; default up to 10 rows.
        vmin, vmax: the ends of the colour scale; default the measure's range where it has one, else the data's.
        cmap: a colour map; the default is even in lightness.
        colorbar: a colour bar.

    Returns:
        The axes; ``ax.images[0].get_array()`` holds the matrix, masked where nothing was measured.

    Raises:
        KeyError: no such measure. ValueError: no measure named, or not a matrix. ModuleNotFoundError: no matplotlib.

        >>> pairs = pd.DataFrame({"a": ["residual_input.0"], "b": ["residual_input.1"], "linear_cka": [0.5]})
        >>> matrix(pairs, "linear_cka").images[0].get_array().tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    if isinstance(getattr(values, "novelty", None), pd.DataFrame):  # results and comparisons
        values = values.novelty
    if isinstance(values, pd.DataFrame) or hasattr(values, "batch_size"):
        table = values if isinstance(values, pd.DataFrame) else to_frame(values, "between")
        grid, rows, columns = pair_grid(table, measure, symmetric, diagonal)
        named = [side_name(rows), side_name(columns)]
        rows, columns = short_names(rows), short_names(columns)
    else:
        grid = as_array(values).astype(np.float64)
        if grid.ndim != 2:
            raise ValueError(f"matrix expects a 2-D array, a table or a result, got shape {grid.shape}.")
        rows, columns = ([str(index) for index in range(size)] for size in grid.shape)
        named = ["layer", "layer"]
    if names is not None:
        rows, columns = list(names)[: len(rows)], list(names)[: len(columns)]
    cell = min(0.42, 7.5 / max(grid.shape))
    ax = axes_or_new(ax, (max(cell * grid.shape[1], 2.4) + 2.0, max(cell * grid.shape[0], 1.6) + 1.0))
    masked = np.ma.masked_invalid(grid)
    colours = require_matplotlib().colormaps.get_cmap(cmap).with_extremes(bad="0.92")
    ends = fixed_ends(column_of(measure), masked.compressed()) if measure else None
    if ends is not None:
        vmin, vmax = (ends[0] if vmin is None else vmin), (ends[1] if vmax is None else vmax)
    image = ax.imshow(masked, cmap=colours, vmin=vmin, vmax=vmax, interpolation="nearest")
    long = max(map(len, [*rows, *columns]), default=0) > 3
    ax.set_xticks(*thinned(columns), rotation=90 if long else 0, parse_math=False)
    ax.set_yticks(*thinned(rows), parse_math=False)
    if not long:
        ax.set(xlabel=named[1], ylabel=named[0])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if annotate if annotate is not None else max(grid.shape) <= 10:
        _write_cells(ax, image, grid)
    if colorbar:
        bar = ax.figure.colorbar(image, ax=ax, fraction=0.05, pad=0.03)
        bar.outline.set_visible(False)
        bar.set_label(axis_name(measure) if measure else "value")
    return ax


def _write_cells(ax: Any, image: Any, grid: np.ndarray) -> None:
    small = np.nanmax(np.abs(grid), initial=0.0) < 10
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            said = f"{round(float(value), 2) + 0.0:.2f}" if small else f"{value:.3g}"  # "0.00", not "-0.00"
            colour = "white" if dark else "black"
            ax.text(column, row, said, ha="center", va="center", fontsize="x-small", color=colour)
